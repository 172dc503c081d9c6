"""How long it takes to look at a large image without fetching it."""

from __future__ import annotations

import sys
from pathlib import Path

from perf.case import Attempt, Case, Contender, Goal, Ground
from perf.measure import one

# The page cache is cold for the first only; the figure is the median of the steps.
_TIMES = 5


def _image(disk: Path) -> Path:
    """The image, kept beside the disks for the next round; it does not hold the disk."""
    from tests.decode.large import make_large_qcow2

    image = disk.with_name("inspect-100g.qcow2")
    if not image.exists():
        make_large_qcow2(image.with_suffix(".partial")).rename(image)
    return image


def _inspect(ground: Ground) -> Attempt:
    command = (*ground.product[:-1], "inspect", "-f", "qcow2")
    run = (sys.executable, "-m", "perf.inspect_over_http", str(_image(ground.disk)), *command)
    return Attempt(steps=(one(*run),) * _TIMES)


CASES = (
    Case(
        name="inspect-http",
        summary="inspect a qcow2 of 100 GiB (virtual) with 10 GiB of data all over, over HTTP; moves under 32 MiB",
        disk="text",
        ours=Contender("pipeline inspect over HTTP", _inspect),
        goals=(Goal("step time", 2.0),),
    ),
)
