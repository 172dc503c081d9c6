"""The metrics file: what node exporter reads of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.events import (
    Event,
    FallbackTaken,
    ImageSealed,
    ImageVerified,
    ProgressSampled,
    RetryScheduled,
    RunFailed,
    RunFinished,
    RunPlanned,
    RunStarted,
    VerifyProgressed,
)
from pipeline.observe.prometheus import PHASES, PrometheusFile
from pipeline.units import GiB, MiB

PLANNED = RunPlanned(
    name="web01",
    chain=("read.disk", "write.s3"),
    disk_bytes=20 * GiB,
    mapped_bytes=6 * GiB,
    image_bytes_max=21 * GiB,
    window_bytes=2 * MiB,
    memory_bytes=96 * MiB,
    target="s3://a/b",
)
STARTED = RunStarted(name="web01")
RETRY = RetryScheduled(stage="write.s3", operation="put_part", attempt=2, wait_s=1.0, reason="503")
SEALED = ImageSealed(uri="s3://a/b", size_bytes=5 * GiB)
FINISHED = RunFinished(
    name="web01",
    uri="s3://a/b",
    verified="identical",
    disk_bytes=20 * GiB,
    read_bytes=6 * GiB,
    stored_bytes=5 * GiB,
    elapsed_s=90.0,
    bottleneck="",
    manifest_path="",
)


def sampled(seconds: float) -> ProgressSampled:
    return ProgressSampled(
        elapsed_s=seconds,
        disk_bytes=20 * GiB,
        read_bytes=3 * GiB,
        skipped_bytes=GiB,
        acked_bytes=2 * GiB,
        stored_bytes=GiB,
        waits={"read.disk": (1.5, 0.0, 0.0, 0.25), "write.s3": (9.0, 1.0, 0.0, 0.0)},
    )


class Metrics:
    """A file, what it complains, and a clock that stands still until it is moved."""

    def __init__(self, path: Path, export: str = "web01") -> None:
        self.path = path
        self.told: list[Event] = []
        self.now = 100.0
        self.follow = PrometheusFile(
            path, export, self.told.append, clock=lambda: self.now, wall=lambda: 1_800_000_000.5
        )

    def see(self, *events: Event) -> None:
        for event in events:
            self.follow(event)

    @property
    def values(self) -> dict[tuple[str, ...], float]:
        """By name and label values, `export` left out."""
        return {
            (one.name, *(value for key, value in sorted(one.labels.items()) if key != "export")): one.value
            for family in text_string_to_metric_families(self.path.read_text())
            for one in family.samples
        }


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    return Metrics(tmp_path / "web01.prom")


def test_a_whole_run_is_what_the_parser_of_prometheus_reads(metrics: Metrics) -> None:
    verified = ImageVerified(stage="verify.readback", state="identical", coverage=1.0, detail="")
    progress = VerifyProgressed(stage="verify.readback", done_bytes=5 * GiB, total_bytes=20 * GiB)
    metrics.see(PLANNED, STARTED, RETRY, RETRY, sampled(10.0), SEALED, progress, verified, FINISHED)
    values = metrics.values
    assert values["disk_pipeline_disk_bytes",] == 20 * GiB
    assert values["disk_pipeline_acknowledged_bytes_total",] == 2 * GiB
    assert values["disk_pipeline_stored_bytes_total",] == GiB
    assert values["disk_pipeline_stage_seconds_total", "read.disk", "waiting_buffer"] == 0.25
    assert values["disk_pipeline_stage_seconds_total", "write.s3", "working"] == 9.0
    assert values["disk_pipeline_retries_total", "put_part", "write.s3"] == 2
    assert values["disk_pipeline_verified", "verify.readback"] == 1
    assert values["disk_pipeline_verify_done_bytes", "verify.readback"] == 5 * GiB
    assert values["disk_pipeline_image_bytes",] == 5 * GiB
    assert values["disk_pipeline_exit_code",] == 0
    assert values["disk_pipeline_end_timestamp_seconds",] == 1_800_000_000.5
    assert {phase: values["disk_pipeline_phase", phase] for phase in PHASES} == {
        **dict.fromkeys(PHASES, 0),
        "finished": 1,
    }


def test_every_family_has_help_and_type_once_and_ends_in_its_unit(metrics: Metrics) -> None:
    metrics.see(PLANNED, STARTED, sampled(1.0), FINISHED)
    lines = metrics.path.read_text().splitlines()
    helps = [line.split()[2] for line in lines if line.startswith("# HELP")]
    types = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    assert helps == list(types)
    for name, kind in types.items():
        assert name.endswith("_total") == (kind == "counter"), name
        unitless = ("phase", "exit_code", "retries_total", "verified")
        assert "_bytes" in name or "_seconds" in name or name.endswith(unitless), name
    assert all('export="web01"' in line for line in lines if not line.startswith("#"))


def test_the_file_is_written_once_a_second_and_at_each_phase(metrics: Metrics) -> None:
    def elapsed() -> float:
        return metrics.values["disk_pipeline_elapsed_seconds",]

    metrics.see(PLANNED, STARTED)
    metrics.now += 0.9
    metrics.see(sampled(0.9))
    assert ("disk_pipeline_elapsed_seconds",) not in metrics.values, "too early"
    metrics.now += 0.1
    metrics.see(sampled(1.0))
    assert elapsed() == 1.0
    metrics.now += 0.5
    metrics.see(sampled(1.5))
    assert elapsed() == 1.0
    metrics.see(SEALED)
    assert elapsed() == 1.5
    metrics.see(FINISHED)
    assert metrics.values["disk_pipeline_phase", "finished"] == 1


@pytest.mark.parametrize(
    "event, phase, code",
    [
        (RunFailed(error="dead", hint="", exit_code=4), "failed", 4),
        (FINISHED, "finished", 0),
    ],
)
def test_the_end_is_told_with_its_exit_code(metrics: Metrics, event: Event, phase: str, code: int) -> None:
    metrics.see(PLANNED, STARTED, sampled(1.0), event)
    assert metrics.values["disk_pipeline_phase", phase] == 1
    assert metrics.values["disk_pipeline_exit_code",] == code


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "line\nend", "umlaut ü", "{curly}"])
def test_a_name_of_any_kind_stays_one_label(tmp_path: Path, name: str) -> None:
    metrics = Metrics(tmp_path / "x.prom", name)
    metrics.see(PLANNED)
    families = text_string_to_metric_families(metrics.path.read_text())
    assert {one.labels["export"] for family in families for one in family.samples} == {name}


def left(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir())


def test_readers_find_a_whole_file_and_nothing_beside_it(metrics: Metrics) -> None:
    metrics.see(PLANNED)
    before = metrics.path.read_text()
    with metrics.path.open() as reader:
        metrics.see(STARTED, sampled(1.0), FINISHED)
        assert reader.read() == before, "the old file, whole"
    assert list(left(metrics.path.parent)) == ["web01.prom"]


def test_a_file_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    metrics = Metrics(folder / "x.prom")
    for _ in range(3):
        metrics.now += 5
        metrics.see(PLANNED, STARTED, sampled(1.0))
    [told] = metrics.told
    assert isinstance(told, FallbackTaken)
    assert (told.what, told.reason) == (f"no more metrics in {folder}/x.prom", "no such file or directory")
