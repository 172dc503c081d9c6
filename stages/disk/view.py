"""A system on a disk by absolute paths: its root filesystem, and what its fstab mounts into it.

Links are followed inside of the view only, at most 40 for a path; `..` above the root stays there. A filesystem that is
damaged is left out with the reason; paths that lead into it answer as if nothing was mounted there.

Source: path_resolution(7); fstab(5); udev's persistent names below /dev/disk.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import FormatError
from pipeline.units import MiB
from stages.disk.fstab import Mountable, parse_fstab
from stages.disk.paths import DEPTH_MAX, LINKS_MAX, failure, split
from stages.disk.tree import READ_LIMIT, Entry, FileTree, HasSubvolumes, Kind, Node, Space
from stages.disk.volumes import DiskVolumes, Volume

_NAME_MAX = 255
_FSTAB_MAX = MiB
_MENU_MAX = 4 * MiB
# Lines of fstab that are mounted; each costs a walk.
_MOUNTS_MAX = 64
_SUBVOLUMES_MAX = 64

# Not on any disk, or not on this one.
_NOT_HERE = re.compile(
    "autofs|binfmt_misc|bpf|ceph|cgroup2?|cifs|configfs|debugfs|devpts|devtmpfs|efivarfs|fuse.sshfs|glusterfs|hugetlbfs"
    "|mqueue|nfs4?|none|overlay|proc|pstore|ramfs|securityfs|smb3|swap|sysfs|tmpfs|tracefs"
)
SYSTEM_MARKS = ("/etc/os-release", "/usr/lib/os-release", "/sbin/init", "/usr/lib/systemd/systemd", "/bin/init")
_MENUS = ("grub/grub.cfg", "grub2/grub.cfg", "grub2/grubenv", "grub/grubenv", "extlinux/extlinux.conf", "syslinux.cfg")
_MENU_ROOT = re.compile(
    rb"^[ \t]*(?:linux\w*|kernel|options|append|kernelopts)[ \t=].*?\broot=(\S+)(?:.*?\brootflags=(\S+))?", re.I | re.M
)
_SD = re.compile(r"/dev/((?:sd|hd|vd|xvd)[a-z]{1,2})(\d{0,3})")
_NVME = re.compile(r"/dev/((?:nvme\d+n\d+|mmcblk\d+|nbd\d+|loop\d+))(?:p(\d{1,3}))?")


@dataclass(frozen=True, slots=True)
class Mounted:
    """A filesystem in its place. `path` has no links; `root` is the inode that is seen there."""

    path: str
    volume: Volume
    tree: FileTree
    root: int


@dataclass(frozen=True, slots=True)
class NotMounted:
    """A line of fstab that could not be followed, and why."""

    entry: Mountable
    reason: str


@dataclass(frozen=True, slots=True)
class _Step:
    tree: FileTree
    number: int
    node: Node


class DiskView:
    """The files of a system on a disk. Implements `stages.disk.tree.View`.

    Made by `open_system`; `DiskView(tree)` is a single filesystem by itself. Safe to use from many tasks at once.

    Attributes:
        mounts: what is mounted, the root first.
        not_mounted: lines of its fstab that could not be followed.
        problems: what was damaged on the way here.
    """

    def __init__(self, tree: FileTree, root: int | None = None) -> None:
        self._tree = tree
        self._root = tree.root if root is None else root
        self._mounts: dict[tuple[str, ...], Mounted] = {}
        self.mounts: tuple[Mounted, ...] = ()
        self.not_mounted: tuple[NotMounted, ...] = ()
        self.problems: tuple[str, ...] = ()

    @property
    def is_live(self) -> bool:
        """False: a disk keeps still."""
        return False

    async def stat(self, path: str, *, follow: bool = True) -> Node:
        """The inode at `path`; of the link itself without `follow`."""
        return (await self._walk(path, follow))[0].node

    async def list(self, path: str) -> tuple[Entry, ...]:
        """All names of a folder but `.` and `..`."""
        step, _ = await self._walk(path, True)
        if step.node.kind is not Kind.DIRECTORY:
            raise failure(errno.ENOTDIR, path)
        return await step.tree.entries(step.number)

    async def read(self, path: str, *, limit: int = READ_LIMIT) -> bytes:
        """A whole regular file of at most `limit` bytes."""
        step = await self._file(path)
        if step.node.size > limit:
            raise failure(errno.EFBIG, path)
        return await step.tree.read(step.number, 0, step.node.size)

    async def read_at(self, path: str, offset: int, length: int) -> bytes:
        """Bytes of a regular file; fewer only at its end."""
        step = await self._file(path)
        if offset < 0 or length < 0:
            raise failure(errno.EINVAL, path)
        return await step.tree.read(step.number, offset, max(0, min(length, step.node.size - offset)))

    async def target(self, path: str) -> str:
        """What the link at `path` says. Raises OSError EINVAL where it is none."""
        step, _ = await self._walk(path, False)
        if step.node.kind is not Kind.LINK:
            raise failure(errno.EINVAL, path)
        return await step.tree.target(step.number)

    async def resolve(self, path: str) -> str:
        """The path without links. Everything on the way must exist."""
        return "/" + "/".join((await self._walk(path, True))[1])

    async def space(self, path: str) -> Space:
        """Of the filesystem that holds `path`."""
        return await (await self._walk(path, True))[0].tree.space()

    async def _file(self, path: str) -> _Step:
        step, _ = await self._walk(path, True)
        if step.node.kind is Kind.DIRECTORY:
            raise failure(errno.EISDIR, path)
        if step.node.kind is not Kind.FILE:
            raise failure(errno.EINVAL, path)
        return step

    async def _walk(self, path: str, follow: bool) -> tuple[_Step, Sequence[str]]:
        """What `path` means, and its names without links."""
        names, must_be_folder = split(path)
        waiting = names[::-1]
        links = 0
        stack = [_Step(self._tree, self._root, await self._tree.node(self._root))]
        seen: list[str] = []
        while waiting:
            name = waiting.pop()
            here = stack[-1]
            if here.node.kind is not Kind.DIRECTORY:
                raise failure(errno.ENOTDIR, path)
            if name == "..":
                if seen:
                    seen.pop()
                    stack.pop()
                continue
            if len(stack) > DEPTH_MAX or len(name.encode("utf-8", "surrogateescape")) > _NAME_MAX:
                raise failure(errno.ENAMETOOLONG, path[:_NAME_MAX])
            step = await self._below(here, (*seen, name), path)
            if step.node.kind is Kind.LINK and (waiting or follow or must_be_folder):
                links += 1
                if links > LINKS_MAX:
                    raise failure(errno.ELOOP, path)
                said = await step.tree.target(step.number)
                inner, wants_folder = split(said)
                must_be_folder |= wants_folder and not waiting
                waiting += inner[::-1]
                if said.startswith("/"):
                    del stack[1:]
                    seen.clear()
                continue
            stack.append(step)
            seen.append(name)
        if must_be_folder and stack[-1].node.kind is not Kind.DIRECTORY:
            raise failure(errno.ENOTDIR, path)
        return stack[-1], seen

    async def _below(self, here: _Step, names: tuple[str, ...], path: str) -> _Step:
        mounted = self._mounts.get(names)
        if mounted is not None:
            return _Step(mounted.tree, mounted.root, await mounted.tree.node(mounted.root))
        try:
            number = await here.tree.lookup(here.number, names[-1])
        except OSError as error:
            raise failure(error.errno or errno.EIO, path) from None
        return _Step(here.tree, number, await here.tree.node(number))

    def _mount(self, path: str, volume: Volume, tree: FileTree, root: int) -> None:
        """Put a filesystem in its place. `path` has no links."""
        mounted = Mounted(path, volume, tree, root)
        self.mounts += (mounted,)
        if path != "/":
            self._mounts[tuple(split(path)[0])] = mounted


# -- finding the system -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A tree that looks like a root; the higher the score, the more."""

    volume: Volume
    tree: FileTree
    root: int
    subvolume: str
    score: int


async def open_system(disk: DiskVolumes) -> DiskView:
    """Find the root filesystem and mount the others as its fstab says.

    Raises:
        FormatError: no volume looks like the root of a system.
        StoreError: the disk can't be read.
    """
    problems: list[str] = []
    found = [one for volume in disk.volumes for one in await _candidates(volume, problems)]
    if not found:
        known = "; ".join(f"{one.title} ({one.problem or one.signature.kind})" for one in disk.volumes)
        raise FormatError(
            "no filesystem of this disk looks like the root of a system",
            operation="find the root filesystem",
            hint=f"It has: {known or 'no volume at all'}.",
        )
    best = max(one.score for one in found)
    chosen = [one for one in found if one.score == best]
    if len(chosen) > 1:
        chosen = await _as_menus_say(disk, chosen)
    root = chosen[0]
    view = DiskView(root.tree, root.root)
    view._mount("/", root.volume, root.tree, root.root)
    try:
        await _mount_all(view, disk)
    except (FormatError, OSError) as error:
        problems.append(f"its fstab can't be read: {_said(error)}")
    view.problems = tuple(problems)
    return view


def _said(error: Exception) -> str:
    return error.message if isinstance(error, FormatError) else str(error)


async def _candidates(volume: Volume, problems: list[str]) -> list[_Candidate]:
    """The roots of a volume that look like a system: the default one, else its subvolumes."""
    tree = volume.tree
    if tree is None:
        return []
    try:
        if score := await _score(DiskView(tree)):
            return [_Candidate(volume, tree, tree.root, "", score)]
        if not isinstance(tree, HasSubvolumes):
            return []
        # Snapshots look like systems too; they lie deeper.
        listed = sorted(await tree.subvolumes(), key=lambda one: (one.path.count("/"), one.number))
        return [
            _Candidate(volume, tree, one.root, one.path, score)
            for one in listed[:_SUBVOLUMES_MAX]
            if one.root != tree.root and (score := await _score(DiskView(tree, one.root)))
        ]
    except (FormatError, OSError) as error:
        problems.append(f"{volume.title} can't be looked into: {_said(error)}")
        return []


async def _score(view: DiskView) -> int:
    """3: a table of filesystems and a system, 2: only the latter, 1: only the former with users; 0: no root."""
    has_table = await _exists(view, "/etc/fstab")
    for mark in SYSTEM_MARKS:
        if await _exists(view, mark):
            return 3 if has_table else 2
    return 1 if has_table and await _exists(view, "/etc/passwd") else 0


async def _exists(view: DiskView, path: str) -> bool:
    try:
        await view.stat(path, follow=False)
    except OSError:
        return False
    return True


async def _as_menus_say(disk: DiskVolumes, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """The candidates with the one in front that the first boot menu names."""
    for volume in disk.volumes:
        if volume.tree is None:
            continue
        for spec, flags in await _menu_roots(volume.tree):
            named = find_spec(disk, spec, None)
            wanted = re.search(r"subvol=/?([^,\s]+)", flags)
            for one in candidates:
                if one.volume is named and (not wanted or not one.subvolume or wanted[1] == one.subvolume):
                    return [one, *(other for other in candidates if other is not one)]
    return list(candidates)


async def _menu_roots(tree: FileTree) -> list[tuple[str, str]]:
    """(root=, rootflags=) of the menus of a filesystem that is a system or its /boot."""
    view = DiskView(tree)
    paths = [f"{folder}/{menu}" for folder in ("/boot", "") for menu in _MENUS]
    for folder in ("/boot/loader/entries", "/loader/entries"):
        try:
            entries = sorted((one.name for one in await view.list(folder)), reverse=True)
        except (OSError, FormatError):
            continue
        paths += [f"{folder}/{name}" for name in entries[:_MOUNTS_MAX] if name.endswith(".conf")]
    found = []
    for path in paths:
        try:
            text = await view.read(path, limit=_MENU_MAX)
        except (OSError, FormatError):
            continue
        if match := _MENU_ROOT.search(text):
            spec, flags = (one.decode("utf-8", "replace").strip("\"'") for one in match.groups(b""))
            found.append((spec, flags))
    return found


# -- mounting ---------------------------------------------------------------------------------------------------------


async def _mount_all(view: DiskView, disk: DiskVolumes) -> None:
    """Mount what the view's fstab says. Raises OSError, FormatError where that can't be read."""
    try:
        text = await view.read("/etc/fstab", limit=_FSTAB_MAX)
    except FileNotFoundError:
        return
    entries = list(parse_fstab(text.decode("utf-8", "surrogateescape")))
    own = next((one.spec for one in entries if one.path == "/"), "")
    name = device_name(own)
    wanted = [one for one in entries if one.path.startswith("/") and one.path.strip("/") and _is_mounted(one)]
    refused: list[NotMounted] = []
    # What lies deeper comes later: /boot before /boot/efi.
    for entry in sorted(wanted, key=lambda one: one.path.rstrip("/").count("/"))[:_MOUNTS_MAX]:
        try:
            place = await view.resolve(entry.path)
        except FileNotFoundError:
            place = "/" + "/".join(split(entry.path)[0])  # systemd makes the folder
        except (OSError, FormatError) as error:
            refused.append(NotMounted(entry, f"its place can't be reached: {_said(error)}"))
            continue
        volume = find_spec(disk, entry.spec, name[0] if name else None)
        if volume is None:
            refused.append(NotMounted(entry, "it is not on this disk"))
        elif volume.tree is None:
            refused.append(NotMounted(entry, f"{volume.title} can't be read: {volume.problem}"))
        else:
            try:
                root = await _root_in(volume.tree, entry)
                view._mount(place, volume, volume.tree, root)
            except (OSError, FormatError) as error:
                refused.append(NotMounted(entry, _said(error)))
    view.not_mounted = tuple(refused)


def _is_mounted(entry: Mountable) -> bool:
    """Whether a line is about a disk and is followed when the system starts. Binds are the same files once more."""
    if any(entry.option(name) is not None for name in ("noauto", "bind", "rbind")):
        return False
    return not (_NOT_HERE.fullmatch(entry.kind.lower()) or ":" in entry.spec or entry.spec.startswith("//"))


async def _root_in(tree: FileTree, entry: Mountable) -> int:
    """The inode that a mount shows: of the subvolume that its options name, else the tree's own root."""
    path, number = entry.option("subvol"), entry.option("subvolid")
    if not isinstance(tree, HasSubvolumes) or (path is None and number is None):
        return tree.root
    for one in await tree.subvolumes():
        if one.path == (path or "").strip("/") if path is not None else str(one.number) == number:
            return one.root
    raise FormatError(f"it has no subvolume {path or number}")


def device_name(spec: str) -> tuple[str, int | None] | None:
    """(disk, number of the partition) of a name that the kernel gives: /dev/sda2, /dev/nvme0n1p2."""
    match = _SD.fullmatch(spec) or _NVME.fullmatch(spec)
    return (match[1], int(match[2]) if match[2] else None) if match else None


def find_spec(disk: DiskVolumes, spec: str, own_name: str | None) -> Volume | None:
    """The volume of this disk that a `fs_spec` or `root=` means; None where it is none of them, or two are alike.

    Args:
        own_name: what the system calls this disk (sda). None: not known, so that the first disk of any driver is taken.
    """
    key, value = _spec_key(spec)
    if key == "device":
        found = [one for one in disk.volumes if _is_device(one, value, own_name)]
    else:
        found = [one for one in disk.volumes if value and _properties(one).get(key, "").lower() == value.lower()]
        if key == "label":
            found = [one for one in found if _properties(one)["label"] == value]
    return found[0] if len(found) == 1 else None


def _spec_key(spec: str) -> tuple[str, str]:
    """(uuid | label | partuuid | partlabel | device, value)."""
    key, sign, value = spec.partition("=")
    if sign and key.lower() in ("uuid", "label", "partuuid", "partlabel"):
        return key.lower(), value.strip("\"'")
    match = re.fullmatch(r"/dev/disk/by-(uuid|label|partuuid|partlabel)/(.+)", spec)
    if match:
        return match[1], re.sub(r"\\x([0-9a-f]{2})", lambda code: chr(int(code[1], 16)), match[2])
    return "device", spec


def _properties(volume: Volume) -> Mapping[str, str]:
    made = {
        "uuid": (volume.tree.uuid if volume.tree else "") or volume.signature.uuid,
        "label": (volume.tree.label if volume.tree else "") or volume.signature.label,
    }
    if volume.partition:
        made |= {"partuuid": volume.partition.uuid, "partlabel": volume.partition.name}
    return made


def _is_device(volume: Volume, spec: str, own_name: str | None) -> bool:
    if volume.group:
        return spec in (f"/dev/mapper/{volume.name}", f"/dev/{volume.group}/{volume.logical}")
    named = device_name(spec)
    if named is None or named[1] != volume.number:
        return False
    return (
        named[0] == own_name if own_name else re.fullmatch(r"\w+a|(nvme|mmcblk|nbd|loop)0(n1)?", named[0]) is not None
    )
