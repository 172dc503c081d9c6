"""Disks that are nothing but their facts: a table, what the partitions hold, what the first sectors say."""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Any

from pipeline.flow.items import RangeReader
from pipeline.units import GiB, MiB
from stages.disk.tables import Partition, PartitionTable, TableKind
from stages.disk.tree import View
from stages.preflight.findings import Finding
from stages.preflight.profile import Profile, find_profile
from stages.preflight.rules import Target, boot_mode_for, find_rule, judge
from stages.preflight.subject import LiveFacts, Subject, gather
from stages.preflight.volumes import Volume, Volumes

ROOT_UUID = "11111111-2222-3333-4444-555555555555"
BOOT_UUID = "66666666-7777-8888-9999-aaaaaaaaaaaa"
SWAP_UUID = "bbbbbbbb-cccc-dddd-eeee-ffffffffffff"
SIGNATURE = "5a5a1234"
ESP_GUID = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
LINUX_GUID = "0fc63daf-8483-4772-8e79-3d69d8477de4"
BIOS_GUID = "21686148-6449-6e6f-744e-656564454649"


class Sectors:
    """A disk of zeros with a few sectors."""

    def __init__(self, size: int, sectors: dict[int, bytes]) -> None:
        self.size = size
        self._sectors = sectors

    async def read(self, offset: int, length: int) -> bytes:
        """Zeros, and what was put there."""
        data = bytearray(length)
        for number, content in self._sectors.items():
            at = number * 512
            if offset <= at < offset + length:
                part = content[: offset + length - at]
                data[at - offset : at - offset + len(part)] = part
        return bytes(data)


def grub_sectors(*, core: bool = True) -> dict[int, bytes]:
    """GRUB's boot.img in the first sector, core.img behind it."""
    boot = bytearray(512)
    boot[:2] = b"\xeb\x63"
    struct.pack_into("<Q", boot, 0x5C, 1)
    boot[0x180:0x185] = b"GRUB "
    boot[510:] = b"\x55\xaa"
    return {0: bytes(boot), **({1: b"\x52\xe8" + bytes(510)} if core else {})}


def table_of(
    kind: TableKind = "mbr",
    types: tuple[str, ...] = ("0x83",),
    *,
    size: int = 20 * GiB,
    sector: int = 512,
    problems: tuple[str, ...] = (),
) -> PartitionTable:
    """Partitions of 4 GiB each, from 1 MiB on."""
    partitions = tuple(
        Partition(
            number=number,
            start=MiB + (number - 1) * 4 * GiB,
            length=4 * GiB,
            type=type,
            uuid=f"{SIGNATURE}-{number:02x}" if kind == "mbr" else f"00000000-0000-0000-0000-00000000000{number}",
            bootable=number == 1,
        )
        for number, type in enumerate(types, 1)
    )
    return PartitionTable(
        kind=kind,
        sector_size=sector,
        disk_size=size,
        partitions=partitions,
        disk_signature=SIGNATURE,
        boot_code=True,
        problems=problems,
    )


def volume(number: int | None, kind: str = "ext4", uuid: str = ROOT_UUID, **named: Any) -> Volume:
    """A filesystem on a partition."""
    names = named.pop("names", (f"/dev/sda{number}",) if number else ())
    named.setdefault("part_uuid", f"{SIGNATURE}-{number:02x}" if number else "")
    named.setdefault("state", "clean")
    named.setdefault("size", 4 * GiB)
    return Volume(names=names, number=number, kind=kind, uuid=uuid, **named)


async def subject_of(
    view: View,
    *,
    table: PartitionTable | None = None,
    volumes: Collection[Volume] | None = None,
    opaque: tuple[str, ...] = (),
    sectors: dict[int, bytes] | None = None,
    live: LiveFacts | None = None,
    unreadable: str = "",
    disk_name: str = "",
    no_system: str = "",
) -> Subject:
    """The facts about a system on a disk of one MBR partition with GRUB, unless said otherwise."""
    table = table or table_of()
    reader: RangeReader | None = Sectors(table.disk_size, grub_sectors() if sectors is None else sectors)
    return await gather(
        view,
        place="/dev/sda",
        reader=None if unreadable else reader,
        table=None if unreadable else table,
        table_problem=unreadable,
        table_remedy="Run it as root." if unreadable else "",
        volumes=Volumes([volume(1)] if volumes is None else list(volumes), disk_name=disk_name, opaque=opaque),
        live=live,
        no_system=no_system,
    )


def target_of(subject: Subject, profile: str | Profile = "tencent", **named: Any) -> Target:
    """A target as the command makes it."""
    found = find_profile(profile) if isinstance(profile, str) else profile
    named.setdefault("boot_mode", boot_mode_for(found, subject))
    return Target(profile=found, **named)


async def findings_of(subject: Subject, target: Target, *ids: str) -> tuple[Finding, ...]:
    """What some rules say."""
    return await judge(subject, target, rules=[find_rule(id) for id in ids] or None)
