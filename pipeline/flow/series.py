"""How a run went over time: counters at a few hundred moments, for the report and the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import FormatError
from pipeline.events import Event, FallbackTaken, PartReplayed, ProgressSampled, RetryScheduled
from pipeline.flow.meter import StageMeter

# Two pixels a sample on a wide screen. More says nothing more; a day's run keeps one every five minutes.
SAMPLES_MAX = 300
# Of a network that fails for hours the first failures tell the cause.
MARKS_MAX = 100

Waits = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that happened on the way: a retry, a fallback, a part made again."""

    elapsed_s: float
    stage: str
    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Counters since the start, at ascending moments; what they rose by between two is what happened there.

    Attributes:
        elapsed_s: the moments; every list below has one entry for each.
        read_bytes, acked_bytes: guest bytes. stored_bytes: image bytes.
        retries: how many there had been.
        stages: TOML name of each stage to its seconds (working, waiting for input, for output, for a buffer).
        parallel: how many threads each stage could use at once; its working seconds may rise that much faster.
        marks: the first hundred things that happened on the way.
    """

    elapsed_s: tuple[float, ...] = ()
    read_bytes: tuple[int, ...] = ()
    acked_bytes: tuple[int, ...] = ()
    stored_bytes: tuple[int, ...] = ()
    retries: tuple[int, ...] = ()
    stages: dict[str, tuple[Waits, ...]] = dataclasses.field(default_factory=dict)
    parallel: dict[str, int] = dataclasses.field(default_factory=dict)
    marks: tuple[Mark, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Columns as texts, numbers apart by spaces: one line each in the manifest instead of one a number."""
        return {
            "elapsed_s": _column(self.elapsed_s),
            "read_bytes": _column(self.read_bytes),
            "acked_bytes": _column(self.acked_bytes),
            "stored_bytes": _column(self.stored_bytes),
            "retries": _column(self.retries),
            "stages": {
                name: {
                    "parallel": self.parallel.get(name, 1),
                    **{
                        state: _column([waits[index] for waits in rows])
                        for index, state in enumerate(("working", "in", "out", "buffer"))
                    },
                }
                for name, rows in self.stages.items()
            },
            "marks": [dataclasses.asdict(mark) for mark in self.marks],
        }

    @classmethod
    def from_json(cls, raw: Any) -> Series:
        """A series again; an empty one where the manifest has none. Raises FormatError for anything else."""
        if not raw:
            return cls()
        try:
            elapsed = _floats(raw["elapsed_s"])
            stages = {}
            for name, columns in raw["stages"].items():
                numbers = [_floats(columns[state]) for state in ("working", "in", "out", "buffer")]
                stages[str(name)] = tuple(zip(*numbers, strict=True))
            made = cls(
                elapsed_s=elapsed,
                read_bytes=_whole(raw["read_bytes"]),
                acked_bytes=_whole(raw["acked_bytes"]),
                stored_bytes=_whole(raw["stored_bytes"]),
                retries=_whole(raw["retries"]),
                stages=stages,
                parallel={str(name): int(columns["parallel"]) for name, columns in raw["stages"].items()},
                marks=tuple(
                    Mark(
                        elapsed_s=float(mark["elapsed_s"]),
                        stage=str(mark["stage"]),
                        kind=str(mark["kind"]),
                        text=str(mark["text"]),
                    )
                    for mark in raw["marks"]
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError("the manifest's time series can't be read", reason=str(error)) from None
        columns = (made.read_bytes, made.acked_bytes, made.stored_bytes, made.retries, *made.stages.values())
        if any(len(column) != len(elapsed) for column in columns) or list(elapsed) != sorted(elapsed):
            raise FormatError("the manifest's time series contradicts itself", samples=len(elapsed))
        return made


class SeriesRecorder:
    """A subscriber that keeps what a Series needs: never more than 300 samples, evenly over the run."""

    def __init__(self) -> None:
        self._samples: list[tuple[ProgressSampled, int]] = []
        self._newest: tuple[ProgressSampled, int] | None = None
        self._every = 1
        self._seen = 0
        self._retries = 0
        self._marks: list[Mark] = []

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, ProgressSampled):
            self._newest = (event, self._retries)
            if self._seen % self._every == 0:
                self._samples.append(self._newest)
            self._seen += 1
            if len(self._samples) >= SAMPLES_MAX:
                # Counters only rise, so that leaving every other one out loses detail and no byte.
                self._samples = self._samples[::2]
                self._every *= 2
        elif isinstance(event, RetryScheduled):
            self._retries += 1
            self._mark(event.stage, "retry", f"{event.operation}: {event.reason} (attempt {event.attempt})")
        elif isinstance(event, FallbackTaken):
            self._mark(event.stage, "fallback", f"{event.what} ({event.reason})")
        elif isinstance(event, PartReplayed):
            self._mark(event.stage, "replay", f"part {event.number} is read and encoded again")

    def _mark(self, stage: str, kind: str, text: str) -> None:
        if len(self._marks) < MARKS_MAX:
            elapsed_s = self._newest[0].elapsed_s if self._newest else 0.0
            self._marks.append(Mark(elapsed_s=elapsed_s, stage=stage, kind=kind, text=text))

    def series(self, meters: Iterable[StageMeter] = ()) -> Series:
        """What was seen so far, the newest sample included.

        Args:
            meters: of the stages, for how many threads each may use.
        """
        parallel = {meter.name: meter.parallelism for meter in meters}
        kept = list(self._samples)
        if self._newest is not None and kept[-1] is not self._newest:
            kept.append(self._newest)
        names = list(kept[-1][0].waits) if kept else []
        return Series(
            elapsed_s=tuple(sample.elapsed_s for sample, _ in kept),
            read_bytes=tuple(sample.read_bytes for sample, _ in kept),
            acked_bytes=tuple(sample.acked_bytes for sample, _ in kept),
            stored_bytes=tuple(sample.stored_bytes for sample, _ in kept),
            retries=tuple(retries for _, retries in kept),
            stages={name: tuple(sample.waits.get(name, (0.0,) * 4) for sample, _ in kept) for name in names},
            parallel={name: parallel.get(name, 1) for name in names},
            marks=tuple(self._marks),
        )


def _column(numbers: Any) -> str:
    return " ".join(str(round(number, 3)) if isinstance(number, float) else str(number) for number in numbers)


def _floats(text: Any) -> tuple[float, ...]:
    numbers = tuple(float(word) for word in text.split())
    if any(not 0 <= number < 1e12 for number in numbers):
        raise ValueError("a time is out of bounds")
    return numbers


def _whole(text: Any) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())
