"""A record of a run as one HTML page that loads nothing: for a browser today and in ten years, on a phone too.

Everything that comes from the run is escaped: names, paths and error texts are data, also when a stranger chose them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import groupby
from pathlib import Path

from pipeline import __version__
from pipeline.flow.items import Why
from pipeline.observe.drawing import (
    COLOURS,
    KINDS,
    WAITS,
    icon,
    map_strip,
    progress_plot,
    progress_strip,
    rate_plot,
    stage_strip,
)
from pipeline.observe.record import Interval, PartitionRecord, Record, VerdictRecord, columns, intervals
from pipeline.units import format_duration, format_size

# Three pixels a column on a wide screen, one and a half on a phone.
_MAP_COLUMNS = 240
_PARTITION_COLUMNS = 120
# Parts are acknowledged in lumps; more stretches than this show the lumps instead of the rate.
_INTERVALS = 80
# Bars of retries closer than this are one dark stain.
_MARKS_DRAWN = 40

_KIND_WORDS = {
    Why.READ: ("Data", "read and stored"),
    Why.SCANNED: ("Written zeros", "read, found to be all zero, not stored"),
    Why.HOLE: ("Holes", "no storage behind them, not read"),
    Why.FREE: ("Free space", "not used by its filesystem, not read"),
    Why.SWAP: ("Swap", "worthless elsewhere, not read"),
    Why.PAD: ("Padding", "added by rounding up to what the target needs"),
}
_WAIT_TITLES = {
    "working": "Working",
    "in": "Waiting for input",
    "out": "Waiting for room behind it",
    "buffer": "Waiting for memory",
}


def page(record: Record, *, origin: str = "") -> str:
    """The page.

    Args:
        origin: what it was made from, for the foot.
    """
    rows = intervals(record.series, _INTERVALS)
    sections = [
        _header(record),
        _figures(record),
        _disk(record),
        _over_time(record, rows),
        _stages(record, rows),
        _proof(record),
        _rules(record),
        _marks(record),
        _options(record),
        _versions(record, origin),
    ]
    title = escape(f"{record.name}: {_verdict(record)[1]}")
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a name in the record smuggled in: nothing is run, nothing is fetched.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n'
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )


# -- the head ---------------------------------------------------------------------------------------------------------


def _verdict(record: Record) -> tuple[str, str]:
    """(good, warn or bad; the verdict in words): claims what was compared, and no more."""
    if record.state == "failed":
        return "bad", "Failed"
    if record.state == "stored":
        return "warn", "Stored, not verified"
    if record.state == "unproven":
        return "warn", "Unproven"
    if record.state == "proven":
        return "good", "Proven by itself, not compared with the disk"
    best = max((one.coverage for one in record.verdicts if one.state == "identical"), default=0.0)
    if best >= 1:
        return "good", "Verified: identical"
    return "good", f"Verified: identical in the {best:.1%} that was compared"


def _header(record: Record) -> str:
    mood, words = _verdict(record)
    disk = record.source.get("path", "")
    what = f"{escape(format_size(record.disk_size))} disk"
    source = f"<code>{escape(disk)}</code>, " if disk else ""
    box = ""
    if record.error:
        hint = f"<p>{escape(record.hint)}</p>" if record.hint else ""
        box = f'<div class="box bad"><p><strong>{escape(record.error)}</strong></p>{hint}</div>'
    return (
        f'<header>\n<p class="kicker">Export of a disk · {escape(_date(record.created))}</p>\n'
        f"<h1>{escape(record.name)}</h1>\n"
        f'<p class="verdict {mood}">{icon(mood)}{escape(words)}</p>\n'
        f"<p>{source}{what} → <code>{escape(record.target)}</code></p>\n{box}</header>"
    )


def _date(created: str) -> str:
    """`2026-11-23 04:12 UTC`; as it stands where it is none."""
    try:
        return datetime.fromisoformat(created).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return created


def _figures(record: Record) -> str:
    size = record.disk_size
    transfer_s = record.series.elapsed_s[-1] if record.series.elapsed_s else 0.0
    rest_s = record.elapsed_s - transfer_s
    time_note = format_duration(transfer_s) + " transfer" if transfer_s else ""
    if transfer_s and rest_s > 0.05 and record.state != "failed":
        time_note += f", {format_duration(rest_s)} " + ("verification" if record.verdicts else "rest")
    cells = [("Disk", format_size(size), f"{size} bytes")]
    cells.append(("Read", format_size(record.read_bytes), _percent(record.read_bytes, size) + " of the disk"))
    if record.image_size:
        ratio = f"{_percent(record.image_size, size)} of the disk"
        cells.append((f"Image, {record.image.get('format', '')}".rstrip(", "), format_size(record.image_size), ratio))
    else:
        cells.append(("Stored", format_size(record.stored_bytes), f"{_percent(record.acked_bytes, size)} of the disk"))
    cells.append(("Time", format_duration(record.elapsed_s), time_note))
    if transfer_s and record.state != "failed":
        cells.append(("Speed", f"{format_size(round(size / transfer_s))}/s", "of disk, while it was transferred"))
    inner = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="large number">{escape(value)}</dd>'
        f'<dd class="soft small">{escape(note)}</dd></div>'
        for name, value, note in cells
    )
    return f'<dl class="figures">{inner}</dl>'


# -- the disk ---------------------------------------------------------------------------------------------------------


def _disk(record: Record) -> str:
    size = record.disk_size
    if not size:
        return ""
    if not record.runs:
        processed = min(size, max(record.acked_bytes, record.read_bytes + record.skipped_bytes))
        legend = _legend(
            [
                ("data", "Stored", "acknowledged by the target", record.acked_bytes),
                ("scanned", "On its way", "read or skipped, not acknowledged", processed - record.acked_bytes),
                ("track", "Not reached", "", size - processed),
            ],
            size,
        )
        return (
            "<section>\n<h2>How far it came</h2>\n"
            f'<p class="soft">Of the {escape(format_size(size))} of the disk. Nothing is left of it in the target '
            f"unless the message says so.</p>\n"
            f"{progress_strip(size, record.acked_bytes, processed)}{legend}\n</section>"
        )
    merged = "" if record.runs_exact else " It was too fragmented to be noted exactly; neighbours are merged."
    entries = [
        (COLOURS[kind], *_KIND_WORDS[kind], record.totals.get(kind, 0)) for kind in KINDS if record.totals.get(kind, 0)
    ]
    ticks = "".join(f"<span>{format_size(size * quarter // 4)}</span>" for quarter in (0, 2, 4))
    brackets = _brackets(record.partitions, size)
    return (
        "<section>\n<h2>What the disk held</h2>\n"
        '<p class="soft">From the first byte on the left to the last on the right; each column is divided as its '
        f"stretch of the disk is.{merged}</p>\n"
        f"{map_strip(columns(record.runs, 0, size, _MAP_COLUMNS), _kind_word)}{brackets}"
        f'<div class="scale">{ticks}</div>{_legend(entries, size)}{_partitions(record)}\n</section>'
    )


def _kind_word(kind: Why) -> str:
    return _KIND_WORDS[kind][0].lower()


def _legend(entries: Sequence[tuple[str, str, str, int]], size: int) -> str:
    items = "".join(
        f'<li><span class="swatch" style="background:var(--{colour})"></span><strong>{escape(name)}</strong>'
        f'<span class="number">{format_size(length)} <span class="soft">{_percent(length, size)}</span></span>'
        f'<span class="about soft small">{escape(about)}</span></li>'
        for colour, name, about, length in entries
    )
    return f'<ul class="legend wide">{items}</ul>'


def _brackets(partitions: Sequence[PartitionRecord], size: int) -> str:
    if not partitions:
        return ""
    spans = "".join(
        f'<span style="left:{100 * one.start / size:.3f}%;width:{100 * one.length / size:.3f}%" '
        # A number that does not fit is worse than none: the partition is named below.
        f'title="{escape(_partition_title(one))}">{one.number if one.length / size > 0.03 else ""}</span>'
        for one in partitions
    )
    return f'<div class="brackets">{spans}</div>'


def _partitions(record: Record) -> str:
    found = []
    for one in record.partitions:
        parts = columns(record.runs, one.start, one.length, _PARTITION_COLUMNS)
        stored = sum(part.kinds.get(Why.READ, 0) for part in parts)
        found.append(
            f'<div class="part"><div class="head"><h3>{escape(_partition_title(one))}</h3>'
            '<span class="soft small number">'
            f"{format_size(one.length)}, {_percent(stored, one.length)} data</span></div>"
            f"{map_strip(parts, _kind_word, css='strip thin')}</div>"
        )
    return "".join(found)


def _partition_title(one: PartitionRecord) -> str:
    return f"Partition {one.number}" + (f": {one.title}" if one.title else "")


# -- time -------------------------------------------------------------------------------------------------------------


def _over_time(record: Record, rows: Sequence[Interval]) -> str:
    if not rows or not record.disk_size:
        return ""
    duration = rows[-1].end_s
    marks = record.series.marks[:_MARKS_DRAWN]
    ticks = "".join(f"<span>{_moment(duration * half / 2)}</span>" for half in (0, 1, 2))
    entries = [("data", "read from the disk"), ("out", "sent to the target")]
    legend = "".join(
        f'<li><span class="swatch" style="background:var(--{colour})"></span>{words}</li>' for colour, words in entries
    )
    if marks:
        legend += '<li><span class="swatch tick" style="background:var(--mark)"></span>retry or fallback</li>'
    scale = f'<div class="scale">{ticks}</div>'
    return (
        '<section class="pair">\n<div><h2>Throughput</h2>\n'
        f'<ul class="legend row">{legend}</ul>{rate_plot(rows, marks, duration)}{scale}</div>\n'
        '<div><h2>Progress</h2>\n<p class="soft small">The share of the disk that the target had acknowledged; what '
        f"need not travel counts as soon as its place in the image is stored.</p>\n"
        f"{progress_plot(record.series, record.disk_size, duration)}{scale}</div>\n</section>"
    )


def _stages(record: Record, rows: Sequence[Interval]) -> str:
    busy = [name for name, times in record.timings.items() if any(times)]
    if not busy and not record.bottleneck:
        return ""
    legend = "".join(
        f'<li><span class="swatch" style="background:var(--{wait})"></span>{_WAIT_TITLES[wait]}</li>' for wait in WAITS
    )
    found = []
    for name in busy:
        times = record.timings[name]
        told = [
            f"{format_duration(seconds)} {words}"
            for seconds, words in zip(
                times, ("working", "waiting for input", "waiting for room", "waiting for memory"), strict=True
            )
            if seconds >= 0.001
        ]
        parallel = record.series.parallel.get(name, 1)
        if parallel > 1:
            told.append(f"up to {parallel} at once")
        strip = stage_strip(rows, name, rows[-1].end_s) if rows and name in record.series.stages else ""
        share = _share(rows, name)
        found.append(
            f'<div class="stage"><div class="head"><h3><code>{escape(name)}</code> {share}</h3>'
            f'<span class="soft small">{escape(" · ".join(told))}</span></div>{strip}</div>'
        )
    sentence = f'<p class="bottleneck">{escape(record.bottleneck)}</p>\n' if record.bottleneck else ""
    note = (
        '<p class="soft">Each stage from the start of the transfer to its end. Height is its share of what it could '
        "have done; what is empty was idle.</p>\n"
        if rows
        else ""
    )
    return (
        f'<section>\n<h2>Where the time went</h2>\n{sentence}{note}<ul class="legend row">{legend}</ul>'
        f"{''.join(found)}\n</section>"
    )


def _share(rows: Sequence[Interval], name: str) -> str:
    total = sum(row.end_s - row.begin_s for row in rows)
    if not total:
        return ""
    working = sum((row.end_s - row.begin_s) * row.shares.get(name, (0.0,))[0] for row in rows) / total
    return f'<span class="soft small">busy {working:.0%}</span>'


def _marks(record: Record) -> str:
    notes = "".join(f"<li><span class='soft'>plan</span><span>{escape(note)}</span></li>" for note in record.notes)
    marks = ""
    for (stage, kind, text), alike in groupby(record.series.marks, lambda mark: (mark.stage, mark.kind, mark.text)):
        moments = [mark.elapsed_s for mark in alike]
        when = _moment(moments[0]) + (f" to {_moment(moments[-1])}" if len(moments) > 1 else "")
        times = f' <span class="soft">{len(moments)} times</span>' if len(moments) > 1 else ""
        marks += (
            f'<li><span class="soft number">{when}</span>'
            f"<span><code>{escape(stage)}</code> {escape(kind)}: {escape(text)}{times}</span></li>"
        )
    if not notes and not marks:
        return ""
    retries = record.series.retries[-1] if record.series.retries else 0
    more = f'<p class="soft">{retries} {"retry" if retries == 1 else "retries"} in all.</p>' if retries else ""
    return f'<section>\n<h2>On the way</h2>\n{more}<ul class="marks">{notes}{marks}</ul>\n</section>'


# -- proof, options, versions -----------------------------------------------------------------------------------------


def _proof(record: Record) -> str:
    if record.state == "failed" and not record.verdicts:
        return ""
    verdicts = "".join(_one_verdict(one) for one in record.verdicts)
    if not record.verdicts:
        verdicts = (
            '<div class="unproven"><h3>Nothing looked at the stored image</h3><p class="soft">The chain had no verify '
            "stage. <code>pipeline verify</code> can still do it, from the manifest.</p></div>"
        )
    pairs = {"digest of the disk": record.digest} if record.digest else {}
    for what, ours, theirs in record.receipt:
        pairs[f"{what}, of the store"] = theirs + ("" if ours == theirs else f" (ours: {ours})")
    return f'<section>\n<h2>Proof</h2>\n<div class="verdicts">{verdicts}</div>{_pairs(pairs)}\n</section>'


def _rules(record: Record) -> str:
    """What the rules of the target said before the start."""
    if not record.target_rules:
        return ""
    cards = "".join(
        f'<div class="{_WEIGHTS.get(one.weight, "unproven")}"><h3>{escape(one.id)}: {escape(one.weight)}</h3>'
        f"<p>{escape(one.message)}</p>"
        + (f'<p class="soft small"><code>{escape(one.where)}</code></p>' if one.where else "")
        + (f'<p class="soft small"><code>{escape(one.remedy)}</code></p>' if one.remedy else "")
        + "</div>"
        for one in record.findings
    )
    head = f'<p class="soft">{escape(record.target_rules)}.</p>'
    return f'<section>\n<h2>Will it boot there?</h2>\n{head}<div class="verdicts">{cards}</div>\n</section>'


# The class of a verdict's card.
_TONES = {"identical": "identical", "proven": "identical", "differs": "differs", "disproven": "differs"}
_WEIGHTS = {"block": "differs", "info": "identical"}


def _one_verdict(one: VerdictRecord) -> str:
    known = _TONES.get(one.state, "unproven")
    share = "all" if one.coverage >= 1 else f"{one.coverage:.1%}"
    covered = f", {share} of the disk compared" if one.state in ("identical", "differs") else ""
    detail = f'<p class="soft">{escape(one.detail)}</p>' if one.detail else ""
    head = f"<h3>{escape(one.level)}: {escape(one.state)}{covered}</h3>"
    return f'<div class="{known}">{head}{detail}{_pairs(one.evidence)}</div>'


def _options(record: Record) -> str:
    chain = "".join(f"<li><code>{escape(name)}</code></li>" for name in record.chain)
    nothing = '<p class="soft small">no options</p>'
    cards = "".join(
        f"<div><h3><code>{escape(name)}</code></h3>{_pairs(values) or nothing}</div>"
        for name, values in record.options.items()
    )
    cards += f"<div><h3>The disk</h3>{_pairs(record.source)}</div>" if record.source else ""
    cards += f"<div><h3>The image</h3>{_pairs(record.image)}</div>" if record.image else ""
    if not cards:
        return ""
    chips = f'<ul class="chain">{chain}</ul>'
    return f'<section>\n<h2>How it was made</h2>\n{chips}<div class="cards">{cards}</div>\n</section>'


def _versions(record: Record, origin: str) -> str:
    versions = " · ".join(f"{escape(name)} {escape(value)}" for name, value in record.versions.items())
    made = f"Made by disk-pipeline {escape(__version__)}" + (f" from {escape(origin)}" if origin else "")
    return f"<footer>\n<p>{versions}</p>\n<p>{made}. This page loads nothing from elsewhere.</p>\n</footer>"


def _pairs(values: Mapping[str, str]) -> str:
    if not values:
        return ""
    inner = "".join(
        f'<dt>{escape(name)}</dt><dd class="{"soft" if value == "not set" else "mono"}">{escape(value)}</dd>'
        for name, value in values.items()
    )
    return f'<dl class="pairs">{inner}</dl>'


def _moment(seconds: float) -> str:
    return format_duration(seconds) if seconds else "0 s"


def _percent(part: int, whole: int) -> str:
    """`12%`, `0.3%`: two figures are enough for a picture."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.05:
        return "< 0.1%"
    return f"{share:.1f}%" if 0 < share < 9.95 else f"{share:.0f}%"
