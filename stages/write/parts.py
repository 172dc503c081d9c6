"""Plan the numbered parts of an object: where each begins, and how long it is, before the first byte moves.

The image's final length is rarely known, so the plan covers the longest image there can be: small parts at first, which
fit in memory and are cheap to send again, and longer ones later, so that a store's limit on the number of parts holds
even then. An image that ends early ends inside a part, and leaves the rest of the plan unused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import PlanError
from pipeline.flow.orders import PartLimits
from pipeline.units import MiB, format_exact, format_size

# The length of the first parts where the store allows it. Half of it doubles the requests of a small image, twice of
# it leaves room for only a few parts in the default memory; both send the same bytes.
BASE_PART = 8 * MiB
# In how many steps parts grow when they have to. More steps keep early parts small a little longer.
STEPS = 10


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One part: its number in the store (from 1) and its image bytes [start, start + length)."""

    number: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """Image offset behind the part."""
        return self.start + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlan:
    """The parts of the longest image, by image offset.

    Attributes:
        head_length: part 1 is the head, [0, head_length), and is stored last; 0 where nothing comes last.
        parts: in image order, tiling [0, image_bytes_max).
        single: the image always fits one request, and its parts are never used as such.
    """

    head_length: int
    parts: tuple[PlannedPart, ...]
    single: bool = False

    @property
    def body(self) -> tuple[PlannedPart, ...]:
        """The parts behind the head, in the order in which their bytes arrive."""
        return self.parts[1:] if self.head_length else self.parts

    @property
    def longest(self) -> int:
        """Bytes of the longest part."""
        return max((part.length for part in self.parts), default=0)

    def describe(self) -> str:
        """For people: how many parts of which sizes there are at most."""
        if self.single:
            return "one request, no parts"
        sizes = sorted({part.length for part in self.body[:-1]} or {self.longest})
        span = format_size(sizes[0]) + (f" growing to {format_size(sizes[-1])}" if len(sizes) > 1 else "")
        return f"at most {len(self.parts)} of {span}"


def needs_parts(limits: PartLimits, image_bytes_max: int) -> bool:
    """Whether an image that may become this long is stored in parts; a shorter one goes up in one request.

    For the planning: only an image in parts needs a head of at least the store's smallest part.
    """
    return image_bytes_max > limits.whole_max


def head_minimum(limits: PartLimits, image_bytes_max: int) -> int:
    """How long a head that comes last has to be so that it can be a part of its own.

    Args:
        image_bytes_max: of the image with the head as short as the format allows.
    Returns:
        0 where the whole image goes up in one request.
    """
    if not needs_parts(limits, image_bytes_max):
        return 0
    return _equal_length(limits, image_bytes_max) if limits.equal else limits.part_min


def plan_parts(limits: PartLimits, *, image_bytes_max: int, head_length: int = 0) -> PartPlan:
    """Lay out the parts of the longest image.

    Args:
        head_length: image bytes that come last, and so are a part of their own (number 1); 0 for none.
    Raises:
        PlanError: no layout within the store's limits holds such an image; says which limit, and by how much.
    """
    if image_bytes_max > limits.object_max:
        raise PlanError(
            f"an image of this disk can be {format_exact(image_bytes_max)} long, "
            f"and the store takes objects of at most {format_exact(limits.object_max)}",
            operation="plan",
            hint="Export fewer partitions, or write to a file or block device.",
        )
    if not needs_parts(limits, image_bytes_max):
        whole = PlannedPart(1, 0, image_bytes_max)
        return PartPlan(head_length=0, parts=(whole,), single=True)
    if head_length:
        _check_head(limits, head_length)
    count = limits.parts_max - (1 if head_length else 0)
    body = image_bytes_max - head_length
    if limits.equal:
        length = head_length or _equal_length(limits, image_bytes_max)
        lengths = [(count, length)]
    else:
        lengths = _grow(limits, body, count)
    if sum(number * length for number, length in lengths) < body:
        raise PlanError(
            f"an image of this disk can be {format_exact(image_bytes_max)} long, and {limits.parts_max} parts of "
            f"{'the same length, ' if limits.equal else 'at most '}{format_size(lengths[-1][1])} do not hold it",
            operation="plan",
            hint="Export fewer partitions, or write to a store that takes more or longer parts.",
        )
    parts = [PlannedPart(1, 0, head_length)] if head_length else []
    start = head_length
    for length in _each(lengths):
        if start >= image_bytes_max:
            break
        # A last part may be of any length, so it is planned no longer than the image can be.
        parts.append(PlannedPart(len(parts) + 1, start, min(length, image_bytes_max - start)))
        start = parts[-1].end
    return PartPlan(head_length=head_length, parts=tuple(parts))


def _check_head(limits: PartLimits, head_length: int) -> None:
    if not limits.part_min <= head_length <= limits.part_max:
        raise PlanError(
            f"the head of the image is {format_exact(head_length)} long and has to be a part of its own, "
            f"which the store takes from {format_size(limits.part_min)} to {format_size(limits.part_max)}",
            operation="plan",
            hint="Choose a format whose head fits (qcow2), or one without a head (raw).",
        )


def _equal_length(limits: PartLimits, image_bytes_max: int) -> int:
    """The one length of a store that wants all parts the same: the shortest in whole MiB that covers the image."""
    wanted = -(-image_bytes_max // (limits.parts_max * MiB)) * MiB
    return min(limits.part_max, max(limits.part_min, BASE_PART, wanted))


def _grow(limits: PartLimits, body: int, count: int) -> list[tuple[int, int]]:
    """(how many, how long) per step: the gentlest growth with which `count` parts hold `body` bytes."""
    steps = min(STEPS, count)
    counts = [count * (step + 1) // steps - count * step // steps for step in range(steps)]
    base = min(limits.part_max, max(limits.part_min, BASE_PART))

    def lengths(ratio: float) -> list[tuple[int, int]]:
        return [
            (number, min(limits.part_max, max(base, _whole_mib(base * ratio**step))))
            for step, number in enumerate(counts)
        ]

    def holds(ratio: float) -> bool:
        return sum(number * length for number, length in lengths(ratio)) >= body

    low, high = 1.0, 1.0
    while not holds(high) and base * high < limits.part_max:
        low, high = high, high * 2
    if high == 1.0:
        return lengths(1.0)
    if not holds(high):  # so close to the store's limits that no part can be small
        return [(count, limits.part_max)]
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return lengths(high)


def _whole_mib(length: float) -> int:
    return -(-int(length) // MiB) * MiB if length >= MiB else int(length)


def _each(lengths: list[tuple[int, int]]) -> Iterator[int]:
    for number, length in lengths:
        for _ in range(number):
            yield length
