"""The volumes of a disk: partitions, logical volumes, or the one filesystem that fills it, each opened for its files.

A volume that can't be read is listed with the reason and stops nobody from reading the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import MiB
from stages.disk.files.opening import KINDS, open_tree
from stages.disk.lvm import find_volumes
from stages.disk.reading import CachedReader, Window
from stages.disk.signatures import Signature, identify
from stages.disk.tables import Partition, PartitionTable, overlapping, read_table
from stages.disk.tree import FileTree

# Small reads that are kept for all filesystems of a disk together: inode tables, folders and maps of files.
CACHE_BYTES = 16 * MiB
# A look at a volume reads some 200 KiB. Linux has minor numbers for 256 partitions; a table can claim many more.
_VOLUMES_MAX = 256

_NOT_FILES = {
    "swap": "it is swap",
    "luks": "it is encrypted",
    "bitlocker": "it is encrypted",
    "md": "it is a member of a RAID",
    "lvm2": "it is a physical volume of LVM; its logical volumes are listed by themselves",
    "unknown": "what it holds is not known",
    "hibernation": "it holds the memory of a hibernated machine",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Volume:
    """A place for a filesystem.

    Attributes:
        name: how it is asked for: the partition's number, `disk` where there is no table, or a logical volume's name
            below /dev/mapper.
        offset: bytes of the disk; None for a logical volume.
        length: bytes.
        partition: None for a logical volume and for a disk without a table.
        group, logical: the names of volume group and logical volume; else empty.
        tree: its files; None where `problem` says why not.
    """

    name: str
    offset: int | None
    length: int
    signature: Signature
    partition: Partition | None = None
    group: str = ""
    logical: str = ""
    tree: FileTree | None = None
    problem: str = ""

    @property
    def number(self) -> int | None:
        """Of the partition."""
        return self.partition.number if self.partition else None

    @property
    def title(self) -> str:
        """What to call it in a sentence."""
        if self.partition:
            return f"partition {self.partition.number}"
        return f"{self.group}/{self.logical}" if self.group else "the disk"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DiskVolumes:
    """All volumes of a disk: partitions by number, then logical volumes.

    Attributes:
        problems: of table and volume groups, in sentences; those of a volume are with the volume.
    """

    table: PartitionTable
    volumes: tuple[Volume, ...]
    problems: tuple[str, ...]

    def get(self, name: str) -> Volume | None:
        """The volume of that name; `group/name` will do for a logical one, and 0 for a disk without a table."""
        for one in self.volumes:
            if name in (one.name, f"{one.group}/{one.logical}") or (name == "0" and one.name == "disk"):
                return one
        return None


def mapper_name(group: str, logical: str) -> str:
    """The name below /dev/mapper: hyphens are doubled, one parts the two."""
    return f"{group.replace('-', '--')}-{logical.replace('-', '--')}"


async def open_volumes(reader: RangeReader, *, sector_size: int | None = None) -> DiskVolumes:
    """Find the volumes of a disk and open the filesystems that can be read here. Reads some 300 KiB for each.

    Args:
        reader: the disk's bytes, of a device or of a decoded image. Borrowed while the trees are used.
        sector_size: as `read_table` takes it.
    Raises:
        StoreError: the disk can't be read.
    """
    cached = CachedReader(reader, cache_bytes=CACHE_BYTES)
    table = await read_table(cached, cached.size, sector_size=sector_size)
    problems = list(table.problems)
    found: list[Volume] = []
    if table.kind in ("none", "protective"):
        signature = await identify(cached, 0, cached.size)
        found.append(Volume(name="disk", offset=0, length=cached.size, signature=signature))
    parts = [one for one in table.partitions if not one.is_extended and one.start < cached.size]
    shared = overlapping(parts)
    if len(parts) > _VOLUMES_MAX:
        problems.append(f"it has {len(parts)} partitions; only {_VOLUMES_MAX} are looked into")
    for part in parts[:_VOLUMES_MAX]:
        length = min(part.end, cached.size) - part.start
        problem = "it overlaps another partition" if part.number in shared else ""
        # A hostile table can lay thousands of partitions over each other; nobody looks into those.
        signature = Signature(kind="unknown") if problem else await identify(cached, part.start, length)
        found.append(
            Volume(
                name=str(part.number),
                offset=part.start,
                length=length,
                signature=signature,
                partition=part,
                problem=problem,
            )
        )
    windows = {one.name: Window(cached, one.offset or 0, one.length) for one in found}
    opened = [await _opened(one, windows[one.name]) for one in found]
    members = [windows[one.name] for one in found if one.signature.kind == "lvm2"]
    if members:
        logical, more = await find_volumes(members)
        problems += more
        for each in logical[:_VOLUMES_MAX]:
            inside = each.volume
            volume = Volume(
                name=mapper_name(each.group, each.name),
                offset=None,
                length=inside.size if inside else 0,
                signature=await identify(inside, 0, inside.size) if inside else Signature(kind="unknown"),
                group=each.group,
                logical=each.name,
                problem=each.reason,
            )
            opened.append(await _opened(volume, Window(inside, 0, inside.size)) if inside else volume)
    return DiskVolumes(table=table, volumes=tuple(opened), problems=tuple(problems))


async def _opened(volume: Volume, reader: RangeReader) -> Volume:
    if volume.problem:
        return volume
    kind = volume.signature.kind
    if kind == "ambiguous":
        return replace(volume, problem=f"it bears the marks of {' and '.join(volume.signature.others)}")
    if kind not in KINDS:
        return replace(volume, problem=_NOT_FILES.get(kind, f"files of {kind} can't be read here"))
    try:
        return replace(volume, tree=await open_tree(reader, volume.signature))
    except FormatError as error:
        return replace(volume, problem=f"it is damaged or of an unknown kind: {error.message}")
