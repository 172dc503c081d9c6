"""`pipeline run` and `pipeline plan`: messages, JSON and exit codes, with planning and engine replaced."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from pipeline.commands.run import change_lines
from pipeline.errors import (
    LeftBehindError,
    PipelineError,
    PlanError,
    SourceError,
    StoreError,
    VerificationError,
    first_error,
)
from pipeline.events import EventStream
from pipeline.flow.items import Verdict
from tests.commands.conftest import Call, FakeOutcome, Seam

SUMMARY = """\
verified: identical
  image     s3://images/web01.qcow2
  size      5.00 GiB (5368709121 bytes)
  disk      20 GiB (21474836480 bytes)
  read      6 GiB (6442450944 bytes)
  sent      5.00 GiB (5368709121 bytes)
  time      1 min 40 s, 204.8 MiB/s of disk
  manifest  s3://images/web01.qcow2.manifest.json and web01.qcow2.manifest.json
  write.s3 was the bottleneck: busy 91% of the time.
"""


def fail_with(error: BaseException) -> Callable[[EventStream], Awaitable[None]]:
    async def work(events: EventStream) -> None:
        raise error

    return work


def test_a_run_ends_with_the_summary_on_stdout_and_progress_on_stderr(
    call: Call, seam: Seam, export_file: Path
) -> None:
    said = call("run", export_file, "--set", "export.name=other")
    assert said.code == 0
    assert said.out == SUMMARY
    assert said.err.splitlines() == [
        "20 GiB disk, 6 GiB of it to read -> s3://images/web01.qcow2",
        'warning: retry_scheduled stage=write.s3 operation=put_part attempt=2 wait_s=1.6 reason="503 SlowDown"',
        "sealed: 5.00 GiB at s3://images/web01.qcow2",
        "verify.readback:   0.0%",
        "verify.readback: identical, all of it",
    ]
    assert seam.closed
    assert seam.planned[0].export.name == "other"


def test_quiet_leaves_only_the_summary(call: Call, seam: Seam, export_file: Path) -> None:
    said = call("run", export_file, "--quiet", "--set", "observe.log_level=error")
    assert (said.code, said.out, said.err) == (0, SUMMARY, "")


def test_json_tells_the_run_in_objects_with_progress_once_a_second(call: Call, seam: Seam, export_file: Path) -> None:
    told = call("run", export_file, "--json").objects
    assert [one["type"] for one in told] == [
        "run_planned",
        "progress_sampled",
        "progress_sampled",
        "progress_sampled",
        "retry_scheduled",
        "image_sealed",
        "verify_progressed",
        "image_verified",
        "image_published",
        "run_finished",
    ]
    assert [one["elapsed_s"] for one in told if one["type"] == "progress_sampled"] == [0, 1, 2]
    assert told[-1]["stored_bytes"] == 5368709121


def test_a_run_without_verification_says_so_and_exits_0(call: Call, seam: Seam, export_file: Path) -> None:
    seam.outcome = FakeOutcome(state="stored", verdicts=())
    said = call("run", export_file)
    assert said.code == 0
    assert said.out.startswith("stored, not verified\n")


def test_an_image_that_could_not_be_proven_is_no_success(call: Call, seam: Seam, export_file: Path) -> None:
    verdict = Verdict("receipt", "unproven", 0.0, detail="the store keeps no checksum")
    seam.outcome = FakeOutcome(state="unproven", verdicts=(verdict,))
    said = call("run", export_file)
    assert said.code == 1
    assert said.out.startswith("unproven: the store keeps no checksum\n")


@pytest.mark.parametrize(
    "error, code",
    [
        (SourceError("i/o error", operation="read", offset=4096, hint="Replace the disk."), 1),
        (StoreError("access denied", operation="put_part", hint="Ask for s3:PutObject."), 1),
        (PlanError("the image can't fit", hint="Another target."), 2),
        (VerificationError("the stored image is not the disk", hint="Again."), 3),
        (ExceptionGroup("tasks", [ValueError("x"), StoreError("dead", hint="Later.")]), 1),
    ],
)
def test_errors_are_told_with_their_hint_and_exit_code(
    call: Call, seam: Seam, export_file: Path, error: Exception, code: int
) -> None:
    seam.work = fail_with(error)
    said = call("run", export_file, "--quiet")
    told = first_error(error)
    assert isinstance(told, PipelineError)
    assert (said.code, said.out) == (code, "")
    assert said.err.splitlines()[-2:] == [f"error: {told}", f"  {told.hint}"]
    assert seam.closed
    last = call("run", export_file, "--json").objects[-1]
    assert last == {"type": "run_failed", "error": str(told), "hint": told.hint, "exit_code": code}


def test_an_error_of_planning_exits_2_before_anything_happened(call: Call, seam: Seam, export_file: Path) -> None:
    seam.planning_fails = PlanError("the target exists", hint="Choose another name.")
    for verb in ("run", "plan"):
        said = call(verb, export_file)
        assert (said.code, said.out) == (2, "")
        assert said.err == "error: the target exists\n  Choose another name.\n"


def test_something_left_behind_outweighs_every_other_error(call: Call, seam: Seam, export_file: Path) -> None:
    left = LeftBehindError(
        "parts may be left", cause=SourceError("disk gone"), commands=("aws s3 rm a", "aws s3 rm b"), url="s3://a/b"
    )
    hidden = SourceError("disk gone")
    hidden.__cause__ = ExceptionGroup("tasks", [SourceError("disk gone"), left])
    for error in (ExceptionGroup("tasks", [SourceError("disk gone"), left]), hidden):
        seam.work = fail_with(error)
        said = call("run", export_file, "--quiet")
        assert said.code == 4
        assert said.err.splitlines()[-3:] == [
            "error: parts may be left (url=s3://a/b)",
            "  after: disk gone",
            "  Remove it with: aws s3 rm a ; aws s3 rm b",
        ]


def test_a_bug_is_one_line_and_its_traceback(call: Call, seam: Seam, export_file: Path) -> None:
    seam.work = fail_with(ZeroDivisionError("division"))
    said = call("run", export_file, "--quiet")
    assert said.code == 1
    assert "in run_export" in said.err
    assert said.err.endswith("internal error: ZeroDivisionError: division; please report it with the lines above\n")


def test_a_bug_leaves_its_traceback_in_the_log_where_there_is_one(
    call: Call, seam: Seam, export_file: Path, tmp_path: Path
) -> None:
    seam.work = fail_with(ZeroDivisionError("division"))
    log = tmp_path / "run.log"
    said = call("run", export_file, "--quiet", "--log-file", log)
    assert said.err == "internal error: ZeroDivisionError: division; please report it, the log has the details\n"
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["event"] == "internal_error"
    assert "in run_export" in last["traceback"]


def test_the_log_file_of_the_export_file_gets_the_events(
    call: Call, seam: Seam, export_file: Path, tmp_path: Path
) -> None:
    log = tmp_path / "run.log"
    said = call("run", export_file, "--set", f"observe.log_file={log}", "--set", "observe.log_level=debug")
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("progress_sampled") == 12
    assert events[-1] == "run_finished"
    assert "retry_scheduled" not in said.err


def test_the_log_file_of_the_command_line_comes_first(
    call: Call, seam: Seam, export_file: Path, tmp_path: Path
) -> None:
    seam.work = fail_with(StoreError("dead", hint="Later."))
    log = tmp_path / "run.log"
    call("run", export_file, "--log-file", log, "--set", f"observe.log_file={tmp_path / 'other.log'}")
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["event"], last["level"], last["error"], last["exit_code"]) == ("run_failed", "error", "dead", 1)
    assert not (tmp_path / "other.log").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cleans_up_and_exits_130(call: Call, seam: Seam, export_file: Path, number: signal.Signals) -> None:
    cleaned = []

    async def work(events: EventStream) -> None:
        try:
            os.kill(os.getpid(), number)
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                os.kill(os.getpid(), number)  # an impatient person
                for _ in range(10):
                    await anyio.lowlevel.checkpoint()
                cleaned.append(True)

    seam.work = work
    said = call("run", export_file, "--quiet", "--set", "observe.log_level=error")
    assert said.code == 130
    assert said.err.splitlines() == [
        f"{number.name}: stopping and cleaning up",
        f"{number.name}: clean-up is under way, please wait",
        "interrupted: everything that was stored has been removed",
    ]
    assert cleaned == [True]
    assert seam.closed
    last = call("run", export_file, "--json").objects[-1]
    assert (last["type"], last["exit_code"]) == ("run_failed", 130)


def test_a_signal_whose_clean_up_failed_exits_4(call: Call, seam: Seam, export_file: Path) -> None:
    async def work(events: EventStream) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await anyio.sleep_forever()
        except BaseException as error:
            raise LeftBehindError("parts may be left", cause=error, commands=("rm x",)) from error

    seam.work = work
    said = call("run", export_file, "--quiet")
    assert said.code == 4
    assert said.err.splitlines()[-3:] == ["error: parts may be left", "  after: interrupted", "  Remove it with: rm x"]


def test_a_bug_in_the_clean_up_never_claims_that_all_is_removed(call: Call, seam: Seam, export_file: Path) -> None:
    async def work(events: EventStream) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await anyio.sleep_forever()
        finally:
            raise KeyError("x")

    seam.work = work
    said = call("run", export_file, "--quiet")
    assert said.code == 1
    assert "internal error: KeyError: 'x'" in said.err
    assert "has been removed" not in said.err


def test_an_error_beside_an_interruption_is_told_too(call: Call, seam: Seam, export_file: Path) -> None:
    async def work(events: EventStream) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await anyio.sleep_forever()
        finally:
            raise StoreError("reset by peer")

    seam.work = work
    said = call("run", export_file, "--quiet")
    assert said.code == 130
    assert "error: reset by peer" in said.err
    assert said.err.endswith("interrupted: everything that was stored has been removed\n")


def test_a_signal_that_comes_too_late_changes_nothing(call: Call, seam: Seam, export_file: Path) -> None:
    async def work(events: EventStream) -> None:
        with anyio.CancelScope(shield=True):  # publishing
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(10):
                await anyio.lowlevel.checkpoint()

    seam.work = work
    assert call("run", export_file, "--quiet").out == SUMMARY


def test_an_ignored_signal_stays_ignored(call: Call, seam: Seam, export_file: Path) -> None:
    async def work(events: EventStream) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()

    seam.work = work
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert call("run", export_file, "--quiet").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_plan_prints_every_number_and_sends_nothing(call: Call, seam: Seam, export_file: Path) -> None:
    seam.work = fail_with(AssertionError("plan must not run"))
    said = call("plan", export_file)
    assert (said.code, said.err) == (0, "")
    assert said.out == (
        f"disk     20 GiB\nto read  6 GiB\nNothing was sent. The next step: pipeline run {export_file}\n"
    )
    assert seam.closed


def test_plan_as_json_has_the_bytes(call: Call, seam: Seam, export_file: Path) -> None:
    [told] = call("plan", export_file, "--json").objects
    assert told["type"] == "plan"
    assert told["disk_bytes"] == 21474836480
    assert told["summary"] == {"disk": "20 GiB", "to read": "6 GiB"}


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_wrong_file_touches_nothing(call: Call, seam: Seam, export_file: Path, verb: str) -> None:
    said = call(verb, export_file, "--set", "export.memory=1")
    assert said.code == 2
    assert seam.planned == []


def test_what_was_written_to_a_disk_while_it_was_copied_is_told() -> None:
    told = {"achieved": "live", "changing": ["/", "/srv"], "written_bytes": 3 << 20}
    (line,) = change_lines({"consistency": told})
    assert "3 MiB were written to the disk while it was copied (/, /srv)" in line
    for still in ({**told, "achieved": "frozen"}, {**told, "written_bytes": 0}, {**told, "written_bytes": None}):
        assert change_lines({"consistency": still}) == []
    assert change_lines({}) == []
