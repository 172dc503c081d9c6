"""Write the report of a run when it ends: from its manifest, or from what its events told when it failed."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.errors import FormatError
from pipeline.events import (
    Event,
    FallbackTaken,
    ImageSealed,
    ImageVerified,
    ProgressSampled,
    RunFailed,
    RunPlanned,
    RunStarted,
)
from pipeline.flow.manifest import Manifest
from pipeline.flow.series import SeriesRecorder
from pipeline.observe.whole_files import replace_file

if TYPE_CHECKING:
    from pipeline.config.parse import ExportConfig
    from pipeline.config.planning import RunPlan
    from pipeline.observe.record import Record


class RunReport:
    """A subscriber that writes a page at the end of a run; a page that can't be written never fails a run.

    Args:
        emit: takes a FallbackTaken when the page can't be written.
    """

    def __init__(self, path: Path, config: ExportConfig, emit: Callable[[Event], None]) -> None:
        self._path = path
        self._config = config
        self._emit = emit
        self._recorder = SeriesRecorder()
        self._plan: RunPlan | None = None
        self._planned: RunPlanned | None = None
        self._started_at: float | None = None
        self._sample: ProgressSampled | None = None
        self._image_bytes = 0
        self._verdicts: list[ImageVerified] = []

    def __call__(self, event: Event) -> None:
        """Take note of an event; a failure is the end, and writes the page."""
        self._recorder(event)
        match event:
            case RunPlanned():
                self._planned = event
            case RunStarted():
                self._started_at = time.monotonic()
            case ProgressSampled():
                self._sample = event
            case ImageSealed():
                self._image_bytes = event.size_bytes
            case ImageVerified():
                self._verdicts.append(event)
            case RunFailed() if self._started_at is not None:
                # A run that never began leaves the page of an earlier one alone.
                self._write(lambda: self._failed(event), "the events of the run")
            case _:
                pass

    def begin(self, plan: RunPlan) -> None:
        """The plan knows what events do not: the disk's identity, how many threads a stage has."""
        self._plan = plan

    def finish(self, manifest: Manifest, manifest_uri: str) -> None:
        """Write the page of a run that ended well."""
        from pipeline.observe.record import record_of

        def with_notes() -> Record:
            notes = self._planned.notes if self._planned else ()
            # What happened while it was planned is no part of the manifest, but of the run.
            series = self._recorder.series(self._plan.meters if self._plan else ())
            return dataclasses.replace(record_of(manifest, where=manifest_uri), notes=notes, series=series)

        self._write(with_notes, manifest_uri)

    def _write(self, make: Callable[[], Record], origin: str) -> None:
        from pipeline.observe.page import page

        try:
            replace_file(self._path, page(make(), origin=origin))
        except (OSError, FormatError) as error:
            reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
            self._emit(FallbackTaken(stage="observe", what=f"no report at {self._path}", reason=reason))

    def _failed(self, event: RunFailed) -> Record:
        from pipeline.observe.record import Record, VerdictRecord

        planned, plan, sample = self._planned, self._plan, self._sample
        assert planned is not None, "a run that began was planned"
        began = self._started_at or time.monotonic()
        options = {"export": self._config.export, **{stage.name: stage.options for stage in self._config.stages}}
        return Record(
            name=planned.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            state="failed",
            target=planned.target,
            disk_size=planned.disk_bytes,
            elapsed_s=time.monotonic() - began,
            source=plan.info.identity if plan else {},
            read_bytes=sample.read_bytes if sample else 0,
            skipped_bytes=sample.skipped_bytes if sample else 0,
            acked_bytes=sample.acked_bytes if sample else 0,
            stored_bytes=sample.stored_bytes if sample else 0,
            image_size=self._image_bytes,
            image={"format": plan.layout.format} if plan else {},
            series=self._recorder.series(plan.meters if plan else ()),
            timings=dict(sample.waits) if sample else {},
            verdicts=[
                VerdictRecord(level=one.stage, state=one.state, coverage=one.coverage, detail=one.detail)
                for one in self._verdicts
            ],
            options={name: _shown(values) for name, values in options.items()},
            versions={"disk-pipeline": __version__, "python": platform.python_version()},
            notes=planned.notes,
            error=event.error,
            hint=event.hint,
        )


def _shown(options: Any) -> dict[str, str]:
    """Option values as texts; a secret shows its name only."""
    from pipeline.observe.record import text_of

    return {field.name: text_of(getattr(options, field.name)) for field in dataclasses.fields(options)}
