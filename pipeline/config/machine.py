"""What this machine is: its disks, which of them it runs from, and what is mounted where.

Reads /proc and /sys only; opens no device.

Source: proc_pid_mountinfo(5); Linux kernel documentation, ABI/stable/sysfs-block and ABI/testing/sysfs-block.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.units import format_size

_SECTOR = 512  # the unit of /sys/block/*/size, whatever the disk's own sectors are
# Device-mapper and md devices stand on others; real stacks are a few deep, and a cycle can't be.
_DEPTH_MAX = 16
# Devices that are no disks of a machine: memory, floppies, optical drives, network block devices without a server.
_NO_DISKS = re.compile(r"(ram|zram|loop|fd|sr|nbd|dm-|md)\d*")
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ceph", "glusterfs", "fuse.glusterfs", "lustre")
_UDEV_TAGS = {
    "ID_FS_UUID": "UUID",
    "ID_FS_LABEL": "LABEL",
    "ID_PART_ENTRY_UUID": "PARTUUID",
    "ID_PART_ENTRY_NAME": "PARTLABEL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A whole disk. `size` is bytes."""

    name: str
    size: int
    model: str = ""

    @property
    def path(self) -> str:
        """Where it is opened."""
        return f"/dev/{self.name}"

    @property
    def title(self) -> str:
        """`/dev/sda (256 GiB, Samsung SSD)`."""
        return f"{self.path} ({self.about})"

    @property
    def about(self) -> str:
        """`256 GiB, Samsung SSD`."""
        return ", ".join(filter(None, (format_size(self.size), self.model)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One mounted filesystem. `device` is "major:minor" as mountinfo tells it."""

    device: str
    point: str
    kind: str
    source: str
    writable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemDisk:
    """What this machine runs from.

    Attributes:
        disks: whole disks below the root filesystem: one, several for a mirror or a volume group, or none.
        reason: why there are none ("the root filesystem is an overlay: ..."), else nothing.
    """

    disks: tuple[Disk, ...]
    reason: str = ""


class Machine:
    """This machine, or one whose /proc and /sys lie below `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def disks(self) -> list[Disk]:
        """Every disk with something in it, by name."""
        try:
            names = sorted(entry.name for entry in (self._root / "sys/block").iterdir())
        except OSError:
            return []
        found = [self._disk(name) for name in names if not _NO_DISKS.fullmatch(name)]
        return [disk for disk in found if disk.size]

    def system_disk(self) -> SystemDisk:
        """The disks below the root filesystem."""
        mounts = [mount for mount in self.mounts() if mount.point == "/"]
        if not mounts:
            return SystemDisk(disks=(), reason="the root filesystem is not listed in /proc/self/mountinfo")
        root = mounts[-1]  # a later mount covers an earlier one
        if root.kind in ("overlay", "aufs", "unionfs"):
            return SystemDisk(disks=(), reason=f"the root filesystem is an {root.kind}: a container or a live system")
        if root.kind in ("tmpfs", "rootfs", "ramfs", "squashfs"):
            return SystemDisk(disks=(), reason=f"the root filesystem is a {root.kind}: a live system or a container")
        names = sorted(self._below(self._device_of(root)))
        if not names:
            return SystemDisk(
                disks=(), reason=f"the root filesystem ({root.kind} on {root.source}) lies on no disk here"
            )
        if all(_NO_DISKS.fullmatch(name) for name in names):
            return SystemDisk(disks=(), reason=f"the root filesystem lies on {', '.join(names)}: a live system")
        return SystemDisk(disks=tuple(self._disk(name) for name in names))

    def mounts(self) -> list[Mount]:
        """Every mount of this process's namespace, in the order they were made."""
        try:
            lines = (self._root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            left, _, right = line.partition(" - ")
            fields, behind = left.split(), right.split(" ")
            if len(fields) < 6 or len(behind) < 3:
                continue
            flags = {*fields[5].split(","), *behind[2].split(",")}
            found.append(
                Mount(
                    device=fields[2],
                    point=_unescaped(fields[4]),
                    kind=behind[0],
                    source=_unescaped(behind[1]),
                    writable="ro" not in flags,
                )
            )
        return found

    def written_to(self, name: str) -> list[str]:
        """Where filesystems of this disk are mounted so that they can be written: then the disk is alive."""
        points = [
            mount.point for mount in self.mounts() if mount.writable and name in self._below(self._device_of(mount))
        ]
        return sorted(set(points))

    def places_for_an_image(self, disks: set[str]) -> list[str]:
        """Mount points on other disks and network shares where an image could go, the one with most room first."""
        rooms: dict[str, int] = {}
        for mount in self.mounts():
            below = self._below(self._device_of(mount))
            elsewhere = bool(below) and not below & disks and not all(_NO_DISKS.fullmatch(name) for name in below)
            if mount.writable and mount.point != "/" and (elsewhere or mount.kind in _NETWORK):
                try:
                    status = os.statvfs(mount.point)
                except OSError:
                    continue
                rooms[mount.point] = status.f_bavail * status.f_frsize
        return sorted((point for point, room in rooms.items() if room), key=lambda point: -rooms[point])

    def whole_disk_of(self, path: str) -> Disk | None:
        """The disk that a device path is a partition of; None where it is none."""
        node = self._node_named(Path(os.path.realpath(path)).name)
        if node is None or not (node / "partition").exists():
            return None
        return self._disk(node.parent.name)

    def disks_below(self, mount: Mount) -> set[str]:
        """The whole disks below a mounted filesystem; nothing for one without a device."""
        return self._below(self._device_of(mount))

    def disks_of(self, number: str) -> set[str]:
        """The whole disks below a device number ("8:1"); nothing where there is no such device."""
        return self._below(number)

    def disk_names(self, path: str) -> set[str]:
        """The whole disks below a device path; nothing for what is no block device."""
        node = self._node_named(Path(os.path.realpath(path)).name)
        return self._below_node(node) if node is not None else set()

    @property
    def firmware(self) -> Literal["bios", "uefi"]:
        """What started this machine."""
        return "uefi" if (self._root / "sys/firmware/efi").exists() else "bios"

    def network_cards(self) -> list[str]:
        """Network interfaces that are hardware, by name."""
        try:
            names = sorted(entry.name for entry in (self._root / "sys/class/net").iterdir())
        except OSError:
            return []
        return [name for name in names if (self._root / "sys/class/net" / name / "device").exists()]

    def sector_size(self, name: str) -> int | None:
        """Bytes of a sector of a disk as it says itself; None where it does not."""
        told = _text(self._root / "sys/block" / name / "queue/logical_block_size")
        return int(told) if told.isdigit() else None

    def written_per_s(self, name: str) -> float | None:
        """Bytes a second that were written to a disk since the machine was started; None where that is not told.

        Source: Linux Documentation/admin-guide/abi-stable, sysfs-block "stat", field 7 (sectors of 512 bytes).
        """
        fields = _text(self._root / "sys/block" / name / "stat").split()
        uptime = _text(self._root / "proc/uptime").partition(" ")[0]
        try:
            return int(fields[6]) * _SECTOR / float(uptime)
        except (IndexError, ValueError, ZeroDivisionError):
            return None

    def known_by_udev(self) -> dict[str, set[str]]:
        """What udev knows of all devices: UUID=..., LABEL=... and the like -> the whole disks below.

        Needs no right to read a disk. Source: systemd's device database below /run/udev/data; blkid(8).
        """
        found: dict[str, set[str]] = {}
        try:
            files = sorted((self._root / "run/udev/data").glob("b*:*"))
        except OSError:
            return found
        for file in files:
            below = self._below(file.name[1:])
            for line in _text(file).splitlines():
                name, _, value = line.removeprefix("E:").partition("=")
                if name in _UDEV_TAGS and value and below:
                    found.setdefault(f"{_UDEV_TAGS[name]}={value}", set()).update(below)
        return found

    @property
    def memory(self) -> int:
        """Bytes that programs may still take (MemAvailable); 0 where it is not told."""
        try:
            text = (self._root / "proc/meminfo").read_text()
        except OSError:
            return 0
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0

    @property
    def name(self) -> str:
        """The host's name, as a name of a run."""
        host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().partition(".")[0]).lstrip(".-")
        return host or "server"

    # -- /sys ------------------------------------------------------------------------------------------------------

    def _disk(self, name: str) -> Disk:
        node = self._root / "sys/block" / name
        size = _text(node / "size")
        return Disk(
            name=name.replace("!", "/"),
            size=int(size) * _SECTOR if size.isdigit() else 0,
            model=" ".join((_text(node / "device/model") or _text(node / "device/name")).split()),
        )

    def _device_of(self, mount: Mount) -> str:
        """The device number below a mount. btrfs has numbers of its own: its mount source tells."""
        if (self._root / "sys/dev/block" / mount.device).exists() or not mount.source.startswith("/dev/"):
            return mount.device
        node = self._node_named(Path(os.path.realpath(mount.source)).name)
        return _text(node / "dev") if node is not None else mount.device

    def _node_named(self, name: str) -> Path | None:
        """The place in /sys of a device by its kernel name."""
        node = self._root / "sys/class/block" / name
        try:
            return node.resolve(strict=True)
        except OSError:
            return None

    def _below(self, number: str) -> set[str]:
        """Names of the whole disks below a device number."""
        try:
            node = (self._root / "sys/dev/block" / number).resolve(strict=True)
        except OSError:
            return set()
        return self._below_node(node)

    def _below_node(self, node: Path, depth: int = 0) -> set[str]:
        whole = node.parent if (node / "partition").exists() else node
        slaves = list(_entries(node / "slaves")) or list(_entries(whole / "slaves"))
        if not slaves or depth > _DEPTH_MAX:
            return {whole.name}
        return {name for slave in slaves for name in self._below_node(slave, depth + 1)}


def _entries(folder: Path) -> Iterator[Path]:
    try:
        for entry in folder.iterdir():
            yield entry.resolve()
    except OSError:
        return


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _unescaped(text: str) -> str:
    r"""A path of mountinfo: space, tab, line end and backslash are written `\040` and so on."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
