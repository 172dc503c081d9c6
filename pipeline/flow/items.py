"""What travels through a chain: blocks of the guest disk, pieces of the image, and its verdict.

Two address spaces: *guest* (the disk as the guest sees it) and *image* (the file being written). A Block lives in
the first, a Piece in the second; an encoder turns one into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

from pipeline.flow.buffers import Slice


class Content(Enum):
    """All that an encoder looks at."""

    DATA = "data"
    ZERO = "zero"


class Why(Enum):
    """Why a range is what it is. For reports and target rules; no encoder looks at it."""

    READ = "read"
    HOLE = "hole"  # the source has no storage there
    SCANNED = "scanned"  # read, and every byte was zero
    FREE = "free"  # the filesystem does not use it
    SWAP = "swap"
    PAD = "pad"  # rounding up to what the target needs


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of guest bytes of one kind. `offset` and `length` are guest bytes."""

    offset: int
    length: int
    content: Content
    why: Why

    @property
    def end(self) -> int:
        """Guest offset of the first byte behind the run."""
        return self.offset + self.length

    @property
    def is_data(self) -> bool:
        """Whether an encoder has to store these bytes."""
        return self.content is Content.DATA


@dataclass(frozen=True, slots=True)
class Block:
    """One aligned window of guest bytes with its runs, or one long skip without data.

    Blocks tile the disk: ascending, no gap, no overlap. Runs tile the block. Where `data` is None the whole block
    reads as zero and may be of any length (a multiple of the window, or up to the end of the disk); else
    `data.view` holds exactly `length` bytes with its zero runs really zeroed.
    Whoever receives a block owns its slice.
    """

    offset: int
    length: int
    data: Slice | None
    runs: tuple[Run, ...]

    @property
    def end(self) -> int:
        """Guest offset of the first byte behind the block."""
        return self.offset + self.length

    @property
    def guest_bytes(self) -> int:
        """How much of the disk the block accounts for."""
        return self.length

    def release(self) -> None:
        """Give the slice back, if there is one."""
        if self.data is not None:
            self.data.release()


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes at an offset of the image file.

    Attributes:
        offset: image bytes.
        length: image bytes.
        data: `length` bytes; None: these image bytes are zero, and the writer sends zeros, clears, or skips as
            its target needs. `bytes` only for small metadata that no ledger counts.
        guest_bytes: how much of the disk the piece accounts for; the sum over an image is exactly the disk's size.
        generation: 0, or of which further look at the disk (`pipeline.flow.rereading`): image bytes that came before
            are replaced by those of a later generation, zeros too. Accounts for no guest bytes then.
    """

    offset: int
    length: int
    data: Slice | bytes | None
    guest_bytes: int
    generation: int = 0

    @property
    def end(self) -> int:
        """Image offset of the first byte behind the piece."""
        return self.offset + self.length

    @property
    def view(self) -> memoryview | None:
        """The bytes, borrowed from the piece; None where they are zero."""
        if isinstance(self.data, Slice):
            return self.data.view
        return None if self.data is None else memoryview(self.data)

    def release(self) -> None:
        """Give the slice back, if there is one."""
        if isinstance(self.data, Slice):
            self.data.release()


@dataclass(slots=True)
class ImageWindow:
    """Bytes of an image that are compressed together: one window of it, the shorter last one, or only zeros.

    Zeros may be any number of whole windows. What no part covers is zero. Whoever receives it owns its slices.

    Attributes:
        offset, length: image bytes, before compressing.
        parts: (start in the window, bytes), ascending; a buffer may be longer than the window.
        guest_bytes: how much of the disk it accounts for.
    """

    offset: int
    length: int
    parts: list[tuple[int, Slice | bytes | bytearray]]
    guest_bytes: int

    @property
    def is_zero(self) -> bool:
        """Whether nothing in it has to be looked at."""
        return not self.parts

    def joined(self, scratch: bytearray | None = None) -> memoryview:
        """All of it in one stretch of memory, borrowed where one part is all there is, else copied. Threads: any.

        Args:
            scratch: where it is copied to, at least as long; the result is valid until it is used again. Fresh memory
                costs a page fault for every 4 KiB, which is as much time as a fast codec takes for a third of them.
        """
        if len(self.parts) == 1:
            only = _view(self.parts[0][1])
            if only.nbytes >= self.length:
                return only[: self.length]
        whole = memoryview(scratch if scratch is not None else bytearray(self.length))[: self.length]
        position = 0
        for start, data in self.parts:
            view = _view(data)[: self.length - start]
            _clear(whole[position:start])
            position = start + view.nbytes
            whole[start:position] = view
        _clear(whole[position:])
        return whole

    def release(self) -> None:
        """Give the slices back."""
        for _, data in self.parts:
            if isinstance(data, Slice):
                data.release()
        self.parts = []


def _view(data: Slice | bytes | bytearray) -> memoryview:
    return data.view if isinstance(data, Slice) else memoryview(data)


_ZEROS = bytes(64 * 1024)


def _clear(view: memoryview) -> None:
    for start in range(0, view.nbytes, len(_ZEROS)):
        part = view[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: part.nbytes]


class RangeReader(Protocol):
    """Random reads of a stored object or file. Safe to call concurrently from many tasks."""

    @property
    def size(self) -> int:
        """Length of the object in bytes."""
        ...

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at image offset `offset`.

        Raises:
            StoreError: the store failed; `temporary` where the same call may succeed later.
            FormatError: the range reaches beyond the end (a truncated image); never zero-filled.
        """
        ...


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the store itself says about the sealed image, and what we know that it should say.

    Attributes:
        size: bytes the store reports.
        proofs: (what was compared, ours, theirs) for every value that both sides have; a proof covers all bytes.
        note: why there is no proof, where there is none.
    """

    size: int
    proofs: tuple[tuple[str, str, str], ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A sealed image: complete and readable, not yet published."""

    uri: str
    size: int
    open_reader: Callable[[], AbstractAsyncContextManager[RangeReader]]
    fetch_receipt: Callable[[], AbstractAsyncContextManager[Receipt]] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification found.

    Attributes:
        level: which verification said it ("receipt", "sample", "readback", "prove").
        state: of a comparison with the disk: "identical" claims only what `coverage` says, "unproven" that nothing
            could be compared. Of an image that was looked at by itself: "proven" to be sound, "disproven", or
            "unknown"; none of these three says whether it is the disk.
        coverage: share of the guest disk (0.0 to 1.0) that was compared.
        differing: guest ranges that differ, the first few.
        detail: one sentence for people.
    """

    level: str
    state: Literal["identical", "differs", "unproven", "proven", "disproven", "unknown"]
    coverage: float
    differing: tuple[range, ...] = ()
    detail: str = ""
    evidence: dict[str, str] = field(default_factory=dict)


def weakest(verdicts: Sequence[Verdict]) -> Literal["identical", "proven", "unproven", "stored"]:
    """What verdicts, of which none is bad, come to: "stored" when nothing was asked.

    One comparison that says "identical" is enough; an image that was to be proven by itself and could not be is not.
    """
    states = {one.state for one in verdicts}
    if not states:
        return "stored"
    if "unknown" in states:
        return "unproven"
    if "identical" in states:
        return "identical"
    return "unproven" if "unproven" in states else "proven"


def tiles(runs: tuple[Run, ...], offset: int, length: int) -> bool:
    """Whether the runs cover [offset, offset + length) ascending, without gap or overlap."""
    position = offset
    for run in runs:
        if run.offset != position or run.length <= 0:
            return False
        position = run.end
    return position == offset + length
