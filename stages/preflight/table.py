"""Rules about the partition table: its kind, its health, the size of its sectors."""

from __future__ import annotations

from collections.abc import AsyncIterator

from stages.preflight.findings import Outcome, failed, passed, plain, skipped, unknown
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import DATA_DISK, Subject

_TITLES = {"mbr": "MBR", "gpt": "GPT", "hybrid": "hybrid", "none": "no partition table", "protective": "damaged GPT"}


def _closed(subject: Subject) -> Outcome | None:
    if subject.table is None:
        return unknown(subject.table_problem, remedy=subject.table_remedy)
    return None


async def check_table(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the target boots from this kind of table."""
    if closed := _closed(subject):
        yield closed
        return
    table = subject.table
    assert table is not None
    profile, mode = target.profile, target.boot_mode
    taken = profile.tables_for(mode)
    title = _TITLES[table.kind]
    if table.kind == "none" and target.kind == "data":
        yield passed("the data disk has no partition table: its filesystem fills the disk")
    elif table.kind == "none":
        yield failed(
            "block",
            f"{subject.place} has no partition table: nothing can boot from it",
            remedy=f"Name the whole disk, not a partition of it. {DATA_DISK}",
        )
    elif table.kind == "protective":
        yield failed(
            "block",
            f"{subject.place}: {table.problems[0]}",
            remedy=f"Repair it: `gdisk {subject.device}`, then r (recovery), b or c, v, w.",
        )
    elif taken and table.kind not in taken and target.kind == "system":
        names = " or ".join(_TITLES[one] for one in taken)
        others = [one for one in profile.boot_modes if table.kind in profile.tables_for(one)]
        ways = [f'set boot_mode = "{others[0]}" if the system has an EFI loader'] if others else []
        ways += ["use another profile"]
        if table.kind == "gpt":
            ways.append("convert a copy with `sgdisk -m 1:2:3 COPY` and install a BIOS loader there")
        yield failed(
            "info",
            f"{subject.place} uses {title}; {profile.name} with {mode.upper()} boot accepts {names} only",
            remedy=_sentence(ways),
        )
    else:
        yield passed(f"{subject.place} uses {title}" + (f", which {profile.name} takes" if taken else ""))


def _sentence(ways: list[str]) -> str:
    text = ", ".join(ways[:-1]) + (" or " if len(ways) > 1 else "") + ways[-1]
    return text[0].upper() + text[1:] + "."


async def check_gpt(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether both copies of a GPT are sound."""
    if closed := _closed(subject):
        yield closed
        return
    table = subject.table
    assert table is not None
    if table.kind in ("mbr", "none"):
        if table.problems:
            for problem in table.problems:
                yield failed("warn", f"partition table: {problem}", command=f"sfdisk --verify {plain(subject.device)}")
        else:
            yield passed("the partition table is sound")
        return
    if table.kind == "protective":
        yield failed("block", "both GPT headers are damaged", remedy=f"Repair it with gdisk {subject.device}.")
        return
    for problem in table.problems:
        yield failed(
            "warn",
            f"GPT: {problem}; the export writes a sound one",
            command=f"sgdisk -e {plain(subject.device)} && sgdisk --verify {plain(subject.device)}",
        )
    if not table.problems:
        yield passed("both headers of the GPT are sound")


async def check_sector(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the numbers in the table mean the same over there."""
    if closed := _closed(subject):
        yield closed
        return
    table = subject.table
    assert table is not None
    if table.kind == "none":
        yield skipped("without a partition table nothing on the disk counts in sectors")
    elif table.sector_size != target.profile.sector:
        yield failed(
            "block",
            f"{subject.place} has sectors of {table.sector_size} bytes; a virtual disk of {target.profile.name} has "
            f"{target.profile.sector}, and every number in the partition table would mean another place",
            remedy="Export the partitions one by one as data disks, or copy the system to a disk of 512-byte sectors.",
        )
    else:
        yield passed(f"sectors of {table.sector_size} bytes")


RULES = (
    Rule(
        id="disk.table",
        title="the target boots from this kind of partition table",
        why=(
            "A BIOS over there may boot from an MBR only, UEFI firmware from a GPT only; some importers refuse what "
            "they do not expect before they look any further. The first sectors of the disk are read, never a tool's "
            "opinion of them. The guide asks for this with `parted -l | grep 'Partition Table'`."
        ),
        check=check_table,
        for_data=True,
        needs="disk",
    ),
    Rule(
        id="disk.gpt.health",
        title="the partition table is sound",
        why=(
            "A GPT has a backup at the end of the disk. Where a disk has grown or was copied by hand it is stale, and "
            "strict firmware or the importer refuses the disk. Both headers, both arrays and all checksums are looked "
            "at; in an MBR the chain of logical partitions and overlaps."
        ),
        check=check_gpt,
        for_data=True,
        needs="disk",
    ),
    Rule(
        id="disk.sector",
        title="the disk counts in sectors of 512 bytes",
        why=(
            "Partition tables count in sectors. All clouds give virtual disks with sectors of 512 bytes: the table of "
            "a 4Kn disk then points to an eighth of the right place."
        ),
        check=check_sector,
        for_data=True,
        needs="disk",
    ),
)
