"""Open whatever filesystem a stretch of a disk holds. A new reader is one line here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from stages.disk.files.btrfs import open_btrfs
from stages.disk.files.ext import open_ext
from stages.disk.files.fat import open_fat
from stages.disk.files.xfs import open_xfs
from stages.disk.signatures import Signature, identify
from stages.disk.tree import FileTree

_OPENERS: dict[str, Callable[[RangeReader, Signature], Awaitable[FileTree]]] = {
    "btrfs": open_btrfs,
    "ext2": open_ext,
    "ext3": open_ext,
    "ext4": open_ext,
    "fat12": open_fat,
    "fat16": open_fat,
    "fat32": open_fat,
    "xfs": open_xfs,
}

KINDS = tuple(_OPENERS)


async def open_tree(reader: RangeReader, signature: Signature | None = None) -> FileTree:
    """Open the filesystem that fills `reader`.

    Args:
        signature: what `identify` said about it, where that was asked already.
    Raises:
        FormatError: it is none that is read here, damaged, or uses what is not known here.
        StoreError: it can't be read.
    """
    found = signature or await identify(reader, 0, reader.size)
    opener = _OPENERS.get(found.kind)
    if opener is None:
        raise FormatError(f"files of {found.kind} can't be read here", kind=found.kind)
    return await opener(reader, found)
