"""Sizes, durations and how they are written for people."""

from __future__ import annotations

import re

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": TiB,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
}
DURATION_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_AND_UNIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class Size(int):
    """A number of bytes. Options annotated with it accept `"4 MiB"`, `"4MiB"` or a whole number."""


class Duration(float):
    """A number of seconds. Options annotated with it accept `"30 s"`, `"2 min"` or a number."""


def parse_size(text: str) -> Size:
    """Read `"4 MiB"` as bytes. Raises ValueError with the reason and the way out."""
    match = _NUMBER_AND_UNIT.fullmatch(text)
    unit = SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f'"{text}" is not a size; write for example "4 MiB", "512 KiB" or "10 GiB"')
    value = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit
    if value != int(value):
        raise ValueError(f'"{text}" is not a whole number of bytes')
    return Size(value)


def parse_duration(text: str) -> Duration:
    """Read `"30 s"` as seconds. Raises ValueError with the reason and the way out."""
    match = _NUMBER_AND_UNIT.fullmatch(text)
    unit = DURATION_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f'"{text}" is not a duration; write for example "30 s", "2 min" or "500 ms"')
    return Duration(float(match[1]) * unit)


def format_size(size: float) -> str:
    """Write a number of bytes the short way: `1.5 GiB`, `4 MiB`, `512 B`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    if value == int(value):
        return f"{int(value)} {unit}"
    return f"{value:.1f} {unit}" if abs(value) >= 10 else f"{value:.2f} {unit}"


def format_exact(size: int) -> str:
    """Write a size for people and exactly: `1.5 GiB (1610612736 bytes)`."""
    return f"{format_size(size)} ({size} bytes)"


def format_duration(seconds: float) -> str:
    """Write a duration the short way: `850 ms`, `12.3 s`, `4 min 05 s`, `3 h 02 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
