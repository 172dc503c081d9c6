"""The image that Google Compute Engine imports: `disk.raw` in a tar archive, compressed with gzip.

The archive is a chain of gzip members, so windows are compressed in parallel: one member for the tar header, one for
each window, and ready-made ones for zeros. Concatenated members are one gzip file (RFC 1952, 2.2), and what they hold
is one archive.

Source: Google Cloud, "Import boot disk images", image file requirements; RFC 1952; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.flow.buffers import Charge, Slice, charged_slice, loose_slice
from pipeline.flow.items import Block, Piece
from pipeline.flow.orders import Order
from pipeline.flow.stage import BLOCKS, Layout, LayoutRequest, StageContext, StageSpec, option, pieces
from pipeline.units import GiB, KiB, MiB, TiB, format_exact
from stages.encode.birth import REPRODUCIBLE_DOC, Birth
from stages.encode.checkpoints import identify, pack_state, unpack_state
from stages.encode.cursor import Cursor
from stages.encode.gzip_zeros import MEMBER_MAX, zero_member
from stages.encode.rounding import round_disk
from stages.encode.tar import archive_end, member_header

ROUND = 1 * GiB
BOOT_DISK_MAX = 2 * TiB
MEMBER_NAME = "disk.raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of encode.gce."""

    level: Literal["fast", "small"] = option("fast", doc="small takes 3 times as long for a smaller image.")
    reproducible: bool = option(True, doc=REPRODUCIBLE_DOC)


@dataclass(frozen=True, slots=True)
class Member:
    """A block as a gzip member; without `data` it is zero. Owns `data`."""

    offset: int
    length: int
    data: Slice | None = None


class GceEncoder:
    """Append gzip members: the tar header, the windows, the archive's end."""

    def __init__(self, options: Options, context: StageContext) -> None:
        from stages.encode.codecs import gzip_member

        self._codec = gzip_member(options.level)
        self._size, _ = round_disk(context.disk_size, ROUND, "")
        self._disk_size = context.disk_size
        self._window = context.window
        self._birth = Birth.of(options.reproducible, context)
        self._identity = ""
        self._cursor = Cursor(0, context.disk_size)

    @property
    def position(self) -> int:
        """Image offset behind the last byte placed."""
        return self._cursor.position

    @property
    def identity(self) -> str:
        """A digest of all that shapes the image besides the disk."""
        if not self._identity:
            self._identity = identify(
                encoder="gce 1",
                codec=self._codec.identity(),
                zeros=hashlib.sha256(zero_member(MiB)).hexdigest(),
                disk_size=self._disk_size,
                window=self._window,
                birth=self._birth.shape,
            )
        return self._identity

    def prepare(self, block: Block, charge: Charge | None) -> Member:
        """Compress a window. Takes over its slice and `charge`. Threads: any, several at once; keeps no state."""
        source = block.data
        try:
            if source is None or not any(run.is_data for run in block.runs):
                if charge is not None:
                    charge.release()
                return Member(block.offset, block.length)
            made = self._codec.compress(source.view)
            return Member(
                block.offset, block.length, charged_slice(made, charge) if charge is not None else loose_slice(made)
            )
        except BaseException:
            if charge is not None:
                charge.release()
            raise
        finally:
            if source is not None:
                source.release()

    def place(self, prepared: Member) -> list[Piece]:
        """Append a window's member. The caller owns the pieces.

        Raises:
            StageError: the blocks don't come in guest order.
        """
        placed: list[Piece] = []
        try:
            self._cursor.enter(prepared.offset)
        except BaseException:
            if prepared.data is not None:
                prepared.data.release()
            raise
        if self._cursor.position == 0:
            header = member_header(MEMBER_NAME, self._size, dialect="oldgnu", time=self._birth.time)
            placed.append(self._put(self._codec.compress(header)))
        if prepared.data is not None:
            placed.append(self._cursor.put(prepared.data, len(prepared.data)))
        else:
            placed += self._zeros(prepared.length)
        return self._cursor.leave(prepared.length, placed)

    def finish(self) -> Iterator[Piece]:
        """The zeros that were added to the disk, and those that end the archive.

        Raises:
            StageError: the blocks ended before the disk.
        """
        self._cursor.check_end()
        end = archive_end(512 + self._size)
        yield from self._zeros(self._size - self._disk_size + end)

    def _zeros(self, length: int) -> Iterator[Piece]:
        while length:
            part = min(length, MEMBER_MAX)
            yield self._put(zero_member(part))
            length -= part

    def _put(self, member: bytes) -> Piece:
        return self._cursor.put(member, len(member))

    def checkpoint(self) -> bytes:
        """The positions; nothing else is remembered."""
        return pack_state(self.identity, {"cursor": self._cursor.dump(), "birth": self._birth.dump()})

    def restore(self, state: bytes) -> None:
        """Go back to a checkpoint.

        Raises:
            PlanError: it is damaged, or was made with other options, for another disk, or by a codec that gives
                other bytes.
        """
        note, _ = unpack_state(self.identity, state)
        self._cursor.load(note["cursor"])
        self._birth = self._birth.load(note["birth"])


def longest_member(length: int) -> int:
    """Bytes of the gzip member of `length` bytes of noise: stored blocks, and tables that ISA-L writes in between."""
    return length + length // KiB + 64


def plan_layout(options: Options, request: LayoutRequest) -> Layout:
    """How long the image can get."""
    size, notes = round_disk(request.disk_size, ROUND, "Google takes whole GiB only")
    if size > BOOT_DISK_MAX:
        notes = (
            *notes,
            f"Google boots from disks of at most {format_exact(BOOT_DISK_MAX)}; larger ones hold data only",
        )
    windows = -(-request.disk_size // request.window)
    # Zeros are shorter by far; the last term is the tar header and what stands behind the disk.
    longest = windows * longest_member(request.window) + (size - request.disk_size) // 512 + 64 * KiB
    return Layout(
        format="gce",
        virtual_size=size,
        head_length=0,
        image_bytes_max=longest,
        made_max=longest_member(request.window),
        notes=notes,
    )


SPEC = StageSpec(
    name="encode.gce",
    summary="Write the tar.gz with disk.raw that Google Compute Engine imports.",
    options=Options,
    takes=BLOCKS,
    gives=pieces(Order.SEQUENTIAL),
    build=GceEncoder,
    layout=plan_layout,
)
