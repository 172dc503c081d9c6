"""Ratios are made pair by pair, and goals are held against the right end of the spread."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from perf.case import Attempt, Case, Contender, Goal
from perf.disks import Contents
from perf.machine import Machine
from perf.measure import Usage
from perf.report import MIB, Report, Run, Spread, relative_names, write_report

MACHINE = Machine(
    processor="cpu",
    cores=2,
    memory=1 << 30,
    kernel="6.1",
    filesystem="ext4",
    python="3.11",
    tools={"dd": "dd 9.1"},
    load=0.1,
)
CONTENTS = Contents(size=MIB, allocated=MIB, extents=1, nonzero_4k=MIB, nonzero_64k=MIB, xxh3_128="00")
OURS = Contender("ours", lambda _: Attempt(steps=()))
RIVAL = Contender("rival", lambda _: Attempt(steps=()))
CASE = Case(name="case", summary="", disk="disk", ours=OURS, rival=RIVAL)


def run(contender: str, number: int, wall_s: float, *, rss: int = MIB, image: int | None = None) -> Run:
    usage = Usage(
        wall_s=wall_s,
        steps_s=(wall_s,),
        user_s=wall_s,
        system_s=0.0,
        peak_rss=rss,
        smallest_rss=0,
        caches_dropped=True,
        load=0.0,
    )
    return Run(contender=contender, disk="disk", round=number, commands=(contender,), usage=usage, image_bytes=image)


def report(*runs: Run, case: Case = CASE) -> Report:
    return Report(started="now", machine=MACHINE, disks={"disk": CONTENTS}, cases=(case,), runs=runs)


def test_ratio_pairs_the_runs_of_a_round() -> None:
    """Medians of each side first would give 2.0: the slow minute hit both contenders of round 2."""
    found = report(
        run("ours", 1, 1),
        run("rival", 1, 4),
        run("ours", 2, 10),
        run("rival", 2, 20),
        run("ours", 3, 2),
        run("rival", 3, 6),
    )
    assert found.figure(CASE, "wall ratio") == Spread(3.0, 2.0, 4.0, 3)


def test_failed_run_leaves_its_round_out() -> None:
    failed = replace(run("ours", 1, 0.1), failure="image differs")
    found = report(failed, run("rival", 1, 4), run("ours", 2, 1), run("rival", 2, 2))
    assert found.figure(CASE, "wall ratio") == Spread(2.0, 2.0, 2.0, 1)


def test_size_ratio_is_ours_over_the_rivals() -> None:
    found = report(run("ours", 1, 1, image=110), run("rival", 1, 1, image=100))
    assert found.figure(CASE, "size ratio") == Spread(1.1, 1.1, 1.1, 1)


def test_goal_for_time_is_a_floor_and_for_size_a_ceiling() -> None:
    runs = (run("ours", 1, 1, image=110), run("rival", 1, 8, image=100))
    verdicts = {
        (goal.figure, goal.bound): report(*runs).verdict(CASE, goal)
        for goal in (Goal("wall ratio", 8), Goal("wall ratio", 8.1), Goal("size ratio", 1.1), Goal("size ratio", 1.09))
    }
    assert list(verdicts.values()) == ["reached", "NOT reached", "reached", "NOT reached"]


def test_one_run_over_the_memory_limit_misses_the_goal() -> None:
    alone = Case(name="memory", summary="", disk="disk", ours=OURS, goals=(Goal("peak memory", 2 * MIB),))
    runs = (run("ours", 1, 1), run("ours", 2, 1), run("ours", 3, 1, rss=3 * MIB))
    assert report(*runs, case=alone).verdict(alone, alone.goals[0]) == "NOT reached"


def test_a_share_is_what_our_runs_measured_inside(tmp_path: Path) -> None:
    case = replace(CASE, goals=(Goal("share", 0.01),))
    shares = (0.004, 0.012, 0.006)
    found = report(*(replace(run("ours", number, 1), share=share) for number, share in enumerate(shares)), case=case)
    assert found.figure(case, "share") == Spread(0.006, 0.004, 0.012, 3)
    _, page = write_report(found, tmp_path / "x")
    assert "| case | share | 0.60 (0.40-1.20) % | ≤ 1% | reached |" in page.read_text()
    assert found.verdict(case, Goal("share", 0.005)) == "NOT reached"


def test_case_without_its_rival_is_not_measured() -> None:
    assert report(run("ours", 1, 1)).verdict(CASE, Goal("wall ratio", 1)) == "not measured"


def test_report_is_written_for_people_and_for_machines(tmp_path: Path) -> None:
    case = replace(CASE, goals=(Goal("wall ratio", 3),))
    as_json, as_markdown = write_report(
        report(run("ours", 1, 1, image=MIB), run("rival", 1, 4, image=MIB), case=case), tmp_path / "results" / "x"
    )
    assert json.loads(as_json.read_text())["cases"][0]["goals"][0]["verdict"] == "reached"
    assert "| case | wall ratio | 4.00 (4.00-4.00)x | ≥ 3x | reached |" in as_markdown.read_text()


def test_places_of_this_machine_are_left_out_of_a_report() -> None:
    names = {"/home/me": "PROJECT", "/home/me/.cache": "CACHE"}
    assert relative_names("dd if=/home/me/.cache/a of=/home/me/b", names) == "dd if=CACHE/a of=PROJECT/b"


def test_a_contender_that_is_a_pipe_keeps_its_row_whole(tmp_path: Path) -> None:
    piped = replace(CASE, rival=Contender("dd | lz4", lambda _: Attempt(steps=())))
    _, page = write_report(report(run("ours", 1, 1), run("dd | lz4", 1, 2), case=piped), tmp_path / "x")
    assert "| dd \\| lz4 | disk | 1 |" in page.read_text()
