"""Rules about what belongs together: everything that is mounted is on the disk that is exported, and in the cut."""

from __future__ import annotations

from collections.abc import AsyncIterator

from stages.preflight.findings import Evidence, Outcome, failed, passed, skipped, to_read_it, unknown
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import PSEUDO_KINDS, Subject, rooted

_NEEDED = ("/", "/boot", "/boot/efi", "/efi", "/home", "/usr", "/var", "/opt", "/srv", "/root", "/tmp")


async def check_system(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether there is a system on the disk at all."""
    for problem in subject.problems:
        yield unknown(f"a part of the system could not be read: {problem}", remedy=to_read_it())
    if not subject.no_system:
        yield passed(f"the system is {subject.distribution.title or 'of a kind that does not name itself'}")
        return
    told = f"no system was found{'' if subject.is_live else ' on the disk'}: {subject.no_system}"
    # What is encrypted, or of a kind that is not read here, may hold one.
    if subject.volumes.opaque or any(one.kind in ("zfs_member", "f2fs", "jfs") for one in subject.volumes):
        yield unknown(told, remedy="Run the preflight on the live machine instead.")
    else:
        yield failed("block", told, remedy=subject.no_system_remedy)


async def check_closure(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the system lies on one disk."""
    away = 0
    if subject.live is not None:
        for mount in subject.live.mounts:
            if mount.kind in PSEUDO_KINDS or not mount.disks:
                continue
            others = sorted(one for one in mount.disks if not subject.volumes.is_disk(one))
            if not others:
                continue
            entry = subject.fstab.at(mount.point)
            needed = mount.point in _NEEDED or (entry is not None and not entry.may_be_missing)
            away += 1
            yield failed(
                "block" if needed else "info",
                f"{mount.point} lives on {', '.join(others)}; an import takes one disk",
                Evidence("/proc/self/mountinfo"),
                remedy=f'Move it to this disk, or export {others[0]} as a data disk (kind = "data"), marked nofail.',
            )
    for entry in rooted(subject.fstab.entries):
        if (
            entry.meaning.volume is None
            and entry.meaning.is_certain
            and entry.point in _NEEDED
            and subject.table is not None
        ):
            if subject.live is not None and any(one.point == entry.point for one in subject.live.mounts):
                continue
            away += 1
            yield failed(
                "block",
                f"{entry.point} ({entry.spec}) is not on this disk; an import takes one disk",
                subject.fstab.text.at(entry.line),
                remedy="Export the disk that holds it, or move it here.",
            )
    if subject.table is None and subject.live is None:
        yield unknown(subject.table_problem, remedy=subject.table_remedy)
    elif not away:
        yield passed("the whole system lies on this disk")


async def check_cut(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the partitions that are exported hold everything that the system needs."""
    if target.kept is None:
        yield skipped("the whole disk is exported")
        return
    if subject.table is None:
        yield unknown(subject.table_problem, remedy=subject.table_remedy)
        return
    lost = 0
    needed = [one.meaning.volume for one in rooted(subject.fstab.entries) if one.meaning.volume is not None]
    numbers = {one.number for one in needed if one.number is not None}
    members = {one.number for one in subject.volumes if one.kind == "lvm2" and one.number is not None}
    if any(one.inside == "lvm" for one in needed):
        numbers |= members
    for entry in rooted(subject.fstab.entries):
        volume = entry.meaning.volume
        if volume is None or entry.may_be_missing or entry.is_swap:
            continue
        gone = (volume.number is not None and volume.number not in target.kept) or (
            volume.inside == "lvm" and bool(members - target.kept)
        )
        if gone:
            lost += 1
            through = max(numbers | target.kept, default=0)
            yield failed(
                "block",
                f"the cut drops {entry.point} ({volume.name})",
                subject.fstab.text.at(entry.line),
                remedy=f'partitions = {sorted(numbers | target.kept)}, or through = {through}, or "needed".',
            )
    if not lost:
        yield passed("the partitions that are exported hold everything that fstab mounts")


RULES = (
    Rule(
        id="layout.system",
        title="there is a system on the disk",
        why="Every partition and logical volume is looked into for the root filesystem of a Linux system.",
        check=check_system,
        needs="disk",
    ),
    Rule(
        id="layout.closure",
        title="the whole system lies on this disk",
        why=(
            "An import takes one disk. Where /boot, /home or a part of a volume group lies on another one, the image "
            "boots into emergency mode or not at all. The guide: an image has the root partition and the MBR, and "
            "/boot and /home where they are partitions of their own."
        ),
        check=check_closure,
    ),
    Rule(
        id="layout.cut",
        title="the cut keeps what is needed",
        why=(
            "An export of some partitions must keep each one that fstab mounts; the remedy names the smallest cut that "
            "does."
        ),
        check=check_cut,
    ),
)
