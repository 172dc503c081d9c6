"""Map the used bytes of whatever a partition holds. A new filesystem is one line here."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from importlib import import_module
from typing import Protocol

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from stages.disk.reading import CachedReader, Window
from stages.disk.signatures import FAMILIES, Signature, identify
from stages.disk.usage import Refusal, UsedMap


class Mapper(Protocol):
    """Reads a filesystem's own account of its space. `reader` is its partition; offset 0 is where it begins."""

    def __call__(self, reader: RangeReader, kind: str, *, frozen: bool = False) -> Awaitable[UsedMap | Refusal]: ...


# Kind: the module of this folder that maps it, by its map_MODULE. It is imported when the first is met.
_MAPPERS = {**FAMILIES, "swap": "swap"}

_WHY_WHOLE = {
    "unknown": "what it holds is not known",
    "hibernation": "it holds the memory of a hibernated machine",
    "luks": "it is encrypted",
    "bitlocker": "it is encrypted",
    "md": "it is a member of a RAID",
    "jbd": "it is the journal of another filesystem",
}


async def map_filesystem(
    reader: RangeReader,
    offset: int,
    length: int,
    *,
    frozen: bool = False,
    signature: Signature | None = None,
    volumes: bool = True,
) -> UsedMap | Refusal:
    """Find out which bytes of [offset, offset + length) are used.

    Args:
        frozen: the filesystem is frozen (fsfreeze), so a log that holds changes is no reason to refuse.
        signature: what `identify` said about it, where that was asked already.
        volumes: whether a physical volume is looked into; not inside of another.
    Returns:
        the map; or why everything has to be copied: unclean, damaged, hostile, unknown features, unknown kind.
    Raises:
        StoreError: the disk can't be read.
    """
    window = Window(CachedReader(reader), offset, min(length, reader.size - offset))
    if window.size < length:
        return Refusal("unknown", "it ends behind the end of the disk")
    try:
        found = signature or await identify(window, 0, length)
        if found.kind == "ambiguous":
            return Refusal(found.kind, f"it bears the marks of {' and '.join(found.others)}")
    except FormatError as error:
        return Refusal("unknown", f"it is damaged: {error.message}")
    if found.kind == "lvm2" and volumes:
        return (await map_physical_volumes([window], frozen=frozen))[0]
    name = _MAPPERS.get(found.kind)
    if name is None:
        return Refusal(found.kind, _WHY_WHOLE.get(found.kind, f"the used blocks of {found.kind} can't be read here"))
    mapper: Mapper = getattr(import_module(f"stages.disk.{name}"), f"map_{name}")
    try:
        return await mapper(window, found.kind, frozen=frozen)
    except FormatError as error:
        return Refusal(found.kind, f"it is damaged: {error.message}")


async def map_physical_volumes(windows: Sequence[RangeReader], *, frozen: bool = False) -> list[UsedMap | Refusal]:
    """Map the physical volumes of one disk together, so that volumes that lie on several of them can be looked into.

    Raises:
        StoreError: the disk can't be read.
    """

    from stages.disk.lvm import map_volumes

    async def inside(volume: RangeReader) -> UsedMap | Refusal:
        return await map_filesystem(volume, 0, volume.size, frozen=frozen, volumes=False)

    return await map_volumes(windows, inside)
