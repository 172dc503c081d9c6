"""Whether a folder lies on a given disk: an export must never be written onto the disk that it reads."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# Device-mapper and md stack devices; real stacks are a few deep, and a cycle can't be.
_DEPTH_MAX = 16


def lies_on_disk(folder: Path, disk: Path) -> bool:
    """Whether `folder`'s filesystem is on `disk` (a block device), one of its partitions, or a volume over it.

    An image file as the source is never "the disk" a folder lies on; a loop device over it is another matter and is
    named as such.
    """
    status = os.stat(disk)
    if not stat.S_ISBLK(status.st_mode):
        return False
    wanted = _family(_number(status.st_rdev))
    return bool(wanted & _family(_number(os.stat(folder).st_dev)) or wanted & _family(_mounted_device(folder)))


def is_of_disk(target: os.stat_result, disk: Path) -> bool:
    """Whether what is open is `disk`: the same file, or a block device that shares its medium. Raises OSError."""
    source = os.stat(disk)
    if stat.S_ISBLK(target.st_mode) and stat.S_ISBLK(source.st_mode):
        return bool(_family(_number(target.st_rdev)) & _family(_number(source.st_rdev)))
    return os.path.samestat(target, source)


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _family(number: str, depth: int = 0) -> set[str]:
    """The whole disks behind a device number: its parent disk, and those of every device below it."""
    if not number or depth > _DEPTH_MAX:
        return set()
    node = Path("/sys/dev/block") / number
    try:
        place = node.resolve(strict=True)
    except OSError:
        return {number}
    whole = place.parent if (place / "partition").exists() else place
    try:
        disks = {(whole / "dev").read_text().strip()}
    except OSError:
        disks = {number}
    for below in (whole / "slaves").glob("*") if (whole / "slaves").is_dir() else ():
        try:
            disks |= _family((below / "dev").read_text().strip(), depth + 1)
        except OSError:
            continue
    return disks


def _mounted_device(folder: Path) -> str:
    """Device number behind the mount that holds `folder`; btrfs and overlay give anonymous numbers in stat(2).

    Source: proc_pid_mountinfo(5): fields 5 (mount point) and, behind the separator, the mount source.
    """
    best, source = "", ""
    target = str(folder.resolve())
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        if (target == point or target.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, source = point, right.split()[1]
    try:
        status = os.stat(source)
    except OSError:
        return ""
    return _number(status.st_rdev) if stat.S_ISBLK(status.st_mode) else ""
