"""What a benchmark run found: figures per case, as JSON for machines and Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from perf.case import Case, Figure, Goal
from perf.disks import Contents
from perf.machine import Machine
from perf.measure import Usage

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One contender, once. `commands` are for reading: places of this machine are left out."""

    contender: str
    disk: str
    round: int
    commands: tuple[str, ...]
    usage: Usage | None = None
    share: float | None = None
    image_bytes: int | None = None
    proof: str | None = None
    failure: str | None = None

    def line(self) -> str:
        """Say it in one line, while it runs."""
        head = f"round {self.round}  {self.contender:36} {self.disk:15}"
        if self.usage is None or self.failure:
            return f"{head} FAILED {self.failure}"
        size = f"{self.image_bytes / MIB:8.0f} MiB" if self.image_bytes is not None else ""
        rss = f"{self.usage.peak_rss / MIB:5.0f} MiB peak"
        times = f"{self.usage.wall_s:8.2f} s {self.usage.cpu_s:8.2f} cpu s"
        return f"{head} {times} {rss} {size} {self.proof or ''}".rstrip()


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and how far the rounds lay apart."""

    middle: float
    low: float
    high: float
    count: int

    def text(self, digits: int = 2) -> str:
        return f"{self.middle:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that one call of the benchmark found."""

    started: str
    machine: Machine
    disks: Mapping[str, Contents]
    cases: tuple[Case, ...]
    runs: tuple[Run, ...]

    def good_runs(self, contender: str, disk: str) -> dict[int, Run]:
        """Return the runs that ended well, by round."""
        return {
            run.round: run
            for run in self.runs
            if run.contender == contender and run.disk == disk and run.usage is not None and run.failure is None
        }

    def figure(self, case: Case, figure: Figure) -> Spread | None:
        """Compute a figure pair by pair: each round's run of ours with the same round's run of the rival."""
        ours = self.good_runs(case.ours.name, case.disk)
        if figure == "peak memory":
            return spread([float(run.usage.peak_rss) for run in ours.values() if run.usage])
        if figure == "step time":
            return spread([median(run.usage.steps_s) for run in ours.values() if run.usage])
        if figure == "share":
            return spread([run.share for run in ours.values() if run.share is not None])
        if case.rival is None:
            return None
        rivals = self.good_runs(case.rival.name, case.disk)
        pairs = [(ours[number], rivals[number]) for number in sorted(ours.keys() & rivals.keys())]
        return spread([ratio for our, rival in pairs if (ratio := _ratio(figure, our, rival)) is not None])

    def verdict(self, case: Case, goal: Goal) -> str:
        """Say whether the goal is reached."""
        found = self.figure(case, goal.figure)
        if found is None:
            return "not measured"
        value = found.high if goal.figure == "peak memory" else found.middle
        return "reached" if goal.is_reached(value) else "NOT reached"


def spread(values: list[float]) -> Spread | None:
    """Summarise the rounds, or return None when there are none."""
    return Spread(median(values), min(values), max(values), len(values)) if values else None


def _ratio(figure: Figure, ours: Run, rival: Run) -> float | None:
    if ours.usage is None or rival.usage is None:
        return None
    match figure:
        case "wall ratio":
            return rival.usage.wall_s / ours.usage.wall_s
        case "cpu ratio":
            return rival.usage.cpu_s / ours.usage.cpu_s
        case "size ratio":
            return ours.image_bytes / rival.image_bytes if ours.image_bytes and rival.image_bytes else None
        case "read ratio":
            return ours.usage.read_bytes / rival.usage.read_bytes if rival.usage.read_bytes else None
        case _:
            return None


def write_report(report: Report, stem: Path) -> tuple[Path, Path]:
    """Write STEM.json and STEM.md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown = stem.with_suffix(".json"), stem.with_suffix(".md")
    as_json.write_text(json.dumps(_record(report), indent=1, ensure_ascii=False) + "\n")
    as_markdown.write_text(_page(report))
    return as_json, as_markdown


def relative_names(text: str, names: Mapping[str, str]) -> str:
    """Replace places of this machine by names, the longest first."""
    for place in sorted(names, key=len, reverse=True):
        text = text.replace(place, names[place])
    return text


def _record(report: Report) -> dict[str, object]:
    return {
        "started": report.started,
        "machine": asdict(report.machine),
        "disks": {name: asdict(contents) for name, contents in report.disks.items()},
        "cases": [_case_record(report, case) for case in report.cases],
        "runs": [asdict(run) for run in report.runs],
    }


def _case_record(report: Report, case: Case) -> dict[str, object]:
    figures: tuple[Figure, ...] = ("wall ratio", "cpu ratio", "size ratio", "read ratio", "peak memory", "share")
    found = {figure: spread for figure in figures if (spread := report.figure(case, figure)) is not None}
    return {
        "name": case.name,
        "disk": case.disk,
        "ours": case.ours.name,
        "rival": case.rival.name if case.rival else None,
        "figures": {figure: asdict(value) for figure, value in found.items()},
        "goals": [{**asdict(goal), "verdict": report.verdict(case, goal)} for goal in case.goals],
    }


def _page(report: Report) -> str:
    lines = [f"# Benchmark of {report.started}", "", report.machine.line(), ""]
    for name, contents in report.disks.items():
        lines.append(
            f"Disk `{name}`: {contents.size / MIB:.0f} MiB, {contents.nonzero_64k / MIB:.0f} MiB in non-zero 64 KiB "
            f"blocks, {contents.extents} extents, xxh3-128 {contents.xxh3_128}."
        )
    lines += [
        "",
        "Medians with (lowest-highest) over the rounds. Time ratios are rival / ours, sizes ours / rival, "
        "both pair by pair within a round.",
        "",
        "| case | figure | measured | goal | |",
        "|---|---|---|---|---|",
    ]
    lines += [row for case in report.cases for row in _case_rows(report, case)]
    lines += ["", "| contender | disk | n | wall s | cpu s | peak MiB | image MiB | proven |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    keys = dict.fromkeys((run.contender, run.disk) for run in report.runs)
    lines += [_contender_row(report, contender, disk) for contender, disk in keys]
    failures = [run.line() for run in report.runs if run.failure]
    if failures:
        lines += ["", "Failed:", "", *(f"    {line}" for failure in failures for line in failure.splitlines())]
    if not all(run.usage.caches_dropped for run in report.runs if run.usage):
        lines += ["", "**The page cache could not be dropped before every run: do not compare these figures.**"]
    floor = max((run.usage.smallest_rss for run in report.runs if run.usage), default=0)
    lines += [
        "",
        f"Peak memory is the largest single process's; under {floor / MIB:.0f} MiB it cannot be told apart.",
        "",
        "Commands:",
        "",
        *dict.fromkeys(f"    {command}" for run in report.runs for command in run.commands),
    ]
    return "\n".join(lines) + "\n"


def _case_rows(report: Report, case: Case) -> list[str]:
    goals = {goal.figure: goal for goal in case.goals}
    figures: list[Figure] = ["wall ratio", "cpu ratio", "size ratio"] if case.rival else []
    figures += ["read ratio"] if "read ratio" in goals else []
    figures += [figure for figure in ("peak memory", "step time", "share") if figure in goals]
    rows = []
    for figure in figures:
        found = report.figure(case, figure)
        goal = goals.get(figure)
        if found is None and goal is None:
            continue
        measured = "-" if found is None else _figure_text(figure, found)
        wanted = (goal.text(), report.verdict(case, goal)) if goal else ("-", "")
        rows.append(f"| {case.name} | {figure} | {measured} | {wanted[0]} | {wanted[1]} |")
    return rows


def _figure_text(figure: Figure, found: Spread) -> str:
    if figure == "peak memory":
        return Spread(found.middle / MIB, found.low / MIB, found.high / MIB, found.count).text(0) + " MiB"
    if figure == "step time":
        return found.text(3) + " s"
    if figure == "share":
        return Spread(found.middle * 100, found.low * 100, found.high * 100, found.count).text(2) + " %"
    return found.text(3 if figure in ("size ratio", "read ratio") else 2) + "x"


def _contender_row(report: Report, contender: str, disk: str) -> str:
    runs = list(report.good_runs(contender, disk).values())
    usages = [run.usage for run in runs if run.usage]
    proofs = [run.proof for run in runs if run.proof]
    cells = [
        _cell(spread([usage.wall_s for usage in usages])),
        _cell(spread([usage.cpu_s for usage in usages])),
        _cell(spread([usage.peak_rss / MIB for usage in usages]), 0),
        _cell(spread([run.image_bytes / MIB for run in runs if run.image_bytes is not None]), 0),
        f"{proofs[-1]}, {len(proofs)} of {len(runs)}" if proofs else "no",
    ]
    name = contender.replace("|", "\\|")  # a pipe of commands would end the cell
    return f"| {name} | {disk} | {len(runs)} | {' | '.join(cells)} |"


def _cell(value: Spread | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return value.text(digits) if value.low != value.high else f"{value.middle:.{digits}f}"
