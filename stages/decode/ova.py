"""Read the disk inside of an OVA: a tar archive with a description (OVF), a manifest and VMDK disks.

Only the archive's headers and the disk are read. The description is not interpreted: which disk is wanted is said by
the caller where there are several.

Source: DMTF DSP0243 (Open Virtualization Format), section 5.3 "Distribution".
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from pipeline.flow.items import RangeReader
from stages.decode.mapped import Section
from stages.decode.places import Place
from stages.decode.refusal import corrupt, misnamed, unsupported
from stages.decode.tar import Member, walk
from stages.decode.vmdk import JoinedVmdk, VmdkImage, open_vmdk


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """The members of an OVA."""

    members: tuple[Member, ...]

    @property
    def disks(self) -> tuple[Member, ...]:
        """Members that are VMDK disks by their names."""
        return tuple(one for one in self.members if one.name.lower().endswith(".vmdk"))

    def named(self, ending: str) -> Member | None:
        """The first member whose name ends so."""
        return next((one for one in self.members if one.name.lower().endswith(ending)), None)


class OvaImage:
    """The disk of an OVA. Offsets in errors about the disk count from its begin inside the archive."""

    format = "ova"

    def __init__(self, disk: VmdkImage | JoinedVmdk, member: Member) -> None:
        self.disk = disk
        self.member = member
        self.size = disk.size
        self.warnings = disk.warnings
        self.extents = disk.extents
        self.fetch = disk.fetch
        self.decode = disk.decode
        self.read = disk.read

    async def places(self, offset: int, length: int) -> AsyncIterator[Place]:
        """Where the range is stored in the archive."""
        if isinstance(self.disk, JoinedVmdk):
            return  # refused inside of an archive: it has other files
        async for one in self.disk.places(offset, length):
            yield one if one.at is None else replace(one, at=one.at + self.member.data)


async def read_archive(reader: RangeReader) -> Archive:
    """Walk the archive. Raises FormatError where it is hostile, damaged or no OVA."""
    members: list[Member] = []
    names: set[str] = set()
    async for member in walk(reader, "ova"):
        if member.name in names:
            raise corrupt("ova", f"the archive has two members {member.name[:80]!r}", member.at)
        if member.stretches is not None:
            raise unsupported("ova", "a sparse member", member.at)
        names.add(member.name)
        members.append(member)
    archive = Archive(members=tuple(members))
    if archive.named(".ovf") is None:
        raise corrupt("ova", "the archive has no description (.ovf)", 0)
    return archive


def choose_disk(archive: Archive, member: str) -> Member:
    """The disk of that name; where none is asked for, the only one."""
    disks = archive.disks
    names = ", ".join(repr(one.name) for one in disks[:8])
    if member:
        found = next((one for one in disks if one.name == member), None)
        if found is None:
            raise misnamed("ova", f"the archive has no disk {member!r}", hint=f"It has {names or 'none'}.")
        return found
    if not disks:
        packed = next((one for one in archive.members if ".vmdk." in one.name.lower()), None)
        if packed is not None:
            raise unsupported(
                "ova", "a disk that is packed or cut into pieces", packed.at, hint="Import and export it again."
            )
        raise corrupt("ova", "the archive has no VMDK disk", 0)
    if len(disks) > 1:
        raise unsupported("ova", "several disks", disks[1].at, hint=f"Say which one is wanted: {names}.")
    return disks[0]


async def open_ova(reader: RangeReader, *, strict: bool = False, member: str = "") -> OvaImage:
    """Walk the archive and open its disk.

    Args:
        member: name of the disk inside, needed where there are several.
        strict: as for the disk itself.
    Raises:
        FormatError: no OVA, damaged, hostile, or a disk that is not read here.
        StoreError: it can't be read.
    """
    disk = choose_disk(await read_archive(reader), member)
    image = await open_vmdk(disk_section(reader, disk), strict=strict)
    return OvaImage(image, disk)


def disk_section(reader: RangeReader, disk: Member) -> Section:
    """The disk as a file of its own."""
    return Section(reader, disk.data, disk.size, format="ova")
