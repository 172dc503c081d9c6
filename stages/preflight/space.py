"""Rules about filesystems as such: room to work in, and a clean state."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator

from pipeline.units import MiB, format_size
from stages.preflight.findings import Evidence, Outcome, failed, passed, plain, skipped, unknown
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import Subject
from stages.preflight.volumes import Volume

# Source: virt-v2v convert.ml, "check_guest_free_space".
_LEAST = {"/": 100 * MiB, "/boot": 50 * MiB}
_INODES_LEAST = 100
_FULL = MiB
_JOURNALS = ("ext3", "ext4", "xfs", "btrfs", "vfat", "ntfs", "exfat", "ext2")


async def check_free(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether there is room for an agent and a new initramfs."""
    for point, least in _LEAST.items():
        if point != "/" and subject.fstab.at(point) is None:
            continue
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
                f"{point}: {format_size(space.free)} free; the cloud needs room for agents and a new initramfs "
                f"({format_size(least)})",
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


RULES = (
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
