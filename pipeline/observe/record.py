"""What a report knows of a run: from its manifest, or from its events when it failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from pipeline.config.options import without_secrets
from pipeline.errors import FormatError
from pipeline.flow.items import Run, Why
from pipeline.flow.manifest import Manifest, unpack_runs
from pipeline.flow.series import Series
from pipeline.units import format_exact

State = Literal["identical", "proven", "unproven", "stored", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionRecord:
    """One partition of the disk. Guest bytes."""

    number: int
    start: int
    length: int
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictRecord:
    """What one verification found."""

    level: str
    state: str
    coverage: float
    detail: str
    evidence: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingRecord:
    """What a rule of the target said. `weight` is block, warn, info, unknown or ignored."""

    id: str
    weight: str
    message: str
    where: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything that the page shows. Bytes and seconds.

    Attributes:
        runs: the map, in guest order; empty where the run failed before it was whole.
        image_size: 0 where no image was finished.
        target_rules: the profile that was asked, and what came of it; empty where none was.
        error, hint: why it failed, and what to do.
        timings: per stage (working, waiting for input, for output, for a buffer).
    """

    name: str
    created: str
    state: State
    target: str
    disk_size: int
    elapsed_s: float
    source: Mapping[str, str] = field(default_factory=dict)
    runs: Sequence[Run] = ()
    runs_exact: bool = True
    totals: Mapping[Why, int] = field(default_factory=dict)
    read_bytes: int = 0
    skipped_bytes: int = 0
    acked_bytes: int = 0
    stored_bytes: int = 0
    image_size: int = 0
    image: Mapping[str, str] = field(default_factory=dict)
    partitions: Sequence[PartitionRecord] = ()
    series: Series = field(default_factory=Series)
    timings: Mapping[str, tuple[float, float, float, float]] = field(default_factory=dict)
    bottleneck: str = ""
    verdicts: Sequence[VerdictRecord] = ()
    target_rules: str = ""
    findings: Sequence[FindingRecord] = ()
    digest: str = ""
    receipt: Sequence[tuple[str, str, str]] = ()
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    error: str = ""
    hint: str = ""

    @property
    def chain(self) -> list[str]:
        """The stages, in the order data passes."""
        return [name for name in self.options if "." in name]


def record_of(manifest: Manifest, *, where: str) -> Record:
    """The record of a finished run.

    Raises:
        FormatError: the manifest contradicts itself or holds other types than it should; it names `where`.
    """
    try:
        return _record_of(manifest)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise FormatError(
            "the manifest does not say what it should",
            hint="It was damaged or changed by hand; fetch it again.",
            manifest=where,
            reason=str(error),
        ) from None


def _record_of(manifest: Manifest) -> Record:
    disk, image = manifest.disk, manifest.image
    size = _count(disk.size)
    known: tuple[State, ...] = ("identical", "proven", "unproven", "stored")
    states: dict[str, State] = {state: state for state in known}
    totals = {Why(name): _count(length) for name, length in disk.totals.items()}
    series = Series.from_json(manifest.series)
    digest = manifest.digest
    return Record(
        name=str(manifest.name),
        created=str(manifest.created),
        state=states[manifest.state],
        target=str(image.uri),
        disk_size=size,
        elapsed_s=float(manifest.elapsed_s),
        source={**_texts(disk.identity), **_consistency(manifest.facts.get("consistency"))},
        runs=unpack_runs(disk.runs, size),
        runs_exact=bool(disk.runs_exact),
        totals=totals,
        read_bytes=totals.get(Why.READ, 0) + totals.get(Why.SCANNED, 0),
        acked_bytes=size,
        stored_bytes=series.stored_bytes[-1] if series.stored_bytes else 0,
        image_size=_count(image.size),
        image={
            "format": str(image.format),
            "size": format_exact(_count(image.size)),
            "virtual size": format_exact(_count(image.virtual_size)),
            "order": str(image.order),
            "window": format_exact(_count(image.window)),
        },
        partitions=_partitions(manifest.facts.get("partitions"), size),
        series=series,
        timings={
            str(name): (float(one["working"]), float(one["in"]), float(one["out"]), float(one["buffer"]))
            for name, one in manifest.timings.items()
        },
        bottleneck=str(manifest.bottleneck),
        verdicts=[
            VerdictRecord(
                level=str(one["level"]),
                state=str(one["state"]),
                coverage=float(one["coverage"]),
                detail=str(one["detail"]),
                evidence=_texts(one.get("evidence") or {}),
            )
            for one in manifest.verdicts
        ],
        target_rules=_rules(manifest.preflight),
        findings=[_finding(one) for one in manifest.preflight.get("findings", ())],
        digest=f"{digest['algorithm']} {digest['root']}" if digest else "",
        receipt=[(str(what), str(ours), str(theirs)) for what, ours, theirs in manifest.receipt],
        options={str(name): _texts(values) for name, values in manifest.options.items()},
        versions=_texts(manifest.versions),
    )


def _consistency(fact: Any) -> dict[str, str]:
    """What was achieved on a disk in use, in a sentence; nothing where the source leaves no such fact."""
    if not isinstance(fact, Mapping) or "achieved" not in fact:
        return {}
    changing = ", ".join(str(point) for point in fact.get("changing") or ())
    looks = fact.get("changed_bytes") or []
    resent = f"{format_exact(_count(fact['resent_bytes']))} had changed and were sent again" if looks else ""
    if fact["achieved"] == "settled":
        told = f"settled: written to at {changing}, {resent}, the last look at all of it found no change"
    elif fact["achieved"] == "live" and looks:
        told = (
            f"live: written to at {changing}, {resent}, {format_exact(_count(looks[-1]))} of it in the last look: "
            "an image of many moments"
        )
    elif fact["achieved"] == "live":
        told = f"live: written to at {changing}, an image of many moments"
    else:
        told = str(fact["achieved"])
    written = fact.get("written_bytes")
    if changing and written is not None:
        told += f"; {format_exact(_count(written))} were written to the disk meanwhile"
    return {"consistency": told}


def _rules(preflight: Mapping[str, Any]) -> str:
    if not preflight:
        return ""
    return (
        f"{text_of(preflight['profile'])}, started by {text_of(preflight['boot_mode']).upper()}: "
        f"{text_of(preflight['verdict'])}, {_count(preflight['passed'])} checks passed"
    )


def _finding(told: Mapping[str, Any]) -> FindingRecord:
    weight = "ignored" if told.get("ignored") else told["severity"] if told["status"] == "fail" else told["status"]
    places = [f"{one['file']}:{one['line']}" if one.get("line") else str(one["file"]) for one in told["evidence"]]
    return FindingRecord(
        id=str(told["id"]),
        weight=str(weight),
        message=str(told["message"]),
        where=", ".join(places),
        remedy=str(told["remedy"]),
    )


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of bytes")
    return value


def _texts(values: Mapping[Any, Any]) -> dict[str, str]:
    return {str(name): text_of(value) for name, value in values.items()}


def text_of(value: Any) -> str:
    """An option's value in the words of the page."""
    if value is None or value == "":
        return "not set"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(text_of(one) for one in value)
    return without_secrets(str(value))


def _partitions(raw: Any, size: int) -> list[PartitionRecord]:
    """The fact "partitions", where a stage left it: a list of tables with number, start, length and what is known."""
    found = []
    for one in (raw.get("partitions") if isinstance(raw, dict) else raw) or []:
        start, length = _count(one["start"]), _count(one["length"])
        words = [one.get("filesystem"), one.get("label") or one.get("name")]
        title = ", ".join(str(word) for word in words if word) or str(one.get("type") or "")
        if length and start + length <= size:
            found.append(PartitionRecord(number=_count(one["number"]), start=start, length=length, title=title))
    return sorted(found, key=lambda one: one.start)


@dataclass(slots=True)
class Column:
    """A stretch of the disk, and how many bytes of each kind lie in it."""

    start: int
    length: int
    kinds: dict[Why, int]


def columns(runs: Sequence[Run], start: int, length: int, count: int) -> list[Column]:
    """Divide guest bytes [start, start + length) into `count` even stretches, fewer for a tiny disk."""
    count = max(1, min(count, length // 512 or 1))
    edges = [start + length * index // count for index in range(count + 1)]
    made = [Column(begin, end - begin, {}) for begin, end in pairwise(edges)]
    at = 0
    for run in runs:
        if run.end <= start:
            continue
        if run.offset >= start + length:
            break
        position = max(run.offset, start)
        while position < run.end and at < count:
            column = made[at]
            stop = min(run.end, column.start + column.length)
            column.kinds[run.why] = column.kinds.get(run.why, 0) + stop - position
            position = stop
            if stop == column.start + column.length:
                at += 1
    return made


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened between two moments. Rates are bytes a second; shares are of the stage's capacity, 0 to 1."""

    begin_s: float
    end_s: float
    read_rate: float
    stored_rate: float
    shares: dict[str, tuple[float, float, float, float]]


def intervals(series: Series, count: int) -> list[Interval]:
    """The run in at most `count` stretches of about even length, each between two samples."""
    if not series.elapsed_s or series.elapsed_s[-1] <= 0:
        return []
    # Sample -1 is the start: everything at 0.
    step = series.elapsed_s[-1] / count
    picked, reached = [-1], 0.0
    last = len(series.elapsed_s) - 1
    for index, moment in enumerate(series.elapsed_s):
        if moment >= reached + step * 0.999 or index == last:
            picked.append(index)
            reached = moment
    made = []
    for before, after in pairwise(picked):
        begin, end = _at(series.elapsed_s, before), series.elapsed_s[after]
        if end <= begin:
            continue
        span = end - begin
        shares = {}
        for name, rows in series.stages.items():
            then = rows[before] if before >= 0 else (0.0, 0.0, 0.0, 0.0)
            working, *waits = (max(0.0, now - old) / span for now, old in zip(rows[after], then, strict=True))
            shares[name] = _within_one((working / max(1, series.parallel.get(name, 1)), *waits))
        made.append(
            Interval(
                begin,
                end,
                (series.read_bytes[after] - _at(series.read_bytes, before)) / span,
                (series.stored_bytes[after] - _at(series.stored_bytes, before)) / span,
                shares,
            )
        )
    return made


def _at(column: Sequence[float], index: int) -> float:
    return column[index] if index >= 0 else 0.0


def _within_one(shares: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Several tasks may wait at once: what is beyond the whole is cut off."""
    total = max(1.0, sum(shares))
    working, waiting_in, waiting_out, waiting_buffer = (share / total for share in shares)
    return working, waiting_in, waiting_out, waiting_buffer
