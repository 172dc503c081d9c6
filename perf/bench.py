"""Run benchmark cases and write what came out: `python -m perf.bench CASE... [--rounds 5]`.

Contenders run in turns, one after the other within a round, so that a ratio compares two runs made minutes apart.
`perf/README.md` has the method.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from perf import disks
from perf.case import Case, Contender, Ground
from perf.machine import this_machine
from perf.measure import CommandFailed, Step, measure
from perf.proof import ImageWrong, prove, stored_bytes
from perf.report import Report, Run, relative_names, write_report
from perf.store import aws_client, running_store

FAMILIES = (
    "images",
    "used_blocks",
    "formats",
    "reading",
    "storing",
    "sending",
    "streams",
    "serving",
    "memory",
    "startup",
    "observing",
    "pacing",
    "journal",
    "inspecting",
)
PROJECT = Path(__file__).resolve().parent.parent


def all_cases() -> dict[str, list[Case]]:
    """Return the cases of every family, in the order they are listed."""
    return {family: list(importlib.import_module(f"perf.cases.{family}").CASES) for family in FAMILIES}


class Bench:
    """Runs contenders, each on a ground of its own, and keeps what they used."""

    def __init__(self, product: tuple[str, ...], cases: Iterable[Case] = ()) -> None:
        """`cases` tell whose reads are counted."""
        self._product = product
        counted = [case for case in cases if any(goal.figure == "read ratio" for goal in case.goals)]
        self._counted = {(contender.name, case.disk) for case in counted for contender in _contenders(case)}
        self._read_bytes: dict[tuple[str, str], int] = {}
        self.runs: list[Run] = []

    def run(self, contender: Contender, disk: str, round_number: int, *, with_proof: bool) -> None:
        """Measure the contender once and prove its image when asked. A contender that fails is noted, not raised."""
        with self._ground(disk, contender) as ground:
            attempt = contender.prepare(ground)
            commands = tuple(_without_places(_shell(step), ground) for step in attempt.steps)
            commands += (_without_places(attempt.explained, ground),) if attempt.explained else ()
            run = Run(contender=contender.name, disk=disk, round=round_number, commands=commands)
            try:
                # The log lies beside the folder, so that no contender finds it in its way.
                log = ground.folder.with_suffix(".log")
                usage = measure(attempt.steps, environment=attempt.environment, folder=PROJECT, log=log)
                share = float(attempt.share.read_text()) if attempt.share else None
                run = replace(run, usage=usage, share=share, image_bytes=stored_bytes(attempt, ground))
                if with_proof:
                    run = replace(run, proof=prove(attempt, ground))
            except (CommandFailed, ImageWrong) as error:
                run = replace(run, failure=_without_places(str(error), ground))
        if run.usage is not None and run.failure is None and (contender.name, disk) in self._counted:
            run = replace(run, usage=replace(run.usage, read_bytes=self._reads_of(contender, disk)))
        self.runs.append(run)
        print(run.line(), file=sys.stderr, flush=True)

    def _reads_of(self, contender: Contender, disk: str) -> int:
        """Bytes that the contender reads of the disk, from a run in which its program is in the page cache.

        In a cold run the program and its libraries count too: 50 MB of ours, which is much beside a small filesystem.
        """
        key = contender.name, disk
        if key not in self._read_bytes:
            with self._ground(disk, contender) as ground:
                attempt = contender.prepare(ground)
                log = ground.folder.with_suffix(".log")
                usage = measure(
                    attempt.steps,
                    environment=attempt.environment,
                    folder=PROJECT,
                    log=log,
                    cold=False,
                    forgotten=ground.disk,
                )
            self._read_bytes[key] = usage.read_bytes
        return self._read_bytes[key]

    @contextmanager
    def _ground(self, disk: str, contender: Contender) -> Iterator[Ground]:
        """Make an empty place for one run, and delete it with everything in it."""
        folder = disks.cache_folder() / "run"
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted benchmark left
        folder.mkdir(parents=True)
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, folder)
            store = None
            if contender.needs_store:
                store = stack.enter_context(running_store(folder.with_name("store"), contender.line))
            yield Ground(disk=disks.DISKS[disk].path, folder=folder, product=self._product, store=store)


def _shell(step: Step) -> str:
    return " | ".join(shlex.join(command) for command in step.commands)


def _without_places(text: str, ground: Ground) -> str:
    """Leave out where this machine keeps things: a report is read elsewhere."""
    names = {str(ground.folder): "OUT", str(disks.cache_folder()): "CACHE", sys.executable: "python"}
    names[str(PROJECT)] = "PROJECT"
    if ground.store is not None:
        names |= {ground.store.client: "aws", ground.store.endpoint: "ENDPOINT"}
    return relative_names(text, names)


def main() -> int:
    families = all_cases()
    arguments = _arguments(families)
    if arguments.list:
        _print_list(families)
        return 0
    cases = list(_chosen(arguments.cases, families, arguments.disk))
    if not cases:
        print("name at least one case or family; --list shows them", file=sys.stderr)
        return 2
    contents = {name: disks.contents(disks.ready(name)) for name in dict.fromkeys(case.disk for case in cases)}
    started = datetime.datetime.now(datetime.UTC)
    tools = ["qemu-img", "dd"]
    if any(contender.needs_store for case in cases for contender in _contenders(case)):
        tools.append(aws_client())
    machine = this_machine(disks.cache_folder(), tools)
    bench = Bench(tuple(shlex.split(arguments.product or f"{sys.executable} -m pipeline run")), cases)
    try:
        for round_number in range(1, arguments.rounds + 1):
            with_proof = arguments.check == "every" or (arguments.check == "last" and round_number == arguments.rounds)
            for contender, disk in _turns(cases, round_number, arguments.only):
                bench.run(contender, disk, round_number, with_proof=with_proof)
    finally:
        # Also when it is interrupted: an hour of measurements is worth keeping.
        report = Report(
            started=started.isoformat(timespec="seconds"),
            machine=machine,
            disks=contents,
            cases=tuple(cases),
            runs=tuple(bench.runs),
        )
        stem = arguments.out or PROJECT / "perf" / "results" / f"{started:%Y-%m-%d-%H%M}-{'-'.join(arguments.cases)}"
        for file in write_report(report, stem):
            print(f"wrote {file}", file=sys.stderr)
    print(stem.with_suffix(".md").read_text())
    return 1 if any(run.failure for run in bench.runs) else 0


def _turns(cases: list[Case], round_number: int, only: str | None) -> Iterator[tuple[Contender, str]]:
    """Yield who runs when in a round.

    Cases that share a rival and a disk stand together; the rival goes first in odd rounds, last in even ones.
    """
    groups: dict[tuple[str, str], list[Contender]] = {}
    for case in cases:
        group = groups.setdefault((case.disk, case.rival.name if case.rival else case.ours.name), [])
        known = {contender.name for contender in group}
        wanted = [case.rival if only != "ours" else None, case.ours if only != "rival" else None]
        group += [contender for contender in wanted if contender is not None and contender.name not in known]
    done = set[tuple[str, str]]()
    for (disk, _), group in groups.items():
        for contender in group if round_number % 2 else reversed(group):
            if (disk, contender.name) not in done:
                done.add((disk, contender.name))
                yield contender, disk


def _contenders(case: Case) -> Iterable[Contender]:
    return (case.ours,) if case.rival is None else (case.ours, case.rival)


def _chosen(names: list[str], families: dict[str, list[Case]], disk: str | None) -> Iterator[Case]:
    by_name = {case.name: case for cases in families.values() for case in cases}
    chosen: dict[str, Case] = {}
    for name in names:
        for case in by_name.values() if name == "all" else families.get(name) or [by_name[name]]:
            chosen[case.name] = case
    for case in chosen.values():
        yield replace(case, disk=disk) if disk else case


def _arguments(families: dict[str, list[Case]]) -> argparse.Namespace:
    names = ["all", *families, *(case.name for cases in families.values() for case in cases)]
    parser = argparse.ArgumentParser(prog="python -m perf.bench", description="Measure the product against its rivals.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="case or family, or all")
    parser.add_argument("--list", action="store_true", help="show families, cases, disks and goals")
    parser.add_argument("--rounds", type=int, default=5, help="default 5; a figure to quote needs 5")
    parser.add_argument("--disk", choices=list(disks.DISKS), help="run the cases on this disk instead of their own")
    parser.add_argument("--only", choices=["ours", "rival"], help="leave the other side out")
    parser.add_argument("--check", choices=["last", "every", "never"], default="last", help="rounds with proven images")
    parser.add_argument(
        "--product", metavar="COMMAND", help="takes an export.toml; default: this checkout's pipeline run"
    )
    parser.add_argument(
        "--out", type=Path, metavar="STEM", help="write STEM.json, STEM.md; default perf/results/DATE-CASE"
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases if name not in names]
    if unknown:
        parser.error(f"no case or family {', '.join(unknown)}; --list shows them")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return arguments


def _print_list(families: dict[str, list[Case]]) -> None:
    for family, cases in families.items():
        print(family)
        for case in cases:
            goals = ", ".join(f"{goal.figure} {goal.text()}" for goal in case.goals)
            print(f"  {case.name:32} {case.disk:15} {case.summary}\n{'':51}goal: {goals}")
    print("disks")
    for disk in disks.DISKS.values():
        print(f"  {disk.name:32} {disk.summary}")


if __name__ == "__main__":
    sys.exit(main())
