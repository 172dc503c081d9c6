"""The pictures of a report, as inline SVG. Text stands beside them in HTML: a stretched picture would stretch it.

Colours are names of report.css. Tooltips are SVG's own `<title>`, which needs no script.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from pipeline.flow.items import Why
from pipeline.flow.series import Mark, Series
from pipeline.observe.record import Column, Interval
from pipeline.units import GiB, KiB, MiB, TiB, format_duration, format_size

# From the bottom up; what was stored first.
KINDS = (Why.READ, Why.SCANNED, Why.SWAP, Why.FREE, Why.PAD, Why.HOLE)
COLOURS = {
    Why.READ: "data",
    Why.SCANNED: "scanned",
    Why.SWAP: "swap",
    Why.FREE: "free",
    Why.PAD: "pad",
    Why.HOLE: "hole",
}
WAITS = ("working", "in", "out", "buffer")
_WAIT_WORDS = ("working", "waiting for input", "waiting for room", "waiting for memory")
_HEIGHT = 100


def map_strip(columns: Sequence[Column], words: Callable[[Why], str], *, css: str = "strip") -> str:
    """The disk from left to right; each column is divided as its stretch of the disk is."""
    shapes: dict[Why, list[str]] = {kind: [] for kind in KINDS}
    hints = []
    for index, column in enumerate(columns):
        top = float(_HEIGHT)
        told = []
        for kind in KINDS:
            share = column.kinds.get(kind, 0) / column.length
            if not share:
                continue
            height = share * _HEIGHT
            top -= height
            # A little wider than a column: renderers leave hairlines between shapes that only touch.
            shapes[kind].append(f"M{index} {top:.2f}h1.04v{height:.2f}h-1.04z")
            told.append(f"{share:.0%} {words(kind)}")
        place = f"{format_size(column.start)} to {format_size(column.start + column.length)}"
        hints.append(
            f'<rect x="{index}" width="1" height="{_HEIGHT}" fill="transparent">'
            f"<title>{escape(place)}: {escape(', '.join(told) or 'nothing known')}</title></rect>"
        )
    paths = "".join(
        f'<path fill="var(--{COLOURS[kind]})" d="{"".join(parts)}"/>' for kind, parts in shapes.items() if parts
    )
    drawn = _svg(len(columns), _HEIGHT, paths + "".join(hints), "The disk from its start to its end")
    return f'<div class="{css}">{drawn}</div>'


def progress_strip(disk_size: int, acked: int, processed: int) -> str:
    """How far a run came that did not get to its end."""
    done, seen = 1000 * acked / disk_size, 1000 * max(acked, processed) / disk_size
    return (
        '<div class="strip">'
        + _svg(
            1000,
            10,
            f'<rect width="{seen:.1f}" height="10" fill="var(--scanned)"/>'
            f'<rect width="{done:.1f}" height="10" fill="var(--data)"/>',
            "How much of the disk was stored",
        )
        + "</div>"
    )


def rate_plot(rows: Sequence[Interval], marks: Sequence[Mark], duration_s: float) -> str:
    """Bytes a second over time: read from the disk as an area, sent to the store as a line."""
    ceiling = nice_rate(max((max(row.read_rate, row.stored_rate) for row in rows), default=0.0))

    def steps(value: Callable[[Interval], float]) -> str:
        points = []
        for row in rows:
            height = _HEIGHT * (1 - min(1.0, max(0.0, value(row)) / ceiling))
            points.append(f"{_x(row.begin_s, duration_s)} {height:.2f}L{_x(row.end_s, duration_s)} {height:.2f}")
        return "L".join(points)

    read, sent = steps(lambda row: row.read_rate), steps(lambda row: row.stored_rate)
    end = _x(rows[-1].end_s, duration_s)
    hints = "".join(
        f'<rect x="{_x(row.begin_s, duration_s)}" width="{_x(row.end_s - row.begin_s, duration_s)}" height="{_HEIGHT}" '
        f'fill="transparent"><title>{format_duration(row.begin_s)} to {format_duration(row.end_s)}: read '
        f"{format_size(round(row.read_rate))}/s, sent {format_size(round(row.stored_rate))}/s</title></rect>"
        for row in rows
    )
    drawn = (
        f'<path d="M0 50H1000" {_LINE} stroke="var(--line)"/>'
        f'<path d="M0 {_HEIGHT}L{read}L{end} {_HEIGHT}z" fill="var(--data)" opacity="0.3"/>'
        f'<path d="M{read}" {_LINE} stroke="var(--data)"/>'
        f'<path d="M{sent}" {_LINE} stroke="var(--out)"/>'
        f"{_marks(marks, duration_s)}{hints}"
    )
    labels = (
        f'<span style="top:5px">{format_size(ceiling)}/s</span>'
        f'<span style="top:calc(50% + 4px)">{format_size(ceiling / 2)}/s</span>'
    )
    return f'<div class="plot">{_svg(1000, _HEIGHT, drawn, "Bytes a second over time")}{labels}</div>'


def progress_plot(series: Series, disk_size: int, duration_s: float) -> str:
    """The share of the disk that the store had acknowledged, over time."""
    points = [(0.0, 0.0)] + [
        (moment, min(1.0, max(0, acked) / disk_size))
        for moment, acked in zip(series.elapsed_s, series.acked_bytes, strict=True)
    ]
    line = "L".join(f"{_x(moment, duration_s)} {_HEIGHT * (1 - share):.2f}" for moment, share in points)
    drawn = (
        f'<path d="M0 50H1000" {_LINE} stroke="var(--line)"/>'
        f'<path d="M{line}L{_x(points[-1][0], duration_s)} {_HEIGHT}z" fill="var(--done)" opacity="0.3"/>'
        f'<path d="M{line}" {_LINE} stroke="var(--done)"/>'
    )
    labels = '<span style="top:5px">100%</span><span style="top:calc(50% + 4px)">50%</span>'
    return f'<div class="plot low">{_svg(1000, _HEIGHT, drawn, "Share of the disk that was stored")}{labels}</div>'


def stage_strip(rows: Sequence[Interval], name: str, duration_s: float) -> str:
    """What one stage did with its time, from left to right; what is empty is idle."""
    shapes: list[list[str]] = [[] for _ in WAITS]
    hints = []
    for row in rows:
        x, width = _x(row.begin_s, duration_s), _x(row.end_s - row.begin_s, duration_s)
        top = float(_HEIGHT)
        shares = row.shares.get(name, (0.0, 0.0, 0.0, 0.0))
        for parts, share in zip(shapes, shares, strict=True):
            height = share * _HEIGHT
            top -= height
            if height >= 0.05:
                parts.append(f"M{x} {top:.1f}h{width}v{height:.1f}h-{width}z")
        told = ", ".join(
            f"{share:.0%} {word}" for share, word in zip(shares, _WAIT_WORDS, strict=True) if share >= 0.005
        )
        hints.append(
            f'<rect x="{x}" width="{width}" height="{_HEIGHT}" fill="transparent"><title>'
            f"{format_duration(row.begin_s)} to {format_duration(row.end_s)}: {told or 'idle'}</title></rect>"
        )
    paths = "".join(
        f'<path fill="var(--{wait})" d="{"".join(parts)}"/>' for wait, parts in zip(WAITS, shapes, strict=True) if parts
    )
    return f'<div class="strip">{_svg(1000, _HEIGHT, paths + "".join(hints), f"What {name} did over time")}</div>'


def icon(state: str) -> str:
    """A tick, a cross or an exclamation mark: never colour alone."""
    inner = {
        "good": '<path d="M7 12.5l3.4 3.4L17 9"/>',
        "warn": '<path d="M12 7v6.2M12 16.4v.4"/>',
        "bad": '<path d="M8.2 8.2l7.6 7.6M15.8 8.2l-7.6 7.6"/>',
    }[state]
    return (
        '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2.2" stroke-linecap="round" '
        f'stroke-linejoin="round" aria-hidden="true"><circle cx="12" cy="12" r="9.5"/>{inner}</svg>'
    )


def nice_rate(highest: float) -> float:
    """The end of an axis: 1, 2 or 5 times a power of ten of a binary unit, at least `highest`."""
    for unit in (KiB, MiB, GiB, TiB):
        for factor in (1, 2, 5, 10, 20, 50, 100, 200, 500):
            if highest <= factor * unit:
                return float(factor * unit)
    return highest


_LINE = 'fill="none" stroke-width="1.5" vector-effect="non-scaling-stroke"'


def _marks(marks: Sequence[Mark], duration_s: float) -> str:
    return "".join(
        f'<path d="M{_x(mark.elapsed_s, duration_s)} 0V{_HEIGHT}" {_LINE} stroke="var(--mark)" stroke-dasharray="3 3">'
        f"<title>{format_duration(mark.elapsed_s)}, {escape(mark.stage)}: {escape(mark.text)}</title></path>"
        for mark in marks
    )


def _x(moment_s: float, duration_s: float) -> str:
    return f"{1000 * min(1.0, moment_s / duration_s):.1f}" if duration_s > 0 else "0"


def _svg(width: int, height: int, inner: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" width="100%" height="100%" role="img" '
        f'aria-label="{escape(label)}">{inner}</svg>'
    )
