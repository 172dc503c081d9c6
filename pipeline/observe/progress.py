"""Show a run to the person who waits for it: a bar on a terminal, lines in a pipe or CI, and the last word.

Progress is counted in guest bytes that the store has acknowledged, never in bytes that were merely read.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from pipeline.events import (
    ChangesSent,
    Event,
    FallbackTaken,
    ImageSealed,
    ImageVerified,
    LeftoverFound,
    MapProgressed,
    PartReplayed,
    ProgressSampled,
    RereadProgressed,
    RetryScheduled,
    RunPlanned,
    RunResumed,
    VerifyProgressed,
)
from pipeline.flow.items import Verdict
from pipeline.units import format_duration, format_exact, format_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 5.0
# The rate shown is that of the last seconds: shorter and it jumps with every part, longer and a stall shows late.
RATE_OVER_S = 10.0


class RunOutcome(Protocol):
    """What the last word needs of the engine's `Outcome`."""

    @property
    def uri(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def verdicts(self) -> tuple[Verdict, ...]: ...
    @property
    def disk_size(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def earlier_disk_bytes(self) -> int: ...
    @property
    def earlier_read_bytes(self) -> int: ...
    @property
    def earlier_stored_bytes(self) -> int: ...
    @property
    def elapsed_s(self) -> float: ...
    @property
    def bottleneck(self) -> str: ...
    @property
    def manifest_uri(self) -> str: ...
    @property
    def manifest_path(self) -> Path | None: ...
    @property
    def keeps_manifest(self) -> bool: ...


class Display(Protocol):
    """A subscriber that may have to be put away."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None:
        """Leave the terminal as a person wants it; idempotent."""
        ...


def make_display(stream: IO[str], environ: Mapping[str, str] = os.environ) -> Display:
    """A bar where `stream` is a terminal that can show one, else lines."""
    if stream.isatty() and environ.get("TERM") != "dumb" and not environ.get("CI"):
        return LiveDisplay(stream)
    return LineDisplay()


class Track:
    """What the displays remember of a run: the last sample, the rate, what went wrong and was mended."""

    def __init__(self) -> None:
        self.sample: ProgressSampled | None = None
        self.verifying: VerifyProgressed | None = None
        self.retries = 0
        self.last_retry = ""
        self._recent: deque[tuple[float, int]] = deque()

    def follow(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, ProgressSampled):
            self.sample = event
            self._recent.append((event.elapsed_s, event.acked_bytes))
            while len(self._recent) > 2 and self._recent[0][0] < event.elapsed_s - RATE_OVER_S:
                self._recent.popleft()
        elif isinstance(event, VerifyProgressed):
            self.verifying = event
        elif isinstance(event, RetryScheduled):
            self.retries += 1
            self.last_retry = f"{event.stage} {event.operation}: {event.reason}"

    @property
    def rate(self) -> float:
        """Acknowledged guest bytes a second, lately."""
        if len(self._recent) < 2:
            return 0.0
        (begin_s, begin), (end_s, end) = self._recent[0], self._recent[-1]
        return (end - begin) / (end_s - begin_s) if end_s > begin_s else 0.0

    @property
    def left(self) -> str:
        """How long it will take at this rate, or nothing where nobody knows."""
        if self.sample is None or self.rate <= 0 or self.sample.acked_bytes >= self.sample.disk_bytes:
            return ""
        return f"{format_duration((self.sample.disk_bytes - self.sample.acked_bytes) / self.rate)} left"

    @property
    def pace(self) -> list[str]:
        """Rate and what is left at it; nothing once every byte is stored, when the rate of late says nothing."""
        if self.sample is None or self.sample.acked_bytes >= self.sample.disk_bytes:
            return []
        return [f"{format_size(self.rate)}/s", *([self.left] if self.left else [])]

    @property
    def details(self) -> str:
        """The second line: what happened to the bytes, and how often the network had to be asked again."""
        if self.sample is None:
            return ""
        sample = self.sample
        parts = [
            f"read {format_size(sample.read_bytes)}",
            f"skipped {format_size(sample.skipped_bytes)}",
            f"sent {format_size(sample.stored_bytes)}",
        ]
        if self.retries:
            parts.append(f"{self.retries} {'retry' if self.retries == 1 else 'retries'}, last: {self.last_retry}")
        return ", ".join(parts)


class LineDisplay:
    """One line on stderr for each phase, and one every five seconds in between."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self._write = write or _to_stderr
        self._track = Track()
        self._next_s = LINE_EVERY_S
        self._quarter = -1

    def __call__(self, event: Event) -> None:
        """Print what an event means, if it means anything."""
        self._track.follow(event)
        if isinstance(event, RunPlanned):
            self._quarter = -1
            for line in planned_lines(event):
                self._write(line)
        elif isinstance(event, ProgressSampled):
            if event.elapsed_s >= self._next_s:
                self._next_s = event.elapsed_s + LINE_EVERY_S
                self._write(self._progress(event))
        elif isinstance(event, MapProgressed | RereadProgressed | VerifyProgressed):
            # No clock here: a line at each quarter is enough for the shorter passes.
            quarter = event.done_bytes * 4 // max(1, event.total_bytes)
            if quarter > self._quarter:
                self._quarter = quarter
                self._write(f"{pass_name(event)}: {_percent(event.done_bytes, event.total_bytes)}")
        else:
            line = phase_line(event)
            if line:
                self._quarter = -1
                self._write(line)

    def close(self) -> None:
        """Nothing to put away."""

    def _progress(self, sample: ProgressSampled) -> str:
        done = f"{format_size(sample.acked_bytes)} of {format_size(sample.disk_bytes)}"
        share = _percent(sample.acked_bytes, sample.disk_bytes)
        return f"{share}  {', '.join([done, *self._track.pace])}; {self._track.details}"


class LiveDisplay:
    """A bar on a terminal, with what happened to the bytes below it. Phases stay as lines above."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._track = Track()
        self._bars: Progress | None = None
        self._export: TaskID | None = None
        self._passes: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Move the bar, or print what an event means above it."""
        self._track.follow(event)
        bars = self._bars or self._start()
        if isinstance(event, RunPlanned):
            for line in planned_lines(event):
                bars.console.print(line, markup=False, highlight=False)
            self._export = bars.add_task("export", total=event.disk_bytes, amount="", pace="")
        elif isinstance(event, ProgressSampled) and self._export is not None:
            amount = f"{format_size(event.acked_bytes)} of {format_size(event.disk_bytes)}"
            bars.update(self._export, completed=event.acked_bytes, amount=amount, pace=" ".join(self._track.pace))
        elif isinstance(event, MapProgressed | RereadProgressed | VerifyProgressed):
            name = pass_name(event)
            if name not in self._passes:
                self._passes[name] = bars.add_task(name, total=event.total_bytes, amount="", pace="")
            amount = f"{format_size(event.done_bytes)} of {format_size(event.total_bytes)}"
            bars.update(self._passes[name], completed=event.done_bytes, total=event.total_bytes, amount=amount)
        else:
            line = phase_line(event)
            if line:
                bars.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last state of the bar on the screen; idempotent."""
        if self._bars is not None:
            self._bars.stop()

    def _start(self) -> Progress:
        # Here, not at the top: rich takes longer to import than `pipeline --help` may take.
        from rich.console import Console, RenderableType
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        track = self._track

        class Bars(Progress):
            def get_renderables(self) -> list[RenderableType]:
                below = [Text(track.details, style="dim", overflow="ellipsis", no_wrap=True)] if track.details else []
                return [self.make_tasks_table(self.tasks), *below]

        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>5.1f}%", markup=False),
            TextColumn("{task.fields[amount]}", markup=False),
            TextColumn("{task.fields[pace]}", markup=False),
            console=Console(file=self._stream),
            refresh_per_second=4,
            redirect_stdout=False,  # an image may be on its way there
            redirect_stderr=True,
            expand=True,
        )
        self._bars.start()
        return self._bars


def pass_name(event: MapProgressed | RereadProgressed | VerifyProgressed) -> str:
    """What a pass beside the transfer is called: a look at the whole disk before or after it, or who verifies."""
    if isinstance(event, RereadProgressed):
        return f"looking for changes, {event.number}"
    return "map of the disk" if isinstance(event, MapProgressed) else event.stage


def planned_lines(event: RunPlanned) -> list[str]:
    """`20 GiB disk, 5.2 GiB of it to read -> s3://images/web01.qcow2`, and what there is to note."""
    sizes = f"{format_size(event.disk_bytes)} disk, {format_size(event.mapped_bytes)} of it to read"
    return [f"{sizes} -> {event.target}", *(f"note: {note}" for note in event.notes)]


def phase_line(event: Event) -> str:
    """What a person may want to know at once; empty for the rest. Retries are counted beside the progress."""
    if isinstance(event, ImageSealed):
        return f"sealed: {format_size(event.size_bytes)} at {event.uri}"
    if isinstance(event, ImageVerified):
        return f"{event.stage}: {event.state}" + (f", {event.detail}" if event.detail else "")
    if isinstance(event, FallbackTaken):
        return f"{event.stage}: {event.what} ({event.reason})"
    if isinstance(event, RunResumed):
        at = f"goes on at {format_size(event.guest_bytes)} of the disk" if event.guest_bytes else "reads the disk again"
        compared = f", {format_size(event.compared_bytes)} of the disk compared" if event.compared_bytes else ""
        return f"resumed: {at}; {format_size(event.image_bytes)} of the image are stored already{compared}"
    if isinstance(event, LeftoverFound):
        size = f", {format_size(event.size_bytes)}" if event.size_bytes is not None else ""
        told = f"left by another run: {event.uri}, {format_duration(event.age_s)} old{size}"
        return f"{told}. If that run is over, remove it: {event.remove}"
    if isinstance(event, ChangesSent):
        changed = f"{format_size(event.changed_bytes)} had changed, sent again" if event.changed_bytes else "none found"
        return f"changes, look {event.number}: {changed}"
    if isinstance(event, PartReplayed):
        return f"{event.stage}: part {event.number} is read and encoded again"
    return ""


def verified_line(outcome: RunOutcome) -> str:
    """The first line of the last word: claims what was compared, and no more."""
    if outcome.state == "stored":
        return "stored, not verified"
    proven = "; ".join(verdict.detail for verdict in outcome.verdicts if verdict.state == "proven")
    if outcome.state == "proven":
        return f"{proven}; not compared with the disk"
    compared = [verdict for verdict in outcome.verdicts if verdict.state == "identical"]
    best = max(compared, key=lambda verdict: verdict.coverage, default=None)
    found = "identical"
    if best is not None and best.coverage < 1:
        found += f", as far as {best.coverage:.1%} of the disk that was compared tells"
    if outcome.state == "unproven":
        # What could not be tried comes first: what could not be compared may have been compared in another way.
        reasons = [one.detail for state in ("unknown", "unproven") for one in outcome.verdicts if one.state == state]
        why = next(filter(None, reasons), "there was nothing to compare with")
        rest = found if best is not None else proven
        return f"unproven: {why}" + (f" (but {rest})" if rest else "")
    return f"verified: {found}" + (f"; {proven}" if proven else "")


def summary_lines(outcome: RunOutcome) -> list[str]:
    """The last word of a run that ended well."""
    # The time is this process's, so are the bytes that it is divided into.
    done = outcome.disk_size - outcome.earlier_disk_bytes
    rate = done / outcome.elapsed_s if outcome.elapsed_s > 0 else 0.0
    manifest = [outcome.manifest_uri] if outcome.manifest_uri else []
    if outcome.manifest_path and str(outcome.manifest_path.absolute()) != outcome.manifest_uri.removeprefix("file://"):
        manifest.append(str(outcome.manifest_path))
    rows = [
        ("image", outcome.uri),
        ("size", format_exact(outcome.image_size)),
        ("disk", format_exact(outcome.disk_size)),
        ("read", format_exact(outcome.read_bytes) + _before(outcome.earlier_read_bytes)),
        ("sent", format_exact(outcome.stored_bytes) + _before(outcome.earlier_stored_bytes)),
        ("time", f"{format_duration(outcome.elapsed_s)}, {format_size(rate)}/s of disk" + _before_time(outcome)),
        ("manifest", " and ".join(manifest) or ("could not be written" if outcome.keeps_manifest else "none is kept")),
    ]
    return [
        verified_line(outcome),
        *(f"  {name:<10}{value}" for name, value in rows),
        *([f"  {outcome.bottleneck}"] if outcome.bottleneck else []),
    ]


def _before(done: int) -> str:
    return f", {format_size(done)} of it before" if done else ""


def _before_time(outcome: RunOutcome) -> str:
    earlier = outcome.earlier_disk_bytes
    return f", {format_size(earlier)} of which were done before" if earlier else ""


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 100:5.1f}%"


def _to_stderr(line: str) -> None:
    # A run does not end because nobody looks at it any more.
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
