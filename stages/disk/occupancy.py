"""Who uses a disk right now: mounts in every namespace, volumes and loop devices over it, swap, and who hides.

A filesystem that is mounted so that it can be written changes under a reader. Uses are told by the bytes of the disk
that they cover, so that a disk, one partition of it and a loop device over its image file are all the same to a caller.

Source: proc_pid_mountinfo(5); proc_swaps(5); Linux kernel documentation, ABI/stable/sysfs-block and
ABI/testing/sysfs-block; open(2), O_EXCL on block devices.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

_SECTOR = 512  # the unit of start, size and offset below /sys/block, whatever the disk's own sectors are
# Volumes stand on others; real stacks are a few deep, and a cycle can't be.
_DEPTH_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Somebody who uses a stretch of the disk.

    Attributes:
        offset, length: bytes of the disk.
        kind: `held` is somebody who has the device to himself and can't be seen from here.
        point: where it is mounted, first the places that this process sees; else what uses it.
        filesystem: its kind, of a mount.
        writable: it may be written through this use. Of a mount: its filesystem is, wherever one may write to it.
        device: "major:minor" of the device that is mounted, the same for all mounts of one filesystem.
        is_reachable: `point` is a path of this process.
    """

    offset: int
    length: int
    kind: Literal["mount", "swap", "held"]
    point: str
    filesystem: str = ""
    writable: bool = False
    device: str = ""
    is_reachable: bool = True

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.offset + self.length

    def touches(self, offset: int, length: int) -> bool:
        """Whether it covers any of these bytes."""
        return self.offset < offset + length and offset < self.end


@dataclass(frozen=True, slots=True)
class Mounted:
    """A line of a mountinfo. `writable` is of the filesystem, `is_here` whether this process sees it."""

    device: str
    point: str
    kind: str
    source: str
    writable: bool
    is_here: bool


@dataclass(slots=True)
class _Places:
    """Devices by number, and which bytes of the disk lie below each."""

    found: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, number: str, offset: int, length: int) -> bool:
        """Whether that was news."""
        known = self.found.setdefault(number, [])
        if length <= 0 or (offset, length) in known:
            return False
        known.append((offset, length))
        return True


def uses_of(disk: Path, *, root: Path = Path("/")) -> tuple[Use, ...]:
    """Everybody who uses a disk or an image file now, ascending.

    Args:
        root: where /proc and /sys are.
    """
    return _Look(disk, root).uses()


def devices_over(disk: Path, *, root: Path = Path("/")) -> dict[str, tuple[tuple[int, int], ...]]:
    """Every device that shows bytes of the disk, by its "major:minor", with (offset, length) of the disk below it."""
    return {number: tuple(places) for number, places in _Look(disk, root).places.found.items()}


def mounts_here(root: Path = Path("/")) -> list[Mounted]:
    """The mounts that this process sees, in the order they were made."""
    return list(_parsed(_lines(root / "proc/self/mountinfo"), is_here=True))


def devices_below(mount: Mounted, *, root: Path = Path("/")) -> list[str]:
    """Numbers of all devices that a mounted filesystem lies on, down to partitions and disks."""
    block = root / "sys/dev/block"
    waiting = [(number, 0) for number in _devices_of(mount, root)]
    found: list[str] = []
    while waiting:
        number, depth = waiting.pop()
        try:
            node = (block / number).resolve(strict=True)
        except OSError:
            continue
        slaves = [_text(one.resolve() / "dev") for one in _entries(node / "slaves")]
        if slaves and depth < _DEPTH_MAX:
            waiting += [(slave, depth + 1) for slave in slaves]
        elif number not in found:
            found.append(number)
    return found


def filesystems_of(path: Path, *, root: Path = Path("/")) -> list[str]:
    """Devices of the filesystem that a path lies on (or will: its nearest folder), and of those below loop devices."""
    found: list[str] = []
    waiting = [path.absolute()]
    for _ in range(_DEPTH_MAX):
        if not waiting:
            break
        place = waiting.pop()
        while not place.exists() and place != place.parent:
            place = place.parent
        real = str(place.resolve())
        inside = [
            mount
            for mount in mounts_here(root)
            if real == mount.point or real.startswith(mount.point.rstrip("/") + "/")
        ]
        # The longest; of two at one place the later covers the earlier.
        best = max(enumerate(inside), key=lambda one: (len(one[1].point), one[0]), default=None)
        for device in _devices_of(best[1], root) if best else ():
            found.append(device)
            backing = _text(root / "sys/dev/block" / device / "loop/backing_file")
            if backing:
                waiting.append(Path(backing))
    return found


def bytes_written(disk: Path, *, root: Path = Path("/")) -> int | None:
    """Bytes written to a device since it is there, or to a file through loop devices; None for a file without any.

    Source: Linux kernel documentation, "Block layer statistics in /sys/block/<dev>/stat", field 7.
    """
    status = os.stat(disk)
    if stat.S_ISBLK(status.st_mode):
        nodes = [root / "sys/dev/block" / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"]
    else:
        nodes = list(_loops_over(str(disk.resolve()), root))
    counts = [_text(node / "stat").split() for node in nodes]
    known = [int(fields[6]) * _SECTOR for fields in counts if len(fields) > 6]
    return sum(known) if known else None


def _loops_over(backing: str, root: Path) -> Iterator[Path]:
    """Loop devices over a file or device, as folders of /sys."""
    for node in _entries(root / "sys/block"):
        if node.name.startswith("loop") and _text(node / "loop/backing_file") == backing:
            yield node


def _devices_of(mount: Mounted, root: Path) -> list[str]:
    """Devices that are mounted. btrfs mounts have numbers of their own, and may lie on several devices."""
    if (root / "sys/dev/block" / mount.device).exists():
        return [mount.device]
    name = Path(os.path.realpath(mount.source)).name
    for members in root.glob("sys/fs/btrfs/*/devices"):
        numbers = {member.name: _text(member / "dev") for member in _entries(members)}
        if name in numbers:
            return [numbers[one] for one in sorted(numbers)]
    try:
        status = os.stat(mount.source)
    except OSError:
        return [mount.device]
    is_device = stat.S_ISBLK(status.st_mode)
    return [f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if is_device else mount.device]


def _parsed(lines: list[str], *, is_here: bool) -> Iterator[Mounted]:
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, behind = left.split(), right.split(" ")
        if len(fields) >= 6 and len(behind) >= 3:
            yield Mounted(
                device=fields[2],
                point=_unescaped(fields[4]),
                kind=behind[0],
                source=_unescaped(behind[1]),
                # Of the filesystem, not of this mount of it: it is written as soon as one mount may.
                writable="ro" not in behind[2].split(","),
                is_here=is_here,
            )


def sector_size_of(device: Path, *, root: Path = Path("/")) -> int:
    """Logical sectors of a block device, in bytes; 512 where that is not told."""
    number = os.stat(device).st_rdev
    try:
        node = (root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    except OSError:
        return 512
    whole = node.parent if (node / "partition").exists() else node
    return _number(whole / "queue/logical_block_size") or 512


class _Look:
    def __init__(self, disk: Path, root: Path) -> None:
        self._root = root
        self._block = root / "sys/dev/block"
        self.places = _Places()
        self._own: list[tuple[str, int, int]] = []  # the disk and its partitions: name, offset, length
        status = os.stat(disk)
        if stat.S_ISBLK(status.st_mode):
            node = self._node(f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
            if node is not None:
                self._add_device(node, 0, _number(node / "size") * _SECTOR, own=True)
                backing = _text(node / "loop/backing_file")
                if backing:
                    self._add_loops(backing, -_number(node / "loop/offset"), _number(node / "size") * _SECTOR)
        else:
            self._add_loops(str(disk.resolve()), 0, status.st_size)

    def uses(self) -> tuple[Use, ...]:
        """Mounts and swap by what lies below them; and what holds the disk without being one of those."""
        found = [*self._mount_uses(), *self._swap_uses()]
        found += self._hidden(found)
        return tuple(sorted(set(found), key=lambda use: (use.offset, use.kind, use.point)))

    # -- what lies over the disk ---------------------------------------------------------------------------------------

    def _add_device(self, node: Path, offset: int, length: int, depth: int = 0, *, own: bool = False) -> None:
        """A device over these bytes, with its partitions and all that stands on them."""
        number = _text(node / "dev")
        if not number or depth > _DEPTH_MAX or not self.places.add(number, offset, length):
            return
        if own:
            self._own.append((node.name, offset, length))
        for part in _entries(node):
            if (part / "partition").exists():
                start, size = _number(part / "start") * _SECTOR, _number(part / "size") * _SECTOR
                self._add_device(part, offset + start, min(size, length - start), depth + 1, own=own)
        for holder in _entries(node / "holders"):
            # Where on it the volumes lie is not told here: any of its bytes may be theirs.
            place = holder.resolve()
            self._add_device(place, offset, length, depth + 1)
        self._add_loops(f"/dev/{node.name}", offset, length, depth + 1)

    def _add_loops(self, backing: str, base: int, length: int, depth: int = 0) -> None:
        """Loop devices over a file; its byte 0 is byte `base` of the disk."""
        for node in _loops_over(backing, self._root):
            begin = base + _number(node / "loop/offset")
            end = min(begin + _number(node / "size") * _SECTOR, length)
            if end > max(0, begin):
                self._add_device(node.resolve(), max(0, begin), end - max(0, begin), depth + 1)

    def _node(self, number: str) -> Path | None:
        try:
            return (self._block / number).resolve(strict=True)
        except OSError:
            return None

    # -- who uses what -------------------------------------------------------------------------------------------------

    def _mount_uses(self) -> Iterator[Use]:
        for mount in self._mounts():
            numbers = _devices_of(mount, self._root)
            for number in numbers:
                for offset, length in self.places.found.get(number, ()):
                    yield Use(
                        offset=offset,
                        length=length,
                        kind="mount",
                        point=mount.point,
                        filesystem=mount.kind,
                        writable=mount.writable,
                        device=numbers[0],
                        is_reachable=mount.is_here,
                    )

    def _mounts(self) -> Iterator[Mounted]:
        """Of this process, then of every other namespace."""
        seen: set[str] = set()
        own = self._root / "proc/self"
        others = sorted(
            (one for one in _entries(self._root / "proc") if one.name.isdigit()), key=lambda one: int(one.name)
        )
        for process in (own, *others):
            try:
                namespace = os.readlink(process / "ns/mnt")
                if namespace in seen:
                    continue
                lines = (process / "mountinfo").read_text(errors="surrogateescape").splitlines()
            except OSError:
                if process is not own:
                    continue
                namespace, lines = "", _lines(process / "mountinfo")
            seen.add(namespace)
            yield from _parsed(lines, is_here=process is own)

    def _swap_uses(self) -> Iterator[Use]:
        for line in _lines(self._root / "proc/swaps")[1:]:
            name = _unescaped(line.split()[0])
            node = self._root / "sys/class/block" / Path(os.path.realpath(name)).name
            for offset, length in self.places.found.get(_text(node / "dev"), ()):
                yield Use(offset=offset, length=length, kind="swap", point=f"swap on {name}", writable=True)

    def _hidden(self, known: list[Use]) -> Iterator[Use]:
        """Who has a device to himself and is none of those known: a mount that nobody shows, another kernel's volume.

        Whoever mounts a device, or builds a volume on it, claims it; claiming it as well fails then.
        """
        for name, offset, length in sorted(self._own, key=lambda own: own[2]):
            number = _text(self._root / "sys/class/block" / name / "dev")
            is_explained = any(use.touches(offset, length) for use in known) or any(
                (offset, length) in places for other, places in self.places.found.items() if other != number
            )
            if is_explained or not _is_claimed(self._root / "dev" / name.replace("!", "/")):
                continue
            use = Use(
                offset=offset, length=length, kind="held", point=f"something that holds /dev/{name}", writable=True
            )
            known.append(use)
            yield use


def _is_claimed(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape").strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.isdigit() else 0


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(errors="surrogateescape").splitlines()
    return []


def _unescaped(text: str) -> str:
    r"""A path of mountinfo: space, tab, line end and backslash are written `\040` and so on."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
