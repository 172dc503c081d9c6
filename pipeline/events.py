"""The one typed event stream of a run. Stages emit; progress, logs, metrics and reports subscribe.

Units are in the field names. Per-block facts are counters, sampled four times a second as `ProgressSampled`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The root of every event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlanned(Event):
    """The source is open, the sizes are known, no byte has moved."""

    name: str
    chain: tuple[str, ...]
    disk_bytes: int
    mapped_bytes: int  # what will be read, as far as the source's map tells
    image_bytes_max: int
    window_bytes: int
    memory_bytes: int
    target: str
    notes: tuple[str, ...] = ()  # what a person should know of the image before it is made


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightDone(Event):
    """The rules of the target were asked, before a byte has moved.

    Attributes:
        verdict: ready, warnings or blocked.
        findings: those that are no passes: id, severity, status, message, remedy, evidence.
    """

    profile: str
    verdict: str
    blocks: int
    warnings: int
    findings: tuple[dict[str, object], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MapProgressed(Event):
    """How far the map pass has come, before the run is planned to its end. Guest bytes."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RereadProgressed(Event):
    """How far a further look at a disk in use has come. Guest bytes."""

    number: int  # of the look, from 1
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangesSent(Event):
    """A disk in use was read once more, and what had changed was sent again. Guest bytes."""

    number: int  # of the look, from 1
    changed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """Bytes begin to move."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResumed(Event):
    """An export that an earlier process began goes on."""

    guest_bytes: int  # of the disk that need not be read again
    image_bytes: int  # of the image that are in the target
    parts: int
    compared_bytes: int  # of the disk that were read again and are what was sent


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftoverFound(Event):
    """Another run left something of the same target, or is still writing it: it is not touched."""

    uri: str
    age_s: float
    size_bytes: int | None  # None where the store does not say
    remove: str  # the shell command


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadKept(Event):
    """The run ended, and what was sent stays, to be gone on with."""

    uri: str
    resume: str
    remove: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressSampled(Event):
    """Counters at one moment. `acked_bytes` counts guest bytes that the store has acknowledged."""

    elapsed_s: float
    disk_bytes: int
    read_bytes: int
    skipped_bytes: int
    acked_bytes: int
    stored_bytes: int  # image bytes acknowledged
    waits: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadOpened(Event):
    """Something exists in the store from here on."""

    stage: str
    uri: str
    upload_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStored(Event):
    """The store acknowledged a part."""

    stage: str
    number: int
    length_bytes: int
    guest_bytes: int
    attempts: int
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryScheduled(Event):
    """A temporary failure; the same call is made again after `wait_s`."""

    stage: str
    operation: str
    attempt: int
    wait_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SendRateLowered(Event):
    """The store asked for less; sending goes on at this rate and climbs again."""

    stage: str
    bytes_per_s: int
    requests: int  # under way at once
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReplayed(Event):
    """A part that did not fit in memory is read and encoded again from its checkpoint."""

    stage: str
    number: int
    from_bytes: int
    to_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackTaken(Event):
    """The preferred way did not work; a slower or weaker one is used from here on."""

    stage: str
    what: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOpened(Event):
    """The source is an image, and its header is in order.

    Attributes:
        how: the format was declared, or how it was told.
        size_bytes: of the disk inside.
    """

    stage: str
    uri: str
    format: str
    how: str
    size_bytes: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSealed(Event):
    """The object is complete and readable, not yet published."""

    uri: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyProgressed(Event):
    """How far a verification has come, in guest bytes."""

    stage: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageVerified(Event):
    """A verification gave its verdict."""

    stage: str
    state: str
    coverage: float
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePublished(Event):
    """The image is the result; its manifest is written."""

    uri: str
    manifest_uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRemoved(Event):
    """What was stored is gone again: aborted, or withdrawn after a failed verification."""

    uri: str
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailed(Event):
    """The run ended with an error."""

    error: str
    hint: str
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(Event):
    """The run ended well."""

    name: str
    uri: str
    verified: str  # "identical", "proven", "unproven", or "" when nothing was asked for
    disk_bytes: int
    read_bytes: int
    stored_bytes: int
    elapsed_s: float
    bottleneck: str
    manifest_path: str


def event_type(event: Event) -> str:
    """The name of an event in logs and JSON: `retry_scheduled` for RetryScheduled."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(event).__name__).lower()


Subscriber = Callable[[Event], None]


class EventStream:
    """Hands every event to every subscriber, in order, at once, on the event loop."""

    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []
        self._fallbacks: list[FallbackTaken] = []

    def subscribe(self, subscriber: Subscriber, *, with_fallbacks: bool = False) -> None:
        """Call `subscriber` with every event from now on.

        Args:
            with_fallbacks: also, at once, with the fallbacks until now: planning takes some before a run is recorded.
        """
        self._subscribers.append(subscriber)
        if with_fallbacks:
            for event in self._fallbacks:
                subscriber(event)

    def emit(self, event: Event) -> None:
        """Tell everybody. A subscriber that raises is the run's error."""
        if isinstance(event, FallbackTaken):
            self._fallbacks.append(event)
        for subscriber in self._subscribers:
            subscriber(event)
