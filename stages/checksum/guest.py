"""Hash the disk as it was read: one digest per MiB, whatever window, cluster or format.

The stage stands before every zero test, so that a fault in skipping zeros can't make image and digest agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import SourceError
from pipeline.flow.items import Block
from pipeline.flow.stage import BLOCKS, StageContext, StageSpec, option
from stages.checksum.leaves import GUEST_DIGEST, LEAF, GuestDigest, LeafDigests, hash_leaves, zero_leaf


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    algorithm: Literal["xxh3-128", "blake3"] = option(
        "xxh3-128", doc="blake3 also proves that nobody changed the image on purpose; it needs more CPU time."
    )


@dataclass(frozen=True, slots=True)
class Note:
    """The leaves of one block: `zeros` whole zero leaves, then the concatenated `digests`."""

    zeros: int
    digests: bytes


class GuestChecksum:
    """Hash the leaves of every block; a skip only counts."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._algorithm = options.algorithm
        self._context = context
        self._leaves = LeafDigests(options.algorithm, context.disk_size)
        self._noted = 0  # leaves that `delta` gave already
        self._again = self._leaves  # of the look that is under way

    def apply(self, block: Block) -> tuple[Block, Note]:
        """Hash one block, which begins on a leaf and ends on one or at the end of the disk. Threads: any."""
        if block.data is None:
            whole, tail = divmod(block.length, LEAF)
            return block, Note(whole, zero_leaf(self._algorithm, tail) if tail else b"")
        return block, Note(0, b"".join(hash_leaves(self._algorithm, block.data.view)))

    def observe(self, note: Note) -> None:
        """Append the leaves of the next block."""
        self._leaves.add_zeros(note.zeros)
        self._leaves.add(note.digests)

    def delta(self) -> bytes:
        """The leaves since the last call."""
        dumped = self._leaves.dump(self._noted)
        self._noted = self._leaves.count
        return dumped

    def recall(self, delta: bytes) -> None:
        """Append the leaves that an earlier process hashed."""
        self._leaves.load(delta)

    def confirm(self, note: Note, offset: int) -> None:
        """Compare a block that was read again with what it held the first time.

        Raises:
            SourceError: it holds something else now.
        """
        for first in self._differing(note, offset):
            raise self._changed(first.start)

    def compare(self, note: Note, offset: int) -> tuple[range, ...]:
        """Take the leaves of the next block of another look; guest ranges of those that are different.

        The digest is that of the latest look that was whole.
        """
        if offset == 0:
            self._again = LeafDigests(self._algorithm, self._leaves.size)
        changed = tuple(
            range(found.start * LEAF, min(found.stop * LEAF, self._leaves.size))
            for found in self._differing(note, offset)
        )
        self._again.add_zeros(note.zeros)
        self._again.add(note.digests)
        if self._again.is_complete:
            self._leaves = self._again
        return changed

    def _differing(self, note: Note, offset: int) -> Iterator[range]:
        """Numbers of the leaves from guest `offset` on that are not what the note says."""
        index = offset // LEAF
        yield from self._leaves.nonzero(index, index + note.zeros)
        width = self._leaves.width
        for number in range(len(note.digests) // width):
            leaf = index + note.zeros + number
            if note.digests[number * width : (number + 1) * width] != self._leaves.leaf(leaf):
                yield range(leaf, leaf + 1)

    def finish(self) -> None:
        """Leave the digest of the whole disk. Raises StageError when blocks are missing."""
        self._context.facts.put(GUEST_DIGEST, GuestDigest(self._leaves))

    def _changed(self, leaf: int) -> SourceError:
        return SourceError(
            "the disk changed while it was being read",
            operation="read again",
            offset=leaf * LEAF,
            length=min(LEAF, self._leaves.size - leaf * LEAF),
            hint="Export a snapshot, or stop whatever writes to the disk, and run again.",
        )


SPEC = StageSpec(
    name="checksum.guest",
    summary="Hash the disk as it was read, so that the stored image can be proven to be the same disk.",
    options=Options,
    takes=BLOCKS,
    gives=BLOCKS,
    build=GuestChecksum,
    provides=(GUEST_DIGEST,),
)
