"""What the rules look at: facts about one system, gathered once, the same for a live host and for an image of it."""

from __future__ import annotations

import re
import struct
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from stages.disk.tables import DISK_ID_AT, PartitionTable
from stages.disk.tree import View
from stages.preflight.kernels import Blacklist, Kernel, find_blacklist, find_kernels
from stages.preflight.menus import BootMenus, find_menus
from stages.preflight.packages import Packages, find_packages
from stages.preflight.profile import BootMode
from stages.preflight.system import Distribution, find_architecture, find_distribution
from stages.preflight.texts import Text, find_ignoring_case, is_folder, read_text, why_unreadable
from stages.preflight.volumes import Meaning, Volume, Volumes

T = TypeVar("T")

ESP = ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "0xef")
BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"
ESP_FOLDERS = ("/boot/efi", "/efi", "/boot")

DATA_DISK = 'For a data disk: --kind data here, kind = "data" in [target] of a run.'

NETWORK_KINDS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "9p", "lustre",
     "davfs", "fuse.s3fs", "gfs2", "ocfs2", "afs", "beegfs"}
)  # fmt: skip
PSEUDO_KINDS = frozenset(
    {"proc", "sysfs", "tmpfs", "devtmpfs", "devpts", "ramfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs",
     "configfs", "efivarfs", "mqueue", "hugetlbfs", "pstore", "bpf", "autofs", "binfmt_misc", "fusectl", "overlay",
     "usbfs", "rpc_pipefs", "nfsd", "selinuxfs", "none", "usbdevfs", "aufs", "bind"}
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FstabEntry:
    """One line of /etc/fstab. `meaning` is what its first field names."""

    spec: str
    point: str
    kind: str
    options: frozenset[str]
    line: int
    meaning: Meaning

    @property
    def is_pseudo(self) -> bool:
        """Whether it needs no device: kernel filesystems, bind mounts, images on other filesystems."""
        bound = bool(self.options & {"bind", "rbind", "loop"})
        return self.kind in PSEUDO_KINDS or bound or self.spec in ("none", "tmpfs", "proc", "sysfs", "swap")

    @property
    def is_network(self) -> bool:
        """Whether it comes over the network."""
        remote = re.match(r"(//|[\w.\-\[\]:,]+:/)", self.spec) is not None and not self.spec.startswith("/dev")
        return self.kind in NETWORK_KINDS or remote

    @property
    def may_be_missing(self) -> bool:
        """Whether the boot goes on without it."""
        return bool(self.options & {"nofail", "noauto", "x-systemd.automount"})

    @property
    def is_swap(self) -> bool:
        """Whether it is swap space."""
        return self.kind == "swap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fstab:
    """/etc/fstab: its text and its entries."""

    text: Text
    entries: tuple[FstabEntry, ...]

    def at(self, point: str) -> FstabEntry | None:
        """The entry that mounts something there; the last one counts."""
        return next((one for one in reversed(self.entries) if one.point == point), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BootCode:
    """What a BIOS finds on the disk.

    Attributes:
        mbr: grub, syslinux, lilo, other, none.
        has_core: whether GRUB's second part is where the first looks for it; None where there is no GRUB.
    """

    mbr: Literal["grub", "syslinux", "lilo", "other", "none"]
    has_core: bool | None = None

    @property
    def boots(self) -> bool:
        """Whether a BIOS can start something from it."""
        return self.mbr != "none" and self.has_core is not False


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveMount:
    """A filesystem that is mounted now. `disks`: whole disks below it, by kernel name."""

    point: str
    kind: str
    source: str
    writable: bool
    disks: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveFacts:
    """What only a running machine can tell.

    Attributes:
        firmware: how it was started.
        elsewhere: what is on other disks: UUID=..., LABEL=... or a device path -> the disk's kernel name.
        nics: network cards that are hardware.
        written_per_s: bytes that were written to the disk a second, since the machine was started; None: not told.
    """

    firmware: BootMode
    mounts: tuple[LiveMount, ...] = ()
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    nics: tuple[str, ...] = ()
    written_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One system on one disk.

    Attributes:
        place: the disk or image as the user named it.
        size: of the disk in bytes; 0 where it could not be opened.
        table: None where the disk could not be opened; then `table_problem` says why, `table_remedy` what to do.
        architecture: of its programs: x86_64, aarch64 ...; empty where none tells.
        root: the filesystem that / is; None where it could not be told.
        problems: what could not be read while the facts were gathered.
        no_system: why no system was found; empty where one was.
        live: None for an image.
    """

    view: View
    place: str
    size: int
    table: PartitionTable | None
    table_problem: str
    volumes: Volumes
    boot_code: BootCode | None
    distribution: Distribution
    architecture: str
    fstab: Fstab
    menus: BootMenus
    kernels: tuple[Kernel, ...]
    packages: Packages
    blacklist: Blacklist
    root: Volume | None
    esp_folder: str | None
    problems: Sequence[str] = ()
    no_system: str = ""
    live: LiveFacts | None = None
    table_remedy: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it is the machine we run on."""
        return self.live is not None

    @property
    def device(self) -> str:
        """The disk as a command on that system names it; a placeholder for an image."""
        return self.place if self.place.startswith("/dev/") else "DISK"

    @property
    def no_system_remedy(self) -> str:
        """What to do where no system was found."""
        if self.live is not None:
            return "Name the folder where the root filesystem is mounted: --root FOLDER."
        return f"Name the disk that holds the system. {DATA_DISK}"

    @property
    def has_esp(self) -> bool:
        """Whether the disk has an EFI system partition."""
        return self.table is not None and any(one.type in ESP for one in self.table.partitions)

    @property
    def boots_by(self) -> BootMode | None:
        """How the system on the disk is prepared to start; None where nothing tells. BIOS wins where both are."""
        if self.live is not None and self.table is None:
            return self.live.firmware
        if self.boot_code is not None and self.boot_code.boots and self.boot_code.mbr in ("grub", "syslinux", "lilo"):
            return "bios"
        if self.has_esp:
            return "uefi"
        if self.boot_code is not None and self.boot_code.boots:
            return "bios"
        return None


async def find_boot_code(reader: RangeReader, table: PartitionTable) -> BootCode:
    """What a BIOS finds in the first sector, and whether GRUB's core is where that points to.

    Source: GNU GRUB grub-core/boot/i386/pc/boot.S (kernel_sector at 0x5c); Debian syslinux mbr; LILO first.S.

    Raises:
        StoreError: the disk can't be read.
    """
    if reader.size < 512:
        return BootCode(mbr="none")
    sector = await reader.read(0, 512)
    code = sector[:DISK_ID_AT]
    if not any(code):
        return BootCode(mbr="none")
    if b"GRUB" in code:
        first = struct.unpack_from("<Q", sector, 0x5C)[0]
        at = first * 512
        if not 0 < at <= reader.size - 512:
            return BootCode(mbr="grub", has_core=False)
        return BootCode(mbr="grub", has_core=any(await reader.read(at, 512)))
    if b"LILO" in code:
        return BootCode(mbr="lilo")
    if b"LINUX" in code or b"Missing operating system" in code:
        return BootCode(mbr="syslinux")
    return BootCode(mbr="other")


def parse_fstab(text: Text, volumes: Volumes) -> Fstab:
    """The entries of an fstab. Lines that are none are left out, as mount does. Source: fstab(5)."""
    entries = []
    for number, line in text.numbered():
        fields = line.split()
        if len(fields) < 2:
            continue
        spec, point = (unescaped(one) for one in fields[:2])
        entries.append(
            FstabEntry(
                spec=spec,
                point="swap" if len(fields) > 2 and fields[2] == "swap" else "/" + point.strip("/"),
                kind=fields[2] if len(fields) > 2 else "auto",
                options=frozenset(fields[3].split(",")) if len(fields) > 3 else frozenset(),
                line=number,
                meaning=volumes.resolve(spec),
            )
        )
    return Fstab(text=text, entries=tuple(entries))


def unescaped(text: str) -> str:
    r"""A field of fstab, where blanks are written `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


async def gather(
    view: View,
    *,
    place: str,
    reader: RangeReader | None,
    table: PartitionTable | None,
    volumes: Volumes,
    table_problem: str = "",
    table_remedy: str = "",
    size: int = 0,
    no_system: str = "",
    live: LiveFacts | None = None,
) -> Subject:
    """Look at a system once, for all rules.

    Args:
        reader: of the disk; None where it could not be opened.
        size: of the disk in bytes, for that case.
    Raises:
        StoreError: the disk can't be read. What else can't be read is noted in `problems`.
    """
    problems: list[str] = []

    async def told(look: Awaitable[T], nothing: T) -> T:
        """A fact, or nothing with a note why. What one folder hides must not hide the rest."""
        try:
            return await look
        except OSError as error:
            problems.append(f"{error.filename or 'a file'}: {why_unreadable(error)}")
        except FormatError as error:
            problems.append(f"its filesystem is damaged: {error.message}")
        return nothing

    fstab = parse_fstab(await read_text(view, "/etc/fstab"), volumes)
    menus = await told(find_menus(view), BootMenus(entries=(), files=(), problems=(), loaders=()))
    root = _root_of(fstab, menus, volumes)
    return Subject(
        view=view,
        place=place,
        size=reader.size if reader is not None else size,
        table=table,
        table_problem=table_problem,
        volumes=volumes,
        boot_code=await find_boot_code(reader, table) if reader is not None and table is not None else None,
        distribution=await told(find_distribution(view), Distribution()),
        architecture=await told(find_architecture(view), ""),
        fstab=fstab,
        menus=menus,
        kernels=tuple(await told(find_kernels(view, menus), [])),
        packages=await told(find_packages(view), Packages(manager="none", problem="it can't be read")),
        blacklist=await told(find_blacklist(view), Blacklist(modules={})),
        root=root,
        esp_folder=await told(_esp_folder(view, fstab), None),
        problems=problems,
        no_system=no_system,
        live=live,
        table_remedy=table_remedy,
    )


def _root_of(fstab: Fstab, menus: BootMenus, volumes: Volumes) -> Volume | None:
    entry = fstab.at("/")
    if entry is not None and entry.meaning.volume is not None:
        return entry.meaning.volume
    for one in menus.entries:
        named = one.value("root")
        if named and (found := volumes.resolve(named).volume):
            return found
    return None


async def _esp_folder(view: View, fstab: Fstab) -> str | None:
    """Where the EFI system partition is mounted."""
    points = [entry.point for entry in fstab.entries if entry.kind == "vfat"]
    for folder in (*points, *ESP_FOLDERS):
        found = await find_ignoring_case(view, f"{folder}/EFI")
        if found is not None and await is_folder(view, found):
            return folder
    return None


def rooted(entries: Sequence[FstabEntry]) -> list[FstabEntry]:
    """Entries that need a device of their own."""
    return [one for one in entries if not one.is_pseudo and not one.is_network]
