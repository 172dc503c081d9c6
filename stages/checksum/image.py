"""Hash the image as it is stored, while it passes: for whoever gets the file and has no disk to compare it with.

Pieces pass through untouched. The CRC combines and the tree has fixed windows, so both work in any order of arrival; a
sha256 of the file has to see its first byte first, so it is offered only where pieces arrive in sequence.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.facts import Fact
from pipeline.flow.items import Piece
from pipeline.flow.orders import Order
from pipeline.flow.parallel import in_thread
from pipeline.flow.stage import StageContext, StageSpec, option, pieces
from pipeline.units import MiB

if TYPE_CHECKING:
    import hashlib

    from stages.checksum.image_digest import ImageDigest

# What is noted of an image ends with whole chunks (stages/checksum/image_digest.py, which needs a library).
CHUNK = MiB
# Shorter pieces are hashed on the spot: up to here that takes less than the trip to a thread and back.
_THREAD_FROM = MiB
_ZEROS = bytes(MiB)
_ORDERS = (Order.SPARSE, Order.RANDOM, Order.HEAD_LAST, Order.SEQUENTIAL)


@dataclass(frozen=True, slots=True)
class ImageSums:
    """The digests of a stored image, as the manifest has them."""

    values: dict[str, object]

    def to_json(self) -> dict[str, object]:
        """For a manifest."""
        return self.values


IMAGE_DIGEST: Fact[ImageSums] = Fact("image digest", ImageSums, hint="Add checksum.image before the writer.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of checksum.image."""

    crc: Literal["crc64nvme", "crc32c"] = option(
        "crc64nvme", doc="The CRC of the whole file, as object stores state it."
    )
    sha256: bool = option(
        False, doc="Also what `sha256sum` prints; only where pieces arrive in sequence, and half the speed of a disk."
    )


class ImageChecksum:
    """Looks at every piece on its way to the writer."""

    def __init__(self, options: Options, context: StageContext) -> None:
        import hashlib

        from stages.checksum.image_digest import ImageDigest

        self._context = context
        self._notes = context.journal is not None
        last = context.order is Order.HEAD_LAST and context.layout is not None
        self._head = context.layout.head_length if last and context.layout is not None else 0
        self._covered = self._recalled = self._noted = self._head
        self._crc = 0  # of [head, covered)
        self._taking = threading.Lock()  # `delta` is called while a thread takes a piece in
        self._digest: ImageDigest = ImageDigest(options.crc)
        self._sha256: hashlib._Hash | None = hashlib.sha256(usedforsecurity=False) if options.sha256 else None

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[Piece]) -> None:
        """Hash and pass on. Leaves the digests of the image when the last piece has passed."""
        meter = self._context.meter
        async for piece in inlet:
            with meter.working():
                long = piece.length >= _THREAD_FROM and (piece.data is not None or self._sha256 is not None)
                if long:
                    await in_thread(self._context.threads, lambda piece=piece: self._take(piece))  # type: ignore[misc]
                else:
                    self._take(piece)
            meter.items += 1
            meter.guest_bytes += piece.guest_bytes
            await outlet.send(piece)
        values = self._digest.finish()
        if self._sha256 is not None:
            values["sha256"] = self._sha256.hexdigest()
        self._context.facts.put(IMAGE_DIGEST, ImageSums(values))

    def _take(self, piece: Piece) -> None:
        """Threads: any, one piece at a time."""
        view = piece.view
        with self._taking:
            self._take_in(piece.offset, piece.end, view)
        if self._sha256 is not None:
            if view is not None:
                self._sha256.update(view)
                return
            for start in range(0, piece.length, len(_ZEROS)):
                self._sha256.update(memoryview(_ZEROS)[: piece.length - start])

    def _take_in(self, offset: int, end: int, view: memoryview | None) -> None:
        if not self._notes or offset < self._head:
            self._add(offset, offset, end, view)
            return
        first = max(offset, self._recalled)  # what is before was taken in by an earlier process
        whole = end // CHUNK * CHUNK
        if whole > max(first, self._covered):
            self._add(offset, first, whole, view)
            reached, crc = self._digest.stretch(self._head)
            if reached == whole:
                self._covered, self._crc = whole, crc
            first = whole
        if first < end:
            self._add(offset, first, end, view)

    def _add(self, offset: int, start: int, end: int, view: memoryview | None) -> None:
        """Take in [start, end) of the piece at `offset`."""
        if view is None:
            self._digest.add_zeros(start, end - start)
        else:
            self._digest.add(start, view[start - offset : end - offset])

    # -- across processes ------------------------------------------------------------------------------------------

    @property
    def covered(self) -> int:
        """Image bytes below this, behind a head that comes last, are in what `delta` gave last, or `recall` took."""
        return self._noted

    def delta(self) -> bytes:
        """What was taken in since the last call, in whole chunks."""
        with self._taking:
            if self._covered <= self._noted:
                return b""
            dumped = self._digest.dump(self._noted, self._head, self._covered, self._crc)
            self._noted = self._covered
            return dumped

    def recall(self, delta: bytes) -> None:
        """Take in what an earlier process did; pieces below `covered` are ignored then."""
        self._covered = self._recalled = self._noted = self._digest.load(delta, self._head)
        self._crc = self._digest.stretch(self._head)[1]


def orders(options: Options) -> tuple[Order, ...]:
    """A sha256 can't be put together from parts."""
    return (Order.SEQUENTIAL,) if options.sha256 else _ORDERS


def not_resumable(options: Options) -> str:
    """Why its state can't be saved."""
    return "the state of a sha256 can't be saved (checksum.image: leave sha256 out)" if options.sha256 else ""


def orders_hint(options: Options) -> str:
    """Why it takes no other order."""
    if not options.sha256:
        return ""
    return "a sha256 has to see the file from its first byte to its last: leave sha256 out, the CRC and the tree remain"


SPEC = StageSpec(
    name="checksum.image",
    summary="Hash the image as it is stored: a CRC that object stores state too, and a tree over 8 MiB windows.",
    options=Options,
    takes=pieces(*_ORDERS),
    gives=pieces(*_ORDERS),
    build=ImageChecksum,
    orders=orders,
    orders_hint=orders_hint,
    not_resumable=not_resumable,
    provides=(IMAGE_DIGEST,),
)
