"""How a run went over time: little, even, and nothing lost at the ends."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.errors import FormatError
from pipeline.events import EventStream, FallbackTaken, PartReplayed, ProgressSampled, RetryScheduled
from pipeline.flow.manifest import Manifest
from pipeline.flow.meter import StageMeter
from pipeline.flow.series import MARKS_MAX, SAMPLES_MAX, Series, SeriesRecorder
from pipeline.units import MiB
from tests.chains import export, write_toml
from tests.disks.letters import write_disk

RETRY = RetryScheduled(stage="write.s3", operation="put_part", attempt=2, wait_s=1.0, reason="503 SlowDown")


def sampled(number: int) -> ProgressSampled:
    """The state after `number` quarters of a second."""
    return ProgressSampled(
        elapsed_s=number / 4,
        disk_bytes=MiB << 20,
        read_bytes=number * 4 * MiB,
        skipped_bytes=0,
        acked_bytes=number * 3 * MiB,
        stored_bytes=number * MiB,
        waits={"read.disk": (number / 8, 0.0, 0.0, number / 4)},
    )


def test_a_fallback_that_planning_took_is_on_record() -> None:
    events, recorder = EventStream(), SeriesRecorder()
    events.emit(FallbackTaken(stage="read.disk", what="reading without O_DIRECT", reason="not supported here"))
    events.emit(sampled(1))
    events.subscribe(recorder, with_fallbacks=True)
    events.emit(sampled(2))
    series = recorder.series()
    assert [(mark.stage, mark.kind) for mark in series.marks] == [("read.disk", "fallback")]
    assert len(series.elapsed_s) == 1


@pytest.mark.parametrize("count", [1, 2, 299, 300, 301, 599, 600, 12_345])
def test_never_more_than_the_limit_and_the_last_sample_is_always_there(count: int) -> None:
    recorder = SeriesRecorder()
    for number in range(1, count + 1):
        recorder(sampled(number))
        assert len(recorder.series().elapsed_s) <= SAMPLES_MAX
    series = recorder.series([StageMeter("read.disk", parallelism=4)])
    assert len(series.elapsed_s) >= min(count, SAMPLES_MAX // 2)
    assert (series.elapsed_s[-1], series.acked_bytes[-1]) == (count / 4, count * 3 * MiB)
    assert series.parallel == {"read.disk": 4}
    gaps = {after - before for before, after in pairwise(series.elapsed_s[:-1])}
    assert len(gaps) <= 1, "evenly over the run"


def test_it_is_the_same_after_the_manifest() -> None:
    recorder = SeriesRecorder()
    recorder(FallbackTaken(stage="read.disk", what="buffered reads", reason="no O_DIRECT"))
    for number in range(1, 6):
        recorder(sampled(number))
    recorder(RETRY)
    recorder(PartReplayed(stage="write.s3", number=7, from_bytes=0, to_bytes=1))
    recorder(sampled(6))
    series = recorder.series()
    assert Series.from_json(series.to_json()) == series
    assert [mark.kind for mark in series.marks] == ["fallback", "retry", "replay"]
    assert [mark.elapsed_s for mark in series.marks] == [0.0, 1.25, 1.25]
    assert series.retries[-2:] == (0, 1)


def test_a_network_that_fails_for_hours_does_not_fill_the_manifest() -> None:
    recorder = SeriesRecorder()
    recorder(sampled(1))
    for _ in range(10 * MARKS_MAX):
        recorder(RETRY)
    recorder(sampled(2))
    series = recorder.series()
    assert len(series.marks) == MARKS_MAX
    assert series.retries[-1] == 10 * MARKS_MAX


def test_a_manifest_without_a_series_has_an_empty_one() -> None:
    assert Series.from_json({}) == Series()


@pytest.mark.parametrize(
    "damage",
    [
        {"elapsed_s": "1 2"},
        {"elapsed_s": "a b c"},
        {"elapsed_s": "3 2 1"},
        {"elapsed_s": "1 2 nan"},
        {"elapsed_s": 7},
        {"stages": []},
        {"stages": {"x": {"working": "1 2 3"}}},
        {"stages": {"x": {"parallel": 1, "working": "1", "in": "1", "out": "1", "buffer": "1"}}},
        {"marks": [{"text": "x"}]},
    ],
)
def test_a_damaged_series_is_a_format_error(damage: dict[str, object]) -> None:
    recorder = SeriesRecorder()
    for number in (1, 2, 3):
        recorder(sampled(number))
    with pytest.raises(FormatError):
        Series.from_json({**recorder.series().to_json(), **damage})


async def test_every_run_leaves_its_series_in_the_manifest(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk.raw", "AB0-A")
    toml = write_toml(
        tmp_path / "x.toml",
        f'read.disk; path = "{tmp_path / "disk.raw"}"',
        "encode.raw",
        f'write.file; path = "{tmp_path / "out.raw"}"',
    )
    outcome = await export(toml)
    text = (tmp_path / "out.raw.manifest.json").read_bytes()
    series = Series.from_json(Manifest.from_json(text, where="x").series)
    assert series.acked_bytes[-1] == outcome.disk_size == 5 * MiB
    assert series.read_bytes[-1] == outcome.read_bytes
    assert list(series.stages) == ["read.disk", "encode.raw", "write.file"]
    assert series.parallel["read.disk"] > 1
