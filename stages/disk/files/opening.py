"""Open whatever filesystem a stretch of a disk holds: each family by the open_FAMILY of its module in this folder."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import import_module

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from stages.disk.signatures import FAMILIES, Signature, identify
from stages.disk.tree import FileTree

Opener = Callable[[RangeReader, Signature], Awaitable[FileTree]]

KINDS = tuple(FAMILIES)


async def open_tree(reader: RangeReader, signature: Signature | None = None) -> FileTree:
    """Open the filesystem that fills `reader`.

    Args:
        signature: what `identify` said about it, where that was asked already.
    Raises:
        FormatError: it is none that is read here, damaged, or uses what is not known here.
        StoreError: it can't be read.
    """
    found = signature or await identify(reader, 0, reader.size)
    name = FAMILIES.get(found.kind)
    if name is None:
        raise FormatError(f"files of {found.kind} can't be read here", kind=found.kind)
    # Imported when the first is met: a disk holds one or two of them.
    opener: Opener = getattr(import_module(f"stages.disk.files.{name}"), f"open_{name}")
    return await opener(reader, found)
