"""In which order pieces arrive, and what a sink can live with.

A sink states traits; the four presets have names. Encoders list the orders that they can produce, and the wiring takes
the first one that the sink accepts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from pipeline.units import GiB, MiB


class Order(Enum):
    """How pieces arrive at a sink."""

    SEQUENTIAL = "sequential"  # 0, 1, 2 ... no gap
    HEAD_LAST = "head last"  # sequential behind a head of known size, which comes last
    RANDOM = "random"  # any order, every byte written
    SPARSE = "sparse"  # any order, bytes never written read as zero


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLimits:
    """What a store wants of the parts of one object. Bytes and counts.

    Attributes:
        whole_max: an image that is surely not longer is sent in one request, without parts.
        equal: every part but the last has the same length.
    """

    part_min: int = 5 * MiB
    part_max: int = 5 * GiB
    parts_max: int = 10_000
    object_max: int = 48 * 1024 * GiB
    whole_max: int = 8 * MiB
    equal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a sink can do.

    Attributes:
        arrival: whether bytes have to come in ascending order.
        rewrite: which part of the image may be written after bytes behind it.
        gaps: what bytes never written are: refused, anything, or zero.
        needs_length: the exact image length has to be known before the first byte.
        parts: limits of a store that takes numbered parts.
    """

    arrival: Literal["in order", "any"]
    rewrite: Literal["none", "head", "any"]
    gaps: Literal["forbidden", "undefined", "zero"]
    needs_length: bool = False
    parts: PartLimits | None = None

    @property
    def accepts(self) -> tuple[Order, ...]:
        """The orders this sink can take, the freest first."""
        orders = []
        if self.arrival == "any" and self.gaps == "zero":
            orders.append(Order.SPARSE)
        if self.arrival == "any" and self.rewrite == "any":
            orders.append(Order.RANDOM)
        if self.rewrite in ("head", "any"):
            orders.append(Order.HEAD_LAST)
        return (*orders, Order.SEQUENTIAL)


# Named as in the design: what each preset's stores have in common.
SEQUENTIAL_SINK = Traits(arrival="in order", rewrite="none", gaps="forbidden")
HEAD_LAST_SINK = Traits(arrival="in order", rewrite="head", gaps="forbidden", parts=PartLimits())
RANDOM_SINK = Traits(arrival="any", rewrite="any", gaps="undefined")
SPARSE_SINK = Traits(arrival="any", rewrite="any", gaps="zero")
