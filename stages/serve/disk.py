"""What a server gives out: a disk that is read in spans, and perhaps written."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from stages.decode.image import Extent


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring bytes of an answer; without `data` they are zero."""

    length: int
    data: memoryview | None


class ServedDisk(Protocol):
    """A disk by ranges. All offsets are guest bytes inside of it. Safe to use from many tasks at once.

    Attributes:
        can_write: whether `write` and `zero` may be called.
    """

    @property
    def size(self) -> int: ...

    @property
    def can_write(self) -> bool: ...

    async def read(self, offset: int, length: int) -> Sequence[Span]:
        """Spans that tile the range, of memory that nobody changes any more.

        Args:
            length: at most `PIECE_MAX`.
        Raises:
            FormatError, StoreError: it can't be read.
        """
        ...

    def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """Tile the range with data and zeros. Raises as `read`."""
        ...

    async def write(self, offset: int, data: memoryview) -> None:
        """Replace bytes. Raises StoreError: no room, or as `read`."""
        ...

    async def zero(self, offset: int, length: int) -> None:
        """Make bytes zero, at little cost however many. Raises as `write`."""
        ...

    async def flush(self) -> None:
        """What was written survives the process. Raises StoreError."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """Neighbouring bytes that lie in a file as they are, at `at`; None: they are zero."""

    length: int
    at: int | None


@runtime_checkable
class InFile(Protocol):
    """A disk of which a local file holds much as it is, so that the kernel can send it without us.

    Attributes:
        fd: of the file, borrowed; None where there is none.
    """

    @property
    def fd(self) -> int | None: ...

    async def locate(self, offset: int, length: int) -> Sequence[Stored] | None:
        """What tiles the range; None where not all of it lies there as it is. Raises as `ServedDisk.read`."""
        ...
