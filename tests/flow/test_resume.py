"""What a run's journal remembers, with any store and any format."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import PlanError, SourceError, StageError, StoreError, VerificationError
from pipeline.events import Event, FallbackTaken
from pipeline.flow import resume
from pipeline.flow.items import Block, Content, Run, Why
from pipeline.flow.journal import parse
from pipeline.flow.mapping import MapRecorder
from pipeline.flow.resume import RunJournal, other_disk
from pipeline.flow.stage import KeptPart, RealClock, Start
from stages.checksum.leaves import LEAF, LeafDigests

HEADER = {"source": {"kind": "file"}, "layout": {"head_length": 100}}


class States:
    """An encoder with nothing but a state."""

    def checkpoint(self) -> bytes:
        return b"state"


def opened(path: Path, events: list[Event] | None = None, *, keep: bool = True) -> RunJournal:
    emit = events.append if events is not None else lambda event: None
    return RunJournal.open(path, emit=emit, clock=RealClock(), keep=keep)


def part(number: int, start: int, length: int = 50) -> KeptPart:
    return KeptPart(number=number, start=start, length=length, guest_bytes=length, tag=f"tag {number}")


def seen(recorder: MapRecorder, *runs: tuple[int, Why]) -> None:
    offset = recorder_end(recorder)
    for length, why in runs:
        content = Content.DATA if why is Why.READ else Content.ZERO
        recorder.observe(Block(offset, length, None, (Run(offset, length, content, why),)))
        offset += length


def recorder_end(recorder: MapRecorder) -> int:
    return sum(run.length for run in recorder.runs())


def take(journal: RunJournal, guest_offset: int, position: int, recorder: MapRecorder) -> None:
    start = Start(position=position, guest_offset=guest_offset, guest_bytes=guest_offset)
    journal.take_point(States(), start, [recorder])  # type: ignore[arg-type]  # all that a point needs


def test_journal_is_told_to_be_unfinished_by_looking_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    assert not resume.is_unfinished(path)
    path.write_bytes(b"precious")
    assert not resume.is_unfinished(path)
    path.unlink()
    journal = opened(path)
    journal.begin(HEADER)
    assert not resume.is_unfinished(path), "nothing is in the store yet"
    journal.note_upload({"upload_id": "1"})
    assert resume.is_unfinished(path), "also while it is open"
    journal.note_published("s3://b/k")
    assert not resume.is_unfinished(path)
    journal.close()


@pytest.fixture(autouse=True)
def _every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "POINT_EVERY_S", 0.0)
    monkeypatch.setattr(resume, "POINT_SHARE", 0)


def test_low_water_is_the_end_of_the_parts_without_a_gap(tmp_path: Path) -> None:
    journal = opened(tmp_path / "a.journal")
    journal.begin(HEADER)
    assert journal.low_water == 100
    journal.note_part(part(3, 150))
    journal.note_part(part(1, 0, 100))  # the head, which comes last
    assert journal.low_water == 100
    journal.note_part(part(2, 100))
    assert journal.low_water == 200
    journal.drop_parts([2])
    assert journal.low_water == 100


def test_journal_read_again_is_what_was_noted(tmp_path: Path) -> None:
    journal = opened(tmp_path / "a.journal")
    journal.begin(HEADER)
    journal.note_upload({"id": "one"})
    journal.note_part(part(2, 100))
    journal.note_part(part(3, 150))
    journal.drop_parts([3])
    recorder = MapRecorder()
    seen(recorder, (4096, Why.READ))
    take(journal, 4096, 140, recorder)
    journal.close()
    again = opened(tmp_path / "a.journal")
    assert (again.id, again.upload, again.parts) == (journal.id, {"id": "one"}, {2: part(2, 100)})
    assert again.is_unfinished
    assert [point.start for point in again.usable_points(150)] == [
        Start(position=140, guest_offset=4096, guest_bytes=4096)
    ]
    assert again.usable_points(139) == []
    again.close()


def test_point_without_its_observations_is_not_used(tmp_path: Path) -> None:
    """A power loss may take the end of the one file and not of the other."""
    journal = opened(tmp_path / "a.journal")
    journal.begin(HEADER)
    journal.note_upload({"id": "one"})
    recorder = MapRecorder()
    for index in range(1, 4):
        seen(recorder, (4096, Why.READ))
        take(journal, 4096 * index, 100 + index, recorder)
    journal.close()
    leaves = journal.leaves_path
    whole = leaves.read_bytes()
    records, _ = parse(whole)
    for length in range(len(whole) + 1):
        leaves.write_bytes(whole[:length])
        again = opened(tmp_path / "a.journal")
        known = max(0, len(parse(whole[:length])[0]) - 1)
        assert [point.guest_offset for point in again.usable_points(1000)] == [
            4096 * index for index in range(known, 0, -1)
        ], length
        again.close()
        leaves.write_bytes(whole)
    assert len(records) == 4


def test_journal_does_not_grow_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SLACK", 10_000)
    journal = opened(tmp_path / "a.journal")
    journal.begin(HEADER)
    journal.note_upload({"id": "one"})
    recorder = MapRecorder()
    largest = 0
    for index in range(1, 2000):
        seen(recorder, (4096, Why.READ))
        take(journal, 4096 * index, 100 + index, recorder)
        journal.note_mark(100 + index)
        largest = max(largest, journal.path.stat().st_size)
    assert largest < 20_000
    journal.close()
    again = opened(tmp_path / "a.journal")
    assert again.mark == 2099
    assert again.usable_points(again.mark)[0].guest_offset == 4096 * 1999
    again.close()


def test_journal_cut_in_its_header_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = opened(path)
    journal.begin(HEADER)
    journal.note_upload({"id": "one"})
    journal.close()
    data = path.read_bytes()
    path.write_bytes(data[:40])
    again = opened(path)
    assert (again.header, again.is_unfinished) == ({}, False)
    again.close()


def test_journal_cut_at_any_byte_is_a_state_that_was(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = opened(path)
    journal.begin(HEADER)
    states: list[tuple[int, dict[str, str], int]] = [(0, {}, 0)]
    journal.note_upload({"id": "one"})
    states.append((0, {"id": "one"}, 0))
    for number in range(2, 6):
        journal.note_part(part(number, 50 * number))
        states.append((number - 1, {"id": "one"}, 0))
    journal.note_mark(77)
    states.append((4, {"id": "one"}, 77))
    journal.close()
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        again = opened(path)
        assert (len(again.parts), again.upload, again.mark) in states, length
        again._log.close()
    assert (len(again.parts), again.upload, again.mark) == states[-1]


def test_empty_journal_goes_when_it_is_closed(tmp_path: Path) -> None:
    journal = opened(tmp_path / "a.journal")
    journal.begin(HEADER)
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_journal_that_cant_be_written_any_more_says_so_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    journal = opened(tmp_path / "a.journal", events)
    journal.begin(HEADER)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.flow.journal.os.write", full)
        journal.note_part(part(2, 100))
        journal.note_part(part(3, 150))
    [told] = events
    assert isinstance(told, FallbackTaken)
    assert told.reason == "No space left on device"
    journal.remove()


@pytest.mark.parametrize(
    "error, kept",
    [
        (StoreError("gone"), True),
        (SourceError("i/o error"), True),
        (KeyboardInterrupt(), True),
        (VerificationError("differs"), False),
        (StageError("a defect"), False),
        (TypeError("a defect"), False),
        (ExceptionGroup("", [StageError("a defect")]), False),
    ],
)
def test_only_what_may_end_better_next_time_is_kept(tmp_path: Path, error: BaseException, kept: bool) -> None:
    journal = opened(tmp_path / "a.journal")
    journal.begin(HEADER)
    assert not journal.keeps(error), "nothing was stored"
    journal.note_part(part(2, 100))
    assert journal.keeps(error) is kept
    journal.remove()
    aborting = opened(tmp_path / "b.journal", keep=False)
    aborting.begin(HEADER)
    aborting.note_part(part(2, 100))
    assert not aborting.keeps(error)
    aborting.remove()


def test_journal_in_a_folder_that_cant_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PlanError, match="journal can't be written"):
        opened(tmp_path / "file" / "a.journal")


def test_map_recalled_delta_by_delta_is_the_map(tmp_path: Path) -> None:
    runs = [(10, Why.READ), (5, Why.READ), (7, Why.HOLE), (1, Why.HOLE), (3, Why.SCANNED), (2, Why.READ), (9, Why.READ)]
    for cuts in range(1 << len(runs)):
        recorder, again = MapRecorder(), MapRecorder()
        for index, run in enumerate(runs):
            seen(recorder, run)
            if cuts >> index & 1:
                again.recall(recorder.delta())
        again.recall(recorder.delta())
        assert list(again.runs()) == list(recorder.runs())
        assert again.totals == recorder.totals


def test_leaves_loaded_from_any_dump_are_the_leaves(tmp_path: Path) -> None:
    leaves = LeafDigests("xxh3-128", 12 * LEAF + 5)
    for index, kind in enumerate("D00DDD0000D0"):
        leaves.add(bytes([index + 1]) * 16) if kind == "D" else leaves.add_zeros(1)
    leaves.add(b"t" * 16)
    for first in range(13):
        again = LeafDigests("xxh3-128", 12 * LEAF + 5)
        cut = LeafDigests("xxh3-128", 12 * LEAF + 5)
        cut.load(leaves.dump(0))
        assert cut.root() == leaves.root()
        for index in range(first):
            digest = leaves.leaf(index)
            again.add(digest)
        again.load(leaves.dump(first))
        assert again.root() == leaves.root(), first


def test_disk_of_another_serial_or_size_is_another_disk() -> None:
    before = {"kind": "block device", "size": "1000", "serial": "S1", "device": "8:0", "path": "/dev/sda"}
    assert other_disk(before, {**before, "device": "8:16", "path": "/dev/sdb"}) is None
    assert other_disk(before, {**before, "serial": "S2"}) == ("serial", "S1", "S2")
    assert other_disk(before, {**before, "size": "2000"}) == ("size", "1000", "2000")


def test_point_inside_a_part_needs_what_the_part_holds_to_be_compared(tmp_path: Path) -> None:
    journal = opened(tmp_path / "a.journal")
    journal.begin(HEADER)
    journal.note_upload({"id": "one"})
    recorder = MapRecorder()
    for guest_offset, position in ((4096, 120), (8192, 150), (12288, 180), (16384, 230)):
        seen(recorder, (4096, Why.READ))
        take(journal, guest_offset, position, recorder)
    journal.note_part(part(2, 100))
    journal.note_part(part(3, 150))
    journal.note_part(part(4, 200))
    journal.close()
    again = opened(tmp_path / "a.journal")
    until = {point.position: again.compared_until(point, 20_000) for point in again.usable_points(1000)}
    assert until == {120: 8192, 150: 8192, 180: 16384, 230: None}
    assert {point.position: again.compared_until(point, 16384) for point in again.usable_points(1000)}[230] == 16384
    again._drop_points()
    assert [point.position for point in again.points] == [180, 230]
    again.close()


class Checked:
    """A check that has taken in the image up to `covered`."""

    def __init__(self, covered: int = 0) -> None:
        self.covered = self._told = covered

    def delta(self) -> bytes:
        found = b"digests" if self.covered > self._told else b""
        self._told = self.covered
        return found

    def recall(self, delta: bytes) -> None:
        raise AssertionError("nothing is recalled here")


class Compressed(States):
    """A compressor with nothing but a place and a state."""

    position = 300


def test_what_a_check_took_in_is_noted_with_the_windows_behind_the_last_block(tmp_path: Path) -> None:
    """All blocks of a small disk are read long before their windows are stored."""
    journal, recorder, check = opened(tmp_path / "a.journal"), MapRecorder(), Checked()
    journal.begin(HEADER)
    journal.note_upload({})
    last = Start(position=200, guest_offset=2 * LEAF, guest_bytes=2 * LEAF)
    journal.take_point(States(), last, [recorder], checks=[check], is_end=True, is_inner=True)  # type: ignore[arg-type]
    check.covered = 400
    journal.take_outer_point(Compressed(), 256, 2 * LEAF, [check])  # type: ignore[arg-type]  # all that it needs
    journal.note_upload({"id": "kept"})
    journal.close()
    again = opened(tmp_path / "a.journal")
    assert again.checked_from(300) == 400
