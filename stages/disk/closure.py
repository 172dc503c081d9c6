"""Which partitions a system needs to start: its root, /boot, the EFI partition, /home, and whatever fstab mounts.

A running system is asked through /proc and /sys, any other by its own fstab. What lies on volumes is followed down to
partitions: volume groups, RAID arrays and btrfs filesystems are needed with all of their members.

Source: fstab(5); systemd.mount(5) for what stops a start (neither `nofail` nor `noauto`).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import FormatError, PlanError
from pipeline.flow.items import RangeReader
from stages.disk.fstab import Mountable, parse_fstab
from stages.disk.occupancy import devices_below, devices_over, mounts_here
from stages.disk.signatures import Signature, identify
from stages.disk.tables import Partition, PartitionTable
from stages.disk.tree import View
from stages.disk.view import open_system
from stages.disk.volumes import open_volumes

# Needed whether fstab names them or not.
ROOTS = ("/", "/boot", "/boot/efi", "/efi", "/home", "/usr", "/var")
# What firmware and GRUB start from; no fstab names the first.
_BOOT_TYPES = ("21686148-6449-6e6f-744e-656564454649", "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "0xef")
_NO_DISK = re.compile(
    r"^(tmpfs|proc|sysfs|devpts|devtmpfs|overlay|none|nfs4?|cifs|smb3|sshfs|9p|ceph|glusterfs|fuse.*)$"
)
_NUMBERED = re.compile(r"^/dev/(?:([shv]d[a-z]+|xvd[a-z]+)|((?:nvme\d+n|mmcblk)\d+)p)(\d+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Something that the system mounts.

    Attributes:
        point: where.
        numbers: partitions of this disk that it lies on.
        elsewhere: what of it is not on this disk; empty where all of it is.
        is_optional: a start does not wait for it; it goes along where it is on this disk.
    """

    point: str
    numbers: tuple[int, ...]
    elsewhere: str = ""
    is_optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Closure:
    """What a system needs of its disk.

    Attributes:
        root: partitions that "/" lies on.
        numbers: all that are needed, ascending.
    """

    root: tuple[int, ...]
    numbers: tuple[int, ...]
    needs: tuple[Need, ...] = ()

    def elsewhere(self) -> tuple[Need, ...]:
        """What is not on this disk alone."""
        return tuple(need for need in self.needs if need.elsewhere and not need.is_optional)


async def signatures_of(reader: RangeReader, table: PartitionTable) -> dict[int, Signature]:
    """What each partition holds, by number."""
    return {
        one.number: await identify(reader, one.start, one.length)
        for one in table.partitions
        if not one.is_extended and one.end <= reader.size
    }


def live_closure(
    disk: Path, table: PartitionTable, signatures: Mapping[int, Signature], *, root: Path = Path("/")
) -> Closure | None:
    """What the running system needs of a disk; None where it does not run from this one.

    Args:
        root: where /proc, /sys and /etc are.
    """
    places = devices_over(disk, root=root)
    mounts = {mount.point: mount for mount in mounts_here(root)}  # a later mount covers an earlier one
    if "/" not in mounts or not set(places) & set(devices_below(mounts["/"], root=root)):
        return None
    try:
        text = (root / "etc/fstab").read_text(errors="replace")
    except OSError:
        text = ""
    points = {point: "" for point in ROOTS if point in mounts}
    entries = _mounted_by(text)
    points.update({entry.path: entry.spec for entry in entries})
    optional = {entry.path for entry in entries if _is_optional(entry)}
    needs = []
    for point, spec in points.items():
        if point in mounts:
            if _NO_DISK.fullmatch(mounts[point].kind):
                continue
            below = devices_below(mounts[point], root=root)
            named = mounts[point].source
        else:
            below, named = _devices_of_spec(spec), spec
        numbers: set[int] = set()
        for device in below:
            for offset, length in places.get(device, ()):
                numbers |= _covered(table, offset, length)
        away = [device for device in below if device not in places]
        needs.append(
            Need(
                point=point,
                numbers=tuple(sorted(numbers)),
                elsewhere=named if away or not numbers else "",
                is_optional=point in optional,
            )
        )
    return _closed(table, signatures, needs)


async def offline_closure(
    reader: RangeReader, table: PartitionTable, signatures: Mapping[int, Signature]
) -> Closure | None:
    """What the system on a disk that it does not run from needs; None where there is no system.

    Raises:
        SourceError, StoreError: the disk can't be read.
    """
    try:
        view = await open_system(await open_volumes(reader))
        volume = view.mounts[0].volume
        root = {volume.number} if volume.number is not None else _holding(signatures, "lvm2")
        return await view_closure(view, root, table, signatures)
    except FormatError:
        return None


async def view_closure(
    view: View, root: Collection[int], table: PartitionTable, signatures: Mapping[int, Signature]
) -> Closure:
    """What a system that does not run needs, by its own fstab.

    Args:
        view: the system.
        root: partitions that its root filesystem lies on.
    Raises:
        FormatError: the filesystem is damaged.
    """
    try:
        text = (await view.read("/etc/fstab")).decode("utf-8", "replace")
    except OSError:
        text = ""
    entries = _mounted_by(text)
    # Which of the names of disks is this one: only the entry of the root tells.
    own = next((_disk_name(entry.spec) for entry in entries if entry.path == "/"), "")
    needs = [Need(point="/", numbers=tuple(sorted(root)))]
    for entry in entries:
        if entry.path == "/":
            continue
        numbers = _of_spec(entry.spec, own, table, signatures)
        needs.append(
            Need(
                point=entry.path,
                numbers=tuple(sorted(numbers)),
                elsewhere="" if numbers else entry.spec,
                is_optional=_is_optional(entry),
            )
        )
    return _closed(table, signatures, needs)


def needed_partitions(closure: Closure | None) -> tuple[int, ...]:
    """The partitions that `partitions = "needed"` keeps.

    Raises:
        PlanError: what is needed can't be told, or is not on this disk.
    """
    if closure is None:
        raise PlanError(
            "what is needed of this disk can't be told: no system that starts from it was found",
            operation="cut",
            hint='Name the partitions, as in partitions = [1, 2]; `pipeline disk` shows them. Or keep them all: "all".',
        )
    for need in closure.elsewhere():
        raise PlanError(
            f"{need.point} lies on {need.elsewhere}, and an image holds one disk",
            operation="cut",
            hint=f"Move it to this disk; or export that disk as well, and mark {need.point} nofail in /etc/fstab.",
        )
    return closure.numbers


def check_cut(closure: Closure | None, kept: Collection[int]) -> None:
    """See that a cut that keeps a system's root keeps all that it needs.

    Raises:
        PlanError: it does not; the hint names the smallest cut that works.
    """
    if closure is None or not set(closure.root) & set(kept):
        return
    for need in closure.needs:
        lost = sorted(set(need.numbers) - set(kept))
        if lost and not need.is_optional:
            raise PlanError(
                f"the cut drops {need.point} (partition {lost[0]}), and the system does not start without it",
                operation="cut",
                hint=f"The smallest cut that works is partitions = {list(closure.numbers)}; or mark {need.point} "
                "nofail in /etc/fstab.",
            )


# -- fstab -------------------------------------------------------------------------------------------------------------


def _mounted_by(text: str) -> list[Mountable]:
    """What a start waits for, and of ROOTS the rest too; with bare specs and paths."""
    found = []
    for entry in parse_fstab(text):
        path = entry.path.rstrip("/") or "/"
        is_bound = any(entry.option(name) is not None for name in ("bind", "rbind", "_netdev"))
        is_of_disk = entry.kind != "swap" and not _NO_DISK.fullmatch(entry.kind) and not is_bound
        if path.startswith("/") and is_of_disk and (path in ROOTS or not _is_optional(entry)):
            found.append(replace(entry, spec=entry.spec.strip('"'), path=path))
    return found


def _is_optional(entry: Mountable) -> bool:
    return any(entry.option(name) is not None for name in ("nofail", "noauto"))


def _devices_of_spec(spec: str) -> list[str]:
    """The device number behind a spec, on this machine."""
    name, equals, value = spec.partition("=")
    kinds = {"UUID": "by-uuid", "LABEL": "by-label", "PARTUUID": "by-partuuid", "PARTLABEL": "by-partlabel"}
    path = f"/dev/disk/{kinds[name]}/{value.strip(chr(34))}" if equals and name in kinds else spec
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"] if stat.S_ISBLK(status.st_mode) else []


def _disk_name(spec: str) -> str:
    """`sda` of /dev/sda1; empty where a spec names no disk."""
    match = _NUMBERED.match(spec)
    return (match[1] or match[2]) if match else ""


def _of_spec(spec: str, own: str, table: PartitionTable, signatures: Mapping[int, Signature]) -> set[int]:
    """Partitions of this disk that a spec means."""
    real = [one for one in table.partitions if not one.is_extended]
    if match := re.match(r"^/dev/disk/by-(uuid|label|partuuid|partlabel)/(.+)$", spec):
        spec = f"{match[1].upper()}={match[2]}"
    name, equals, value = spec.partition("=")
    value = value.strip('"')
    if equals:
        return {one.number for one in real if value and _property(name, one, signatures).lower() == value.lower()}
    if match := _NUMBERED.match(spec):
        if own and (match[1] or match[2]) != own:
            return set()
        return {one.number for one in real if one.number == int(match[3])}
    if spec.startswith("/dev/md"):
        return _holding(signatures, "md")
    if re.match(r"^/dev/[^/]+/[^/]+$", spec):  # a mapped name, or a volume by its group
        return _holding(signatures, "lvm2") or _holding(signatures, "luks")
    return set()


def _property(name: str, partition: Partition, signatures: Mapping[int, Signature]) -> str:
    signature = signatures.get(partition.number, Signature(kind="unknown"))
    return {
        "UUID": signature.uuid,
        "LABEL": signature.label,
        "PARTUUID": partition.uuid,
        "PARTLABEL": partition.name,
    }.get(name.upper(), "")


def _holding(signatures: Mapping[int, Signature], kind: str) -> set[int]:
    return {number for number, signature in signatures.items() if signature.kind == kind}


# -- closing -----------------------------------------------------------------------------------------------------------


def _covered(table: PartitionTable, offset: int, length: int) -> set[int]:
    real = [one for one in table.partitions if not one.is_extended]
    exact = {one.number for one in real if one.start == offset}
    return exact or {one.number for one in real if one.start < offset + length and offset < one.end}


def _closed(table: PartitionTable, signatures: Mapping[int, Signature], needs: list[Need]) -> Closure:
    """With what firmware starts from, all members of what has several, and what the numbers of others hang on."""
    numbers = {number for need in needs for number in need.numbers}
    numbers |= {one.number for one in table.partitions if one.type in _BOOT_TYPES}
    for number in tuple(numbers):
        own = signatures.get(number)
        if own is None:
            continue
        if own.kind == "lvm2":
            # Which of them are of one group is not looked at: one more costs only its metadata.
            numbers |= _holding(signatures, "lvm2")
        elif own.kind in ("md", "btrfs") and own.uuid:
            numbers |= {other for other, one in signatures.items() if (one.kind, one.uuid) == (own.kind, own.uuid)}
    chain = [record.number for record in table.boot_records if record.number]
    last = max((index for index, number in enumerate(chain) if number in numbers), default=-1)
    numbers |= set(chain[: last + 1])
    root = next((need.numbers for need in needs if need.point == "/"), ())
    return Closure(root=root, numbers=tuple(sorted(numbers)), needs=tuple(needs))
