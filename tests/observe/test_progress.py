"""What a person sees of a run."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipeline.events import (
    Event,
    FallbackTaken,
    ImageSealed,
    ImageVerified,
    LeftoverFound,
    MapProgressed,
    PartStored,
    RetryScheduled,
    RunPlanned,
    RunResumed,
    VerifyProgressed,
)
from pipeline.flow.items import Verdict
from pipeline.observe.progress import (
    LineDisplay,
    LiveDisplay,
    Track,
    make_display,
    summary_lines,
    verified_line,
)
from pipeline.units import GiB, MiB
from tests.commands.conftest import FakeOutcome, sample

PLANNED = RunPlanned(
    name="web01",
    chain=("read.disk", "encode.raw", "write.file"),
    disk_bytes=20 * GiB,
    mapped_bytes=6 * GiB,
    image_bytes_max=21 * GiB,
    window_bytes=2 * MiB,
    memory_bytes=96 * MiB,
    target="s3://images/[web01].qcow2",
)
RETRY = RetryScheduled(stage="write.s3", operation="put_part", attempt=2, wait_s=1.6, reason="503 SlowDown")


class Terminal(io.StringIO):
    """A terminal that keeps what was written to it."""

    def isatty(self) -> bool:
        return True


def lines(events: Iterable[Event]) -> list[str]:
    written: list[str] = []
    display = LineDisplay(written.append)
    for event in events:
        display(event)
    display.close()
    return written


def test_lines_come_every_five_seconds_and_with_each_phase() -> None:
    samples = [sample(number / 4, number * 256 * MiB) for number in range(49)]
    written = lines(
        [
            PLANNED,
            *samples,
            RETRY,
            sample(15, 13 * GiB),
            PartStored(stage="write.s3", number=1, length_bytes=1, guest_bytes=1, attempts=1, elapsed_s=1),
            FallbackTaken(stage="read.disk", what="reading without O_DIRECT", reason="not supported here"),
            ImageSealed(uri="s3://a/b", size_bytes=5 * GiB),
        ]
    )
    assert written == [
        "20 GiB disk, 6 GiB of it to read -> s3://images/[web01].qcow2",
        " 25.0%  5 GiB of 20 GiB, 1 GiB/s, 15.0 s left; read 2.50 GiB, skipped 2.50 GiB, sent 1.25 GiB",
        " 50.0%  10 GiB of 20 GiB, 1 GiB/s, 10.0 s left; read 5 GiB, skipped 5 GiB, sent 2.50 GiB",
        " 65.0%  13 GiB of 20 GiB, 819.2 MiB/s, 8.8 s left; read 6.50 GiB, skipped 6.50 GiB, sent 3.25 GiB, "
        "1 retry, last: write.s3 put_part: 503 SlowDown",
        "read.disk: reading without O_DIRECT (not supported here)",
        "sealed: 5 GiB at s3://a/b",
    ]


def test_a_verification_is_a_line_at_each_quarter() -> None:
    written = lines(
        [
            *(VerifyProgressed(stage="verify.readback", done_bytes=done, total_bytes=100) for done in range(101)),
            ImageVerified(stage="verify.readback", state="identical", coverage=1.0, detail=""),
        ]
    )
    assert [line.split()[-1] for line in written] == ["0.0%", "25.0%", "50.0%", "75.0%", "100.0%", "identical"]


def test_the_map_pass_before_the_run_is_a_line_at_each_quarter() -> None:
    written = lines([*(MapProgressed(done_bytes=done, total_bytes=8) for done in range(9)), PLANNED])
    assert written[:5] == [f"map of the disk: {share:5.1f}%" for share in (0, 25, 50, 75, 100)]


def test_the_map_pass_has_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    display = LiveDisplay(terminal)
    for event in (MapProgressed(done_bytes=5 * GiB, total_bytes=20 * GiB), PLANNED, sample(0, 0)):
        display(event)
    display.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "map of the disk" in shown
    assert "25.0% 5 GiB of 20 GiB" in shown


def test_the_rate_is_that_of_the_last_ten_seconds() -> None:
    track = Track()
    for second in range(100):
        track.follow(sample(second, min(second, 50) * MiB))
    assert track.rate == 0
    assert track.left == ""
    track.follow(sample(100, 60 * MiB))
    assert track.rate == MiB


def test_a_display_without_samples_says_nothing_wrong() -> None:
    track = Track()
    assert (track.rate, track.left, track.details) == (0.0, "", "")


def test_an_empty_disk_does_not_divide_by_zero() -> None:
    assert lines([VerifyProgressed(stage="verify.readback", done_bytes=0, total_bytes=0)]) == [
        "verify.readback: 100.0%"
    ]


def test_a_terminal_gets_a_bar_and_anything_else_gets_lines() -> None:
    assert isinstance(make_display(Terminal(), {"TERM": "xterm"}), LiveDisplay)
    assert isinstance(make_display(Terminal(), {"TERM": "dumb"}), LineDisplay)
    assert isinstance(make_display(Terminal(), {"TERM": "xterm", "CI": "true"}), LineDisplay)
    assert isinstance(make_display(io.StringIO(), {"TERM": "xterm"}), LineDisplay)


def test_the_bar_shows_acknowledged_bytes_and_both_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    display = LiveDisplay(terminal)
    before = sys.stderr
    for event in (
        PLANNED,
        sample(0, 0),
        sample(10, 5 * GiB),
        RETRY,
        ImageSealed(uri="s3://a/[b]", size_bytes=5 * GiB),
        VerifyProgressed(stage="verify.readback", done_bytes=GiB, total_bytes=20 * GiB),
        VerifyProgressed(stage="verify.readback", done_bytes=10 * GiB, total_bytes=20 * GiB),
    ):
        display(event)
    display.close()
    display.close()
    assert sys.stderr is before
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    last = shown.replace("\r", "\n").split("export")[-1]
    assert "20 GiB disk, 6 GiB of it to read -> s3://images/[web01].qcow2" in shown
    assert "sealed: 5 GiB at s3://a/[b]" in shown
    assert "25.0% 5 GiB of 20 GiB  512 MiB/s 30.0 s left" in last
    assert "50.0% 10 GiB of 20 GiB" in last
    assert "read 2.50 GiB, skipped 2.50 GiB, sent 1.25 GiB, 1 retry, last: write.s3 put_part: 503 SlowDown" in last


def test_a_bar_that_never_started_can_be_put_away() -> None:
    LiveDisplay(Terminal()).close()


def test_nobody_looking_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as unwritable:
        monkeypatch.setattr("sys.stderr", unwritable)
        LineDisplay()(PLANNED)


def test_the_first_line_claims_no_more_than_was_compared() -> None:
    def line(state: str, *verdicts: Verdict) -> str:
        return verified_line(FakeOutcome(state=state, verdicts=verdicts))

    receipt = Verdict("receipt", "unproven", 0.0, detail="the store keeps no checksum")
    sampled = Verdict("sample", "identical", 0.031)
    assert line("stored") == "stored, not verified"
    assert line("unproven", receipt) == "unproven: the store keeps no checksum"
    assert line("unproven", Verdict("receipt", "unproven", 0.0)) == "unproven: there was nothing to compare with"
    assert line("identical", receipt, Verdict("readback", "identical", 1.0)) == "verified: identical"
    assert line("identical", receipt, sampled) == (
        "verified: identical, as far as 3.1% of the disk that was compared tells"
    )
    proven = Verdict("prove", "proven", 0.0, detail="proven by structure (not tried: boot)")
    assert line("proven", proven) == "proven by structure (not tried: boot); not compared with the disk"
    assert line("identical", Verdict("readback", "identical", 1.0), proven) == (
        "verified: identical; proven by structure (not tried: boot)"
    )
    assert line("unproven", receipt, proven) == (
        "unproven: the store keeps no checksum (but proven by structure (not tried: boot))"
    )
    unknown = Verdict("prove", "unknown", 0.0, detail="boot: there is no qemu")
    assert line("unproven", receipt, sampled, unknown) == (
        "unproven: boot: there is no qemu (but identical, as far as 3.1% of the disk that was compared tells)"
    )


def test_the_summary_has_exact_sizes() -> None:
    written = summary_lines(FakeOutcome())
    assert "  size      5.00 GiB (5368709121 bytes)" in written
    assert "  time      1 min 40 s, 204.8 MiB/s of disk" in written


def test_the_rate_of_a_resumed_run_leaves_out_what_was_done_before() -> None:
    outcome = FakeOutcome(earlier_disk_bytes=15 * GiB, earlier_read_bytes=4 * GiB, earlier_stored_bytes=3 * GiB)
    written = summary_lines(outcome)
    assert "  read      6 GiB (6442450944 bytes), 4 GiB of it before" in written
    assert "  sent      5.00 GiB (5368709121 bytes), 3 GiB of it before" in written
    assert "  time      1 min 40 s, 51.2 MiB/s of disk, 15 GiB of which were done before" in written


@pytest.mark.parametrize(
    "guest_bytes, compared_bytes, told",
    [
        (24 * MiB, 8 * MiB, "goes on at 24 MiB of the disk; 21 MiB of the image are stored already, 8 MiB of the disk"),
        (0, 0, "reads the disk again; 21 MiB of the image are stored already"),
    ],
)
def test_a_resumed_run_says_in_one_line_where_it_goes_on(guest_bytes: int, compared_bytes: int, told: str) -> None:
    event = RunResumed(guest_bytes=guest_bytes, image_bytes=21 * MiB, parts=4, compared_bytes=compared_bytes)
    (line,) = lines([event])
    assert line == f"resumed: {told}" + (" compared" if compared_bytes else "")


def test_what_another_run_left_is_told_with_its_command() -> None:
    event = LeftoverFound(
        uri="s3://images/a", age_s=7200, size_bytes=None, remove="pipeline uploads abort s3://images/a"
    )
    assert lines([event]) == [
        "left by another run: s3://images/a, 2 h 00 min old. If that run is over, remove it: "
        "pipeline uploads abort s3://images/a"
    ]


def test_the_summary_names_a_manifest_once_where_both_copies_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.manifest.json"
    for uri in (str(path), f"file://{path}"):
        assert f"  manifest  {uri}" in summary_lines(FakeOutcome(manifest_uri=uri, manifest_path=path))
    nowhere = FakeOutcome(manifest_uri="", manifest_path=None)
    assert "  manifest  could not be written" in summary_lines(nowhere)
    unwanted = FakeOutcome(manifest_uri="", manifest_path=None, keeps_manifest=False)
    assert "  manifest  none is kept" in summary_lines(unwanted)
