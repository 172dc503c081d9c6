"""OVA: a tar archive with a machine's description, its disk as a streamOptimized VMDK, and a manifest of digests.

    0       tar header | description, padded to 16 KiB with empty lines | tar header of the disk
    17408   the disk ... | tar header | manifest | the archive's end

The first two members tell how long the disk became, so they come last. A store that wants a longer head gets the first
bytes of the disk with it, which wait in memory until then: an archive has no room for gaps.

The manifest needs a SHA-256 of the whole disk image, whose state can't be saved: an OVA can't be resumed.

Source: DMTF DSP0243, "OVF Package" and "Distribution as a Single File"; POSIX.1-1988 ("ustar").
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.errors import StageError
from pipeline.flow.buffers import Charge, Slice
from pipeline.flow.items import Block, Piece
from pipeline.flow.orders import Order
from pipeline.flow.stage import BLOCKS, Layout, LayoutRequest, StageContext, StageSpec, option, pieces
from pipeline.units import GiB, KiB, MiB, Size
from stages.encode import vmdk
from stages.encode.birth import REPRODUCIBLE_DOC, Birth
from stages.encode.ova_envelope import Appliance
from stages.encode.rounding import round_disk
from stages.encode.tar import BLOCK, RECORD, archive_end, member_header
from stages.encode.vmdk_stream import Grains, StreamOptimizedEncoder
from stages.encode.vmdk_structures import GRAIN, file_name

DESCRIPTION_LENGTH = 16 * KiB
FRONT = BLOCK + DESCRIPTION_LENGTH + BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of encode.ova."""

    level: Literal["fast", "small"] = option(
        "fast", doc="small takes 3 times as long for an image that is 8 % smaller."
    )
    cpus: int = option(2, doc="Processors of the machine that the appliance describes.", minimum=1)
    ram: Size = option(Size(4 * GiB), doc="Its memory, in whole MiB.")
    boot_mode: Literal["bios", "uefi"] = option("bios", doc="Its firmware: what the disk boots with today.")
    reproducible: bool = option(True, doc=REPRODUCIBLE_DOC)

    def __post_init__(self) -> None:
        if self.ram < MiB or self.ram % MiB:
            raise ValueError('ram must be whole MiB, for example "4 GiB"')


class OvaEncoder:
    """Wrap the stream of a VMDK into an archive, and digest it on the way.

    The digest is taken on the event loop as pieces are placed, because it has to be taken in order: 0.7 ms a MiB with
    the processor's own SHA-256, 2.5 ms without.
    """

    def __init__(self, options: Options, context: StageContext) -> None:
        self._options = options
        self._name = context.export_name or "disk"
        self._file = file_name(self._name)
        self._size, _ = round_disk(context.disk_size, vmdk.ROUND, "")
        self._birth = Birth.of(options.reproducible, context)
        self._disk = StreamOptimizedEncoder(
            context,
            size=self._size,
            level=options.level,
            adapter="lsilogic",
            birth=self._birth,
            name=f"{self._file}-disk1",
        )
        self._head_length = max(FRONT, context.layout.head_length if context.layout else 0)
        self._head: list[Piece] = []  # the beginning of the disk, where it belongs to the head
        self._end = FRONT
        self._digest = hashlib.sha256()

    @property
    def position(self) -> int:
        """Image offset behind the last byte placed, and behind the head."""
        return max(self._end, self._head_length)

    def prepare(self, block: Block, charge: Charge | None) -> Grains:
        """As the VMDK's encoder does. Threads: any, several at once; keeps no state."""
        return self._disk.prepare(block, charge)

    def place(self, prepared: Grains) -> list[Piece]:
        """Append a block's part of the disk image. The caller owns the pieces.

        Raises:
            StageError: the blocks don't come in guest order, or the image grew beyond what a VMDK can address.
        """
        return [moved for piece in self._disk.place(prepared) for moved in self._take(piece)]

    def finish(self) -> Iterator[Piece]:
        """The rest of the disk image, the manifest, the archive's end; then the head.

        Raises:
            StageError: the blocks ended before the disk.
        """
        for piece in self._disk.finish():
            yield from self._take(piece)
        text = self._render(self._disk.position, self._disk.stored_grains * GRAIN)
        description = text.ljust(DESCRIPTION_LENGTH, b"\n")
        manifest = (
            f"SHA256({self._file}.ovf)= {hashlib.sha256(description).hexdigest()}\n"
            f"SHA256({self._file}-disk1.vmdk)= {self._digest.hexdigest()}\n"
        ).encode("ascii")
        tail = self._header(f"{self._file}.mf", len(manifest)) + manifest.ljust(BLOCK, b"\0")
        tail += bytes(archive_end(self._end + len(tail)))
        yield from self._append(Piece(self._end, len(tail), tail, 0))

        front = (
            self._header(f"{self._file}.ovf", DESCRIPTION_LENGTH)
            + description
            + self._header(f"{self._file}-disk1.vmdk", self._disk.position)
        )
        yield Piece(0, FRONT, front, 0)
        yield from self._head
        if self._end < self._head_length:
            yield Piece(self._end, self._head_length - self._end, None, 0)

    def _render(self, file_size: int, populated: int) -> bytes:
        appliance = Appliance(
            name=self._name,
            disk_file=f"{self._file}-disk1.vmdk",
            file_size=file_size,
            capacity=self._size,
            populated=populated,
            cpus=self._options.cpus,
            memory=self._options.ram,
            boot_mode=self._options.boot_mode,
        )
        return appliance.render().encode()

    def _header(self, name: str, size: int) -> bytes:
        return member_header(name, size, dialect="ustar", time=self._birth.time)

    def _take(self, piece: Piece) -> Iterator[Piece]:
        """Digest a piece of the disk image and put it into its place in the archive."""
        assert piece.view is not None, "a compressed image has no zero pieces"
        self._digest.update(piece.view)
        yield from self._append(replace(piece, offset=piece.offset + FRONT))

    def _append(self, piece: Piece) -> Iterator[Piece]:
        """The piece, or what of it does not belong to the head."""
        self._end = piece.end
        kept = min(self._head_length - piece.offset, piece.length)
        if kept <= 0:
            yield piece
            return
        view = piece.view
        assert view is not None, "only a piece with bytes comes here"
        is_whole = kept == piece.length
        # A copy, so that no buffer of the run waits for its end.
        held = Piece(piece.offset, kept, bytes(view[:kept]), piece.guest_bytes if is_whole else 0)
        self._head.append(held)
        rest: Slice | bytes = b""
        if not is_whole:
            rest = piece.data.share(kept, piece.length) if isinstance(piece.data, Slice) else bytes(view[kept:])
        piece.release()
        if rest:
            yield Piece(held.end, piece.length - kept, rest, piece.guest_bytes)

    def checkpoint(self) -> bytes:
        """There is none. Raises StageError."""
        raise StageError("the state of an OVA can't be saved", operation="checkpoint")

    def restore(self, state: bytes) -> None:
        """There is none. Raises StageError."""
        raise StageError("the state of an OVA can't be saved", operation="restore")


def plan_layout(options: Options, request: LayoutRequest) -> Layout:
    """As the VMDK inside, and the archive around it.

    Raises:
        PlanError: as for a streamOptimized VMDK.
    """
    disk = vmdk.plan_layout(vmdk.Options(level=options.level), replace(request, head_minimum=0))
    head = max(FRONT, request.head_minimum)
    return replace(
        disk,
        format="ova",
        head_length=head,
        image_bytes_max=max(head, FRONT + disk.image_bytes_max + 2 * RECORD),
        notes=(*disk.notes, "an OVA can't be resumed: its manifest needs a digest whose state can't be saved"),
    )


SPEC = StageSpec(
    name="encode.ova",
    summary="Write an OVA: machine, VMDK, manifest. Not resumable: the manifest's running SHA-256 can't be saved.",
    options=Options,
    takes=BLOCKS,
    gives=pieces(Order.HEAD_LAST),
    build=OvaEncoder,
    layout=plan_layout,
    checkpointed=False,
)
