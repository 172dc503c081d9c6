"""The stopwatch counts every process once, and says which one failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from perf.measure import CommandFailed, Step, Usage, measure, one

# Busy for a tenth of a second of processor time, by its own count. The second of a pipe reads what the first says: one
# that went away before would fail the first with a broken pipe.
SPIN = (sys.executable, "-c", "import time\nwhile time.process_time() < 0.1: pass\nprint('x' * 10)")
READ_AND_SPIN = (sys.executable, "-c", "import sys, time\nsys.stdin.read()\nwhile time.process_time() < 0.1: pass")
HOLD_64_MIB = (sys.executable, "-c", "b'x' * (64 << 20)")


def run(*steps: Step, folder: Path) -> Usage:
    return measure(steps, environment={}, folder=folder, log=folder / "log", cold=False)


def test_processor_time_of_all_commands_is_added_up(tmp_path: Path) -> None:
    usage = run(Step((SPIN, READ_AND_SPIN)), one(*SPIN), folder=tmp_path)
    assert 0.3 <= usage.cpu_s < 3
    assert len(usage.steps_s) == 2
    assert 0.2 <= sum(usage.steps_s) <= usage.wall_s


def test_peak_memory_is_that_of_the_largest_process(tmp_path: Path) -> None:
    usage = run(one("true"), one(*HOLD_64_MIB), one("true"), folder=tmp_path)
    assert 64 << 20 < usage.peak_rss < 128 << 20


def test_small_processes_do_not_inherit_the_memory_of_the_harness(tmp_path: Path) -> None:
    ballast = bytearray(b"x" * (100 << 20))
    assert run(one("true"), folder=tmp_path).peak_rss < 40 << 20
    assert len(ballast) == 100 << 20


def test_output_of_a_pipe_goes_into_the_next_command(tmp_path: Path) -> None:
    run(Step((("echo", "hello"), ("tr", "a-z", "A-Z"))), folder=tmp_path)
    assert (tmp_path / "log").read_text() == "HELLO\n"


@pytest.mark.parametrize("position", [0, 1])
def test_failing_command_anywhere_in_a_pipe_is_named(position: int, tmp_path: Path) -> None:
    commands = [("cat", "/dev/null"), ("cat",)]
    commands[position] = ("sh", "-c", "echo too bad >&2; exit 7")
    with pytest.raises(CommandFailed, match=r"exit 7: sh -c .*\ntoo bad"):
        run(Step(tuple(commands)), folder=tmp_path)


def test_steps_after_a_failure_do_not_run(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed):
        run(one("false"), one("touch", str(tmp_path / "ran")), folder=tmp_path)
    assert not (tmp_path / "ran").exists()
