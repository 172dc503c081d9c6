"""Rules about filesystems as such: room to work in, and a clean state."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator

from pipeline.units import MiB, format_size
from stages.preflight.findings import Evidence, Outcome, failed, passed, plain, skipped, unknown
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import Subject, rooted
from stages.preflight.volumes import Volume

# Source: virt-v2v convert.ml, "check_guest_free_space".
_LEAST = {"/": 100 * MiB, "/boot": 50 * MiB}
_LEAST_ELSEWHERE = 10 * MiB
# Too small, and of a kind that nobody installs into: EFI system partitions.
_NOT_ASKED = ("/boot/efi", "/efi")
_INODES_LEAST = 100
_FULL = MiB
_JOURNALS = ("ext3", "ext4", "xfs", "btrfs", "vfat", "ntfs", "exfat", "ext2")


async def check_free(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether there is room for an agent and a new initramfs."""
    mounted = [one.point for one in rooted(subject.fstab.entries) if one.point.startswith("/") and not one.is_swap]
    for point in dict.fromkeys(["/", *(one for one in mounted if one not in _NOT_ASKED)]):
        entry = subject.fstab.at(point)
        if point != "/" and (entry is None or entry.meaning.volume is None or "noauto" in entry.options):
            continue  # not in the image: fs.fstab.foreign
        least = _LEAST.get(point, _LEAST_ELSEWHERE)
        where = Evidence(point)
        try:
            space = await subject.view.space(point)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                continue
            raise
        clean = subject.distribution.clean_cache
        if space.free < _FULL:
            yield failed("block", f"{point} is full", where, command=clean)
        elif space.free < least:
            yield failed(
                "warn",
                f"{point}: {format_size(space.free)} free"
                + ("; the cloud needs room for agents and a new initramfs" if point in _LEAST else "")
                + f" ({format_size(least)} at least)",
                where,
                command=clean,
            )
        elif space.inodes_free is not None and space.inodes and space.inodes_free < _INODES_LEAST:
            yield failed("warn", f"{point}: {space.inodes_free} inodes free", where, command=clean)
        else:
            yield passed(f"{point}: {format_size(space.free)} free", where)


def _how_dirty(volume: Volume) -> str:
    return f"was not left clean ({volume.dirty})" if volume.dirty else "was not unmounted cleanly"


async def check_clean(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether every filesystem was unmounted."""
    if subject.is_live:
        yield skipped("the filesystems are in use: see live.risk")
        return
    looked = 0
    for volume in subject.volumes:
        if volume.kind not in _JOURNALS:
            continue
        looked += 1
        if volume.state == "dirty" or volume.dirty:
            yield failed(
                "warn",
                f"{volume.name} ({volume.kind}) {_how_dirty(volume)}; its journal is replayed at the "
                "first boot, and its free blocks can't be skipped",
                command=f"fsck -p {plain(volume.name)}" if volume.kind.startswith(("ext", "vfat")) else "",
                remedy="Mount and unmount it once.",
            )
    if looked:
        yield passed(f"{looked} filesystems were looked at")
    else:
        yield unknown("no filesystem that is known here was found")


_BOOTED = ("/", "/boot", "/usr", "/var")


async def check_kinds(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the target can read the filesystems."""
    wanted = target.profile.filesystems
    if not (wanted.allow or wanted.discouraged or not wanted.subvolumes):
        yield skipped(f"{target.profile.name} asks for no filesystems")
        return
    name = target.profile.name
    good = True
    for entry in rooted(subject.fstab.entries):
        volume = entry.meaning.volume
        if volume is None or entry.is_swap or entry.point in _NOT_ASKED:
            continue
        where = subject.fstab.text.at(entry.line)
        if wanted.allow and volume.kind not in wanted.allow:
            good = False
            yield failed(
                "block" if entry.point in _BOOTED else "warn",
                f"{entry.point} is {volume.kind}; {name} reads {', '.join(wanted.allow)}",
                where,
                remedy="Copy the system to one of these filesystems, or import it another way.",
            )
        subvolume = any(one.startswith("subvol") for one in entry.options)
        if volume.kind == "btrfs" and subvolume and not wanted.subvolumes:
            good = False
            yield failed(
                "block" if entry.point == "/" else "warn",
                f"{entry.point} lies in a subvolume of a btrfs; {name} takes btrfs without subvolumes",
                where,
                remedy="Copy the system to a filesystem without subvolumes, or import it another way.",
            )
    for volume in subject.volumes:
        if volume.kind in wanted.discouraged:
            good = False
            yield failed(
                "warn",
                f"{volume.name} is {_TITLES.get(volume.kind, volume.kind)}, which {name} asks to leave out",
                remedy=_WITHOUT.get(volume.kind, "Leave it out of the image."),
            )
    if good:
        yield passed(f"{name} takes the filesystems of the disk")


_TITLES = {"swap": "swap space", "lvm2": "a physical volume of LVM"}
_WITHOUT = {
    "swap": "Leave the partition out (partitions, through) and its line of /etc/fstab; the agent makes swap on the "
    "temporary disk.",
    "lvm2": "It works; a system on plain partitions is easier to repair over there.",
}
# Members of one filesystem or group bear one UUID on purpose.
_SHARED = ("btrfs", "md", "lvm2", "zfs_member", "bcache", "unknown")


async def check_twins(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether a UUID means one filesystem."""
    found: dict[str, list[Volume]] = {}
    for volume in subject.volumes:
        if volume.uuid and volume.kind not in _SHARED:
            found.setdefault(volume.uuid.lower(), []).append(volume)
    twins = {uuid: ones for uuid, ones in found.items() if len(ones) > 1}
    for uuid, ones in twins.items():
        entry = next((one for one in subject.fstab.entries if uuid in one.spec.lower()), None)
        boots = entry is not None and entry.point in _BOOTED
        yield failed(
            "block" if boots and not any(one.inside for one in ones) else "warn",
            f"{' and '.join(one.name for one in ones)} have the same UUID {uuid}: which one is mounted is chance",
            *((subject.fstab.text.at(entry.line),) if entry is not None else ()),
            remedy=_NEW_UUID.get(ones[-1].kind, "Give one of them a new UUID.").format(plain(ones[-1].name)),
        )
    if not twins:
        yield passed(f"{len(found)} filesystems have UUIDs of their own")


_NEW_UUID = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), "Give the copy a new one: tune2fs -U random {}"),
    "xfs": "Give the copy a new one: xfs_admin -U generate {}",
    "swap": "Give the copy a new one: swaplabel -U $(uuidgen) {}",
}


RULES = (
    Rule(
        id="fs.kind",
        title="the target reads these filesystems",
        why=(
            "Some importers mount the system to change it, and refuse what they can't read: AWS reads ext2 to ext4, "
            "xfs, jfs, and btrfs without subvolumes. Azure asks for no swap on the system's disk."
        ),
        check=check_kinds,
    ),
    Rule(
        id="fs.uuid",
        title="no two filesystems have the same UUID",
        why=(
            "A partition that was copied on its own disk has its original's UUID: what fstab and the kernel line mean "
            "is chance, and may be the old copy."
        ),
        check=check_twins,
    ),
    Rule(
        id="fs.free",
        title="there is room for agents and a new initramfs",
        why="Agents are installed and an initramfs is made at import or first boot; a full filesystem makes both fail.",
        check=check_free,
    ),
    Rule(
        id="fs.clean",
        title="every filesystem was unmounted",
        why=(
            "A filesystem whose journal has to be replayed is repaired at first boot; until then its free blocks can't "
            "be told from used ones, so all of it is copied."
        ),
        check=check_clean,
        for_data=True,
        needs="disk",
    ),
)
