"""Log every event with structlog: JSON lines into a file, or the warnings as key=value lines on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

from pipeline.errors import ConfigError, Fault
from pipeline.events import (
    Event,
    FallbackTaken,
    ImageVerified,
    LeftoverFound,
    PartStored,
    ProgressSampled,
    RereadProgressed,
    RetryScheduled,
    RunFailed,
    VerifyProgressed,
    event_type,
)

Level = Literal["debug", "info", "warning", "error"]
_NUMBERS: dict[Level, int] = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def level_of(event: Event) -> Level:
    """How loud an event is: debug for what comes many times a second, warning for what a person may have to act on."""
    if isinstance(event, (ProgressSampled, PartStored, RereadProgressed, VerifyProgressed)):
        return "debug"
    if isinstance(event, (FallbackTaken, LeftoverFound, RetryScheduled)):
        return "warning"
    if isinstance(event, RunFailed):
        return "error"
    if isinstance(event, ImageVerified) and event.state not in ("identical", "proven"):
        return "warning" if event.state in ("unproven", "unknown") else "error"
    return "info"


class RunLog:
    """A subscriber that writes one line an event. Made by `open_log` or `stderr_log`; closed by its owner."""

    def __init__(self, write: Callable[[str], None], *, level: Level, file: IO[str] | None = None) -> None:
        self._write = write
        self._level = level
        self._file = file
        self._made: Any = None
        self.is_file = file is not None
        if self.is_file:
            _ = self._log  # a file is written to at once

    @property
    def _log(self) -> Any:
        """The logger, made for the first line: most runs without a log file have nothing to say, and importing
        structlog takes a sixth of the time to the first byte (perf/cases/startup.py)."""
        if self._made is None:
            import structlog

            stamp = [structlog.processors.TimeStamper(fmt="iso", utc=True)] if self._file else []
            renderer = structlog.processors.JSONRenderer(default=str) if self._file else _KeysAndValues()
            self._made = structlog.wrap_logger(
                _Lines(self._write),
                processors=[structlog.processors.add_log_level, *stamp, renderer],
                wrapper_class=structlog.make_filtering_bound_logger(_NUMBERS[self._level]),
            )
        return self._made

    def __call__(self, event: Event) -> None:
        """Log one event under its type, with its fields."""
        if isinstance(event, RunFailed) and not self.is_file:
            return  # whoever ends the run says it on stderr, with the hint
        number = _NUMBERS[level_of(event)]
        if number >= _NUMBERS[self._level]:
            self._log.log(number, event_type(event), **dataclasses.asdict(event))

    def failure(self, error: BaseException) -> None:
        """Log an error that nobody foresaw, with its traceback."""
        trace = "".join(traceback.format_exception(error))
        self._log.error("internal_error", error=f"{type(error).__name__}: {error}", traceback=trace)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # told already
                self._file.close()


def open_log(path: Path, level: Level, *, asked_by: str = "--log-file") -> RunLog:
    """Append JSON lines to a file, each with `event`, `level`, `timestamp` and the event's fields.

    A log that can't be written any more (its disk is full) says so once on stderr; it never ends the run.

    Raises:
        ConfigError: the file can't be opened.
    """
    try:
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        reason = f"{path} can't be opened: {(error.strerror or str(error)).lower()}"
        raise ConfigError([Fault(reason=reason, file=asked_by)]) from None
    broken = False

    def write(line: str) -> None:
        nonlocal broken
        try:
            if not broken:
                file.write(line + "\n")
        except OSError as error:
            broken = True
            _to_stderr(f"the log {path} ends here: {error.strerror}")

    return RunLog(write, level=level, file=file)


def stderr_log(level: Level) -> RunLog:
    """Write key=value lines to stderr: warnings and errors, everything at level debug."""
    least: Level = level if level in ("debug", "error") else "warning"
    return RunLog(_to_stderr, level=least)


def _to_stderr(line: str) -> None:
    # Looked up at every line: while a progress bar lives, sys.stderr is a stand-in that writes above it.
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class _Lines:
    """The logger below structlog's processors: takes finished lines of any level."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.debug = self.info = self.warning = self.error = write


class _KeysAndValues:
    """`warning: retry_scheduled stage=write.s3 attempt=2 reason="503 SlowDown"`."""

    def __init__(self) -> None:
        from structlog.processors import LogfmtRenderer

        self._fields = LogfmtRenderer()

    def __call__(self, logger: Any, name: str, values: Any) -> str:
        head = f"{values.pop('level')}: {values.pop('event')}"
        trace = values.pop("traceback", "")
        fields = self._fields(logger, name, {key: value for key, value in values.items() if value not in ("", {}, ())})
        return f"{head} {fields}" + (f"\n{trace}" if trace else "")
