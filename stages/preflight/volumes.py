"""What on the exported disk can be mounted, swapped on or booted from, and what a system's configuration means by it.

A name such as UUID=..., /dev/sda2 or /dev/mapper/vg-root is resolved among the volumes of this disk alone: what is not
found there is not in the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from stages.disk.volumes import DiskVolumes

# Names that the kernel counts: what they mean depends on what else is there.
_COUNTED = re.compile(r"/dev/(dm-\d+|loop\d+(p\d+)?|ram\d+|nbd\d+(p\d+)?|drbd\d+)")
# Names that the kernel gives to disks by their bus. They change when the disk moves to another bus.
_DISK_NAME = re.compile(r"/dev/((?:sd|hd|vd|xvd)[a-z]+|nvme\d+n\d+|mmcblk\d+)(?:p?(\d+))?")
_FIRST = frozenset({"sda", "hda", "vda", "xvda", "nvme0n1", "mmcblk0"})

Naming = Literal["uuid", "label", "partuuid", "partlabel", "device", "mapper", "path", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """One thing with a filesystem, swap or the like on it. Sizes in bytes.

    Attributes:
        names: device paths that mean it, the plainest first.
        number: of its partition; None for a logical volume and for a disk without partitions.
        kind: as `identify` names it: ext4, xfs, swap, vfat ...
        part_uuid, part_label: of the partition that it fills.
        state: whether it was unmounted cleanly, as its superblock says.
        dirty: why its content may not be the last that was written; empty where nothing says so.
        inside: "lvm" for a logical volume.
    """

    names: tuple[str, ...]
    number: int | None
    kind: str
    size: int
    uuid: str = ""
    label: str = ""
    part_uuid: str = ""
    part_label: str = ""
    state: str = "unknown"
    dirty: str = ""
    inside: Literal["", "lvm"] = ""

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.names[0] if self.names else self.uuid or self.kind

    @property
    def best_spec(self) -> str:
        """How configuration should name it: by what travels with its content."""
        return f"UUID={self.uuid}" if self.uuid else f"PARTUUID={self.part_uuid}" if self.part_uuid else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What a name in the configuration means.

    Attributes:
        naming: by what it names.
        volume: None where no volume of this disk is meant.
        is_certain: False where the volumes could not all be told, so that it may be there after all.
    """

    spec: str
    naming: Naming
    volume: Volume | None
    is_certain: bool = True


class Volumes:
    """Every volume of the exported disk.

    Args:
        disk_name: `sda` where the disk's name is known (live), else empty: then the first disk of each bus is meant.
        opaque: what may hold further volumes that could not be looked into (LUKS, RAID, damaged LVM): their names.
    """

    def __init__(self, volumes: Sequence[Volume], *, disk_name: str = "", opaque: Sequence[str] = ()) -> None:
        self._volumes = tuple(volumes)
        self.opaque = tuple(opaque)
        self._disk_name = disk_name

    def __iter__(self) -> Iterator[Volume]:
        return iter(self._volumes)

    def __len__(self) -> int:
        return len(self._volumes)

    def resolve(self, spec: str) -> Meaning:
        """What a spec of fstab, crypttab or a kernel line means."""
        naming, found = self._find(spec)
        certain = found is not None or not self.opaque
        return Meaning(spec=spec, naming=naming, volume=found, is_certain=certain)

    def _find(self, spec: str) -> tuple[Naming, Volume | None]:
        key, equals, value = spec.partition("=")
        value = value.strip("\"'")
        if equals and key.upper() in _TAGS:
            naming, field = _TAGS[key.upper()]
            return naming, self._by(field, value)
        for folder, tag in _LINKS.items():
            if spec.startswith(folder):
                naming, field = _TAGS[tag]
                return naming, self._by(field, _unescaped(spec[len(folder) :]))
        if match := _DISK_NAME.fullmatch(spec):
            return "device", self._of_disk(match[1], int(match[2]) if match[2] else None)
        if _COUNTED.fullmatch(spec):
            return "device", next((one for one in self._volumes if spec in one.names), None)
        naming: Naming = "mapper" if spec.startswith("/dev/") and not spec.startswith(_BY_HARDWARE) else "path"
        if not spec.startswith("/dev/"):
            naming = "other"
        return naming, next((one for one in self._volumes if spec in one.names), None)

    def _by(self, field: str, value: str) -> Volume | None:
        fold = field in ("uuid", "part_uuid")  # GUIDs and FAT serials are written in either case
        wanted = value.lower() if fold else value
        for one in self._volumes:
            has = getattr(one, field)
            if has and (has.lower() if fold else has) == wanted:
                return one
        return None

    def _of_disk(self, disk: str, number: int | None) -> Volume | None:
        if disk != self._disk_name and (self._disk_name or disk not in _FIRST):
            return None
        return next((one for one in self._volumes if one.number == number and not one.inside), None)

    def is_disk(self, name: str) -> bool:
        """Whether a kernel name (`sda`) means the exported disk."""
        return name == self._disk_name if self._disk_name else name in _FIRST


_TAGS: dict[str, tuple[Naming, str]] = {
    "UUID": ("uuid", "uuid"),
    "LABEL": ("label", "label"),
    "PARTUUID": ("partuuid", "part_uuid"),
    "PARTLABEL": ("partlabel", "part_label"),
}
_LINKS = {
    "/dev/disk/by-uuid/": "UUID",
    "/dev/disk/by-label/": "LABEL",
    "/dev/disk/by-partuuid/": "PARTUUID",
    "/dev/disk/by-partlabel/": "PARTLABEL",
}
_BY_HARDWARE = ("/dev/disk/by-id/", "/dev/disk/by-path/")


def _unescaped(name: str) -> str:
    r"""A name below /dev/disk, where udev writes odd characters as `\x20`."""
    return re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), name)


def disk_name_in(text: str) -> re.Match[str] | None:
    """A device name in a line that depends on the bus of its disk."""
    return _DISK_NAME.search(text)


def partition_path(disk: str, number: int) -> str:
    """The device of a partition: /dev/sda1, /dev/nvme0n1p1."""
    return f"/dev/{disk}{'p' if disk[-1:].isdigit() else ''}{number}"


def known_volumes(disk: DiskVolumes, *, disk_name: str = "") -> Volumes:
    """The volumes of a disk that was opened.

    Args:
        disk_name: `sda`, where the disk is one of this machine.
    """
    shown = disk_name or "sda"
    found: list[Volume] = []
    opaque: list[str] = []
    for one in disk.volumes:
        if one.group:
            mapped = f"{one.group.replace('-', '--')}-{one.logical.replace('-', '--')}"
            names: tuple[str, ...] = (f"/dev/mapper/{mapped}", f"/dev/{one.group}/{one.logical}")
        else:
            names = (partition_path(shown, one.number),) if one.number is not None else (f"/dev/{shown}",)
        signature = one.signature
        if signature.kind in _OPAQUE or (one.group and signature.kind == "unknown"):
            opaque.append(f"{names[0]} ({signature.kind})")
        found.append(
            Volume(
                names=names,
                number=one.number,
                kind="vfat" if signature.kind in ("fat12", "fat16", "fat32") else signature.kind,
                size=one.length,
                uuid=signature.uuid,
                label=signature.label,
                part_uuid=one.partition.uuid if one.partition else "",
                part_label=one.partition.name if one.partition else "",
                state=signature.state,
                dirty=(one.tree.dirty or "") if one.tree is not None else "",
                inside="lvm" if one.group else "",
            )
        )
    if any(one.kind == "lvm2" for one in found) and not any(one.inside for one in found):
        opaque.append("a volume group that could not be read")
    return Volumes(found, disk_name=disk_name, opaque=opaque)


# What may hold volumes that can't be looked into here.
_OPAQUE = ("luks", "md", "bcache", "zfs_member", "ambiguous", "bitlocker")
