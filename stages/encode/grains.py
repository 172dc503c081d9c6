"""Which stretches of a window an encoder has to store."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.flow.items import Run


def touched_grains(runs: Sequence[Run], base: int, grain: int) -> list[tuple[int, int]]:
    """(first, stop) of the grains that a data run overlaps, ascending and apart, counted from guest offset `base`."""
    ranges: list[tuple[int, int]] = []
    for run in runs:
        if not run.is_data:
            continue
        first, stop = (run.offset - base) // grain, -(-(run.end - base) // grain)
        if ranges and first <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((first, stop))
    return ranges
