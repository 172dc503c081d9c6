"""Keep a run's metrics in a file for node exporter's textfile collector.

Source: Prometheus documentation, "Exposition formats", text-based format; naming as in "Metric and label naming".
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from pipeline.errors import EXIT_FAILED, EXIT_OK
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
from pipeline.observe.whole_files import replace_file

# Collectors look every 15 s or more seldom; a write a second is enough to be up to date for each of them.
WRITE_EVERY_S = 1.0

PHASES = ("planned", "transferring", "verifying", "finished", "failed")
WAITS = ("working", "waiting_input", "waiting_output", "waiting_buffer")

Labels = Mapping[str, str]


class PrometheusFile:
    """A subscriber that rewrites the file at most every second, and at every change of phase.

    Args:
        emit: takes one FallbackTaken when the file can't be written; that ends the metrics, never the run.
        clock: monotonic seconds. wall: seconds since 1970.
    """

    def __init__(
        self,
        path: Path,
        export: str,
        emit: Callable[[Event], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._export = export
        self._emit = emit
        self._clock = clock
        self._wall = wall
        self._next_s = 0.0
        self._broken = False
        self._phase = ""
        self._began = 0.0
        self._ended = 0.0
        self._disk_bytes = 0
        self._image_bytes = 0
        self._exit_code: int | None = None
        self._sample: ProgressSampled | None = None
        self._retries: Counter[tuple[str, str]] = Counter()
        self._verified: dict[str, tuple[int, int]] = {}
        self._verdicts: dict[str, bool] = {}

    def __call__(self, event: Event) -> None:
        """Take note of an event; write where it is time."""
        phase = self._follow(event)
        if phase and phase != self._phase:
            self._phase = phase
            self._write()
        elif self._phase and self._clock() >= self._next_s:
            self._write()

    def _follow(self, event: Event) -> str:
        """Note what an event tells; the phase that it begins, or nothing."""
        match event:
            case RunPlanned():
                self._disk_bytes = event.disk_bytes
                return "planned"
            case RunStarted():
                self._began = self._wall()
                return "transferring"
            case ProgressSampled():
                self._sample = event
            case RetryScheduled():
                self._retries[event.stage, event.operation] += 1
            case ImageSealed():
                self._image_bytes = event.size_bytes
                return "verifying"
            case VerifyProgressed():
                self._verified[event.stage] = (event.done_bytes, event.total_bytes)
            case ImageVerified():
                self._verdicts[event.stage] = event.state in ("identical", "proven")
            case RunFinished():
                self._ended = self._wall()
                self._exit_code = EXIT_FAILED if event.verified == "unproven" else EXIT_OK
                return "finished"
            case RunFailed():
                self._ended, self._exit_code = self._wall(), event.exit_code
                return "failed"
            case _:
                pass
        return ""

    def _write(self) -> None:
        if self._broken:
            return
        self._next_s = self._clock() + WRITE_EVERY_S
        try:
            replace_file(self._path, self.text())
        except OSError as error:
            self._broken = True
            what = f"no more metrics in {self._path}"
            self._emit(FallbackTaken(stage="observe", what=what, reason=(error.strerror or str(error)).lower()))

    def text(self) -> str:
        """The metrics as they are now."""
        page = _Page(self._export)
        sample = self._sample
        page.family("phase", "gauge", "Where the run is: 1 for the phase it is in.")
        for phase in PHASES:
            page.value("phase", int(phase == self._phase), {"phase": phase})
        page.single("disk_bytes", "gauge", "Size of the disk that is exported.", self._disk_bytes)
        if sample is not None:
            page.single("elapsed_seconds", "gauge", "How long bytes have been moving.", sample.elapsed_s)
            page.single("read_bytes_total", "counter", "Guest bytes read from the disk.", sample.read_bytes)
            page.single("skipped_bytes_total", "counter", "Guest bytes that need not be read.", sample.skipped_bytes)
            page.single(
                "acknowledged_bytes_total",
                "counter",
                "Guest bytes that the store has acknowledged: the progress of the run.",
                sample.acked_bytes,
            )
            page.single("stored_bytes_total", "counter", "Image bytes acknowledged by the store.", sample.stored_bytes)
            page.family("stage_seconds_total", "counter", "What each stage did with its time, all its threads added.")
            for stage, waits in sample.waits.items():
                for state, seconds in zip(WAITS, waits, strict=True):
                    page.value("stage_seconds_total", seconds, {"stage": stage, "state": state})
        page.family("retries_total", "counter", "Requests that had to be made again.")
        for (stage, operation), count in sorted(self._retries.items()):
            page.value("retries_total", count, {"stage": stage, "operation": operation})
        if self._image_bytes:
            page.single("image_bytes", "gauge", "Size of the image that was stored.", self._image_bytes)
        page.family("verify_done_bytes", "gauge", "Guest bytes that a verification has compared.")
        page.family("verify_total_bytes", "gauge", "Guest bytes that a verification will compare.")
        for stage, (done, total) in self._verified.items():
            page.value("verify_done_bytes", done, {"stage": stage})
            page.value("verify_total_bytes", total, {"stage": stage})
        page.family("verified", "gauge", "1 where a verification found the image identical, or proved it, else 0.")
        for stage, identical in self._verdicts.items():
            page.value("verified", int(identical), {"stage": stage})
        if self._began:
            page.single("start_timestamp_seconds", "gauge", "When bytes began to move.", self._began)
        if self._exit_code is not None:
            page.single("end_timestamp_seconds", "gauge", "When the run ended.", self._ended)
            page.single("exit_code", "gauge", "0 for a run that ended well.", self._exit_code)
        page.single("updated_timestamp_seconds", "gauge", "When this file was written.", self._wall())
        return page.text()


class _Page:
    """Collects metric families; every line has the run's name as label `export`."""

    def __init__(self, export: str) -> None:
        self._export = export
        self._families: dict[str, list[str]] = {}

    def family(self, name: str, kind: Literal["gauge", "counter"], help_text: str) -> None:
        """Begin a family; one without values is left out."""
        full = f"disk_pipeline_{name}"
        self._families[name] = [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}"]

    def value(self, name: str, value: float, labels: Labels) -> None:
        """Add one value to a family."""
        shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in {"export": self._export, **labels}.items())
        number = f"{value:.3f}" if isinstance(value, float) else str(value)
        self._families[name].append(f"disk_pipeline_{name}{{{shown}}} {number}")

    def single(self, name: str, kind: Literal["gauge", "counter"], help_text: str, value: float) -> None:
        """A family of one value."""
        self.family(name, kind, help_text)
        self.value(name, value, {})

    def text(self) -> str:
        """Everything, ending in a line end as the format wants it."""
        return "".join(f"{line}\n" for lines in self._families.values() if len(lines) > 2 for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
