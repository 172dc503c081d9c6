"""Every kernel that can boot: its image, its initramfs, what is built into it, and its modules with what they need.

Source: Linux Documentation/kbuild/kbuild.rst ("modules.builtin"); modules.dep(5); Linux
Documentation/arch/x86/boot.rst, "kernel_version"; modprobe.d(5).
"""

from __future__ import annotations

import bz2
import lzma
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from pipeline.errors import FormatError
from pipeline.units import KiB, MiB
from stages.disk.tree import Kind, View
from stages.preflight.findings import Evidence
from stages.preflight.ikconfig import find_config, read_config
from stages.preflight.initramfs import Contents, UnreadableInitramfs, module_name, read_initramfs
from stages.preflight.menus import BootEntry, BootMenus, version_key
from stages.preflight.texts import Text, exists, is_folder, names_in, read_text, texts_in, why_unreadable

KERNELS_MAX = 12
_MODULES_LIMIT = 16 * MiB
_MODULE_MAX = 16 * MiB
_FOLDERS_MAX = 4000
_IMAGE = re.compile(r"(?:vmlinuz|vmlinux|kernel|bzImage)-(.+)")
_BASES = ("/lib/modules", "/usr/lib/modules")


@dataclass(frozen=True, slots=True, kw_only=True)
class Initrd:
    """Where an initramfs lies: a file, or a section of one. Bytes."""

    path: str
    offset: int = 0
    length: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel that can boot.

    Attributes:
        version: as `uname -r` would say; empty where it can't be told.
        image: its path.
        initrds: in the order in which the loader loads them.
        entries: of boot menus that start it; none where no menu was found.
        folder: its modules; empty where there are none.
        config: option to value, with the line of each in `config_text`.
        builtin: modules that are part of the image, None where nothing tells.
        modules: module to its path below `folder`.
        depends: module to all modules that it needs.
        dep: modules.dep, for evidence.
        missing: modules that modules.dep names and that are not there, among those asked for.
    """

    version: str
    image: str
    initrds: tuple[Initrd, ...] = ()
    entries: tuple[BootEntry, ...] = ()
    is_default: bool = False
    folder: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    config_text: Text | None = None
    config_lines: Mapping[str, int] = field(default_factory=dict)
    builtin: frozenset[str] | None = None
    modules: Mapping[str, str] = field(default_factory=dict)
    depends: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    problem: str = ""

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.version or self.image

    def is_builtin(self, module: str) -> bool:
        """Whether a driver is part of the image."""
        option = CONFIG_OF.get(module)
        return (self.builtin is not None and module in self.builtin) or (
            option is not None and self.config.get(option) == "y"
        )

    def closure(self, module: str) -> tuple[str, ...]:
        """A module and everything that it needs and that is not built in, by what modules.dep says."""
        needed = [module, *self.depends.get(module, ())]
        return tuple(one for one in dict.fromkeys(needed) if not self.is_builtin(one))

    def config_at(self, option: str) -> tuple[Evidence, ...]:
        """The line of the configuration that decides an option."""
        if self.config_text is None:
            return ()
        return (self.config_text.at(self.config_lines.get(option, 0)),)


# Modules that rules ask for, and the option that builds each.
CONFIG_OF = {
    "virtio": "CONFIG_VIRTIO",
    "virtio_ring": "CONFIG_VIRTIO",
    "virtio_pci": "CONFIG_VIRTIO_PCI",
    "virtio_blk": "CONFIG_VIRTIO_BLK",
    "virtio_net": "CONFIG_VIRTIO_NET",
    "virtio_scsi": "CONFIG_SCSI_VIRTIO",
    "sd_mod": "CONFIG_BLK_DEV_SD",
    "nvme": "CONFIG_BLK_DEV_NVME",
    "ena": "CONFIG_ENA_ETHERNET",
    "gve": "CONFIG_GVE",
    "hv_vmbus": "CONFIG_HYPERV",
    "hv_storvsc": "CONFIG_HYPERV_STORAGE",
    "hv_netvsc": "CONFIG_HYPERV_NET",
    "xen_blkfront": "CONFIG_XEN_BLKDEV_FRONTEND",
    "xen_netfront": "CONFIG_XEN_NETDEV_FRONTEND",
    "ext4": "CONFIG_EXT4_FS",
    "xfs": "CONFIG_XFS_FS",
    "btrfs": "CONFIG_BTRFS_FS",
    "vfat": "CONFIG_VFAT_FS",
    "udf": "CONFIG_UDF_FS",
    "ext2": "CONFIG_EXT2_FS",
    "ext3": "CONFIG_EXT3_FS",
    "f2fs": "CONFIG_F2FS_FS",
    "jfs": "CONFIG_JFS_FS",
    "dm_mod": "CONFIG_BLK_DEV_DM",
    "dm_crypt": "CONFIG_DM_CRYPT",
    "raid1": "CONFIG_MD_RAID1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Blacklist:
    """Lines that keep a module from being loaded: module to the places that say so."""

    modules: Mapping[str, tuple[Evidence, ...]]


async def find_kernels(view: View, menus: BootMenus) -> list[Kernel]:
    """Every kernel that can boot, the default first; at most KERNELS_MAX.

    What the menus start counts; where there is no menu, every kernel that lies in /boot.

    Raises:
        OSError, FormatError: a folder can't be read.
    """
    started: dict[str, list[BootEntry]] = {}
    for entry in menus.entries:
        if entry.kernel_found:
            started.setdefault(entry.kernel, []).append(entry)
    images = list(started)
    if not images:
        names = [name for name in await names_in(view, "/boot") if _IMAGE.fullmatch(name) and "rescue" not in name]
        images = [f"/boot/{name}" for name in sorted(names, key=version_key, reverse=True)]
    found = [await _kernel(view, image, tuple(started.get(image, ()))) for image in images[:KERNELS_MAX]]
    found.sort(key=lambda one: not one.is_default)
    return found


async def _kernel(view: View, image: str, entries: tuple[BootEntry, ...]) -> Kernel:
    unified = next((dict(one.inside) for one in entries if one.inside), None)
    # The image itself knows best: a rescue entry is called 0-rescue, whatever kernel it starts.
    said = next((one.version for one in entries if one.version), "")
    version = said if unified is not None and said else await version_of(view, image) or said
    if unified is not None:
        section = unified.get(".initrd")
        initrds: tuple[Initrd, ...]
        initrds = (Initrd(path=image, offset=section.offset, length=section.length),) if section else ()
    else:
        named = list(dict.fromkeys(path for one in entries for path in one.initrds))
        if not entries:
            named = [path for path in _initrd_names(version) if await exists(view, path)][:1]
        initrds = tuple(Initrd(path=path) for path in named)
    folders = [f"{base}/{version}" for base in _BASES if version and await is_folder(view, f"{base}/{version}")]
    folder = folders[0] if folders else ""
    builtin = await _builtin(view, folder)
    modules, depends, problem = await _modules(view, folder)
    inside = unified.get(".linux") if unified is not None else None
    part = Initrd(path=image, offset=inside.offset, length=inside.length) if inside else Initrd(path=image)
    config_text = await _config(view, version, folder) or await _config_inside(view, part, folder, modules)
    config, lines = _parse_config(config_text)
    return Kernel(
        version=version,
        image=image,
        initrds=initrds,
        entries=entries,
        is_default=any(one.is_default for one in entries),
        folder=folder,
        config=config,
        config_text=config_text,
        config_lines=lines,
        builtin=builtin,
        modules=modules,
        depends=depends,
        problem=problem,
    )


def _initrd_names(version: str) -> tuple[str, ...]:
    names = (f"initrd.img-{version}", f"initramfs-{version}.img", f"initrd-{version}", f"initramfs-{version}")
    return tuple(f"/boot/{name}" for name in names)


async def version_of(view: View, image: str) -> str:
    """The version of a kernel image: as its header says, else by its name; empty where neither tells."""
    try:
        head = await view.read_at(image, 0, 64 * KiB)
    except (OSError, FormatError):
        head = b""
    if head[0x202:0x206] == b"HdrS":
        at = struct.unpack_from("<H", head, 0x20E)[0] + 0x200
        if 0x200 < at < len(head):
            text = head[at : at + 256].partition(b"\0")[0].decode("ascii", "replace")
            if text:
                return text.split()[0]
    match = _IMAGE.fullmatch(image.rpartition("/")[2])
    if match is None:
        return ""
    # The image of a folder of its own (kernel-install: /boot/TOKEN/VERSION/linux) is named by its entry instead.
    return match[1] if await _is_version(view, match[1]) or re.match(r"\d+\.\d+", match[1]) else ""


async def _is_version(view: View, text: str) -> bool:
    return any([await is_folder(view, f"{base}/{text}") for base in _BASES])


async def _config(view: View, version: str, folder: str) -> Text | None:
    if not version:
        return None
    for path in (f"/boot/config-{version}", f"{folder}/config", f"/usr/lib/kernel/config-{version}"):
        if path.startswith("/") and (text := await read_text(view, path)).lines:
            return text
    return await _running_config(view, version) if view.is_live else None


async def _config_inside(view: View, image: Initrd, folder: str, modules: Mapping[str, str]) -> Text | None:
    """The configuration that a kernel carries in its image, or in its module `configs`; None where it does not."""
    try:
        if (path := modules.get("configs")) is not None:
            raw = unpacked_module(path, await view.read(f"{folder}/{path}", limit=_MODULE_MAX))
            found, shown = find_config(lambda offset, length: raw[offset : offset + length], len(raw)), path
        else:
            size = image.length if image.length is not None else (await view.stat(image.path)).size
            found, shown = await read_config(partial(_read_part, view, image), size), image.path
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, FormatError):
        return None
    return Text(path=f"{shown} (IKCONFIG)", lines=tuple(found.split("\n"))) if found else None


async def _running_config(view: View, version: str) -> Text | None:
    """What the running kernel says of itself, where it is the one that is asked about."""
    release = await read_text(view, "/proc/sys/kernel/osrelease")
    if release.lines[:1] != (version,):
        return None
    try:
        raw = unpacked_module("config.gz", await view.read("/proc/config.gz"))
    except (OSError, ValueError, zlib.error):
        return None
    return Text(path="/proc/config.gz", lines=tuple(raw.decode("ascii", "replace").split("\n")))


def _parse_config(text: Text | None) -> tuple[dict[str, str], dict[str, int]]:
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.lines if text else (), 1):
        if line.startswith("CONFIG_"):
            name, _, value = line.partition("=")
            values[name], lines[name] = value.strip(), number
        elif line.startswith("# CONFIG_") and line.endswith(" is not set"):
            name = line[2:].split(" ", 1)[0]
            values[name], lines[name] = "n", number
    return values, lines


async def _builtin(view: View, folder: str) -> frozenset[str] | None:
    if not folder:
        return None
    text = await read_text(view, f"{folder}/modules.builtin", limit=_MODULES_LIMIT)
    if not text.lines:
        return None
    return frozenset(_named(line) for _, line in text.numbered())


def _named(path: str) -> str:
    return module_name(re.sub(r"\.ko(?:\.\w+)?$", "", path.rpartition("/")[2].strip()))


async def _modules(view: View, folder: str) -> tuple[dict[str, str], dict[str, tuple[str, ...]], str]:
    """Modules by name, what each needs, and what was wrong with the list."""
    if not folder:
        return {}, {}, ""
    text = await read_text(view, f"{folder}/modules.dep", limit=_MODULES_LIMIT)
    if text.lines:
        modules, depends = {}, {}
        for _, line in text.numbered():
            path, _, needed = line.partition(":")
            modules[_named(path)] = path.strip()
            depends[_named(path)] = tuple(_named(one) for one in needed.split())
        return modules, depends, ""
    return await _walk_modules(view, folder), {}, text.problem or "there is no modules.dep: run depmod"


async def _walk_modules(view: View, folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting = ["kernel", "updates", "extra"]
    looked = 0
    while waiting and looked < _FOLDERS_MAX:
        here = waiting.pop()
        looked += 1
        try:
            entries = await view.list(f"{folder}/{here}")
        except OSError:
            continue
        for entry in entries:
            path = f"{here}/{entry.name}"
            if entry.kind is Kind.DIRECTORY:
                waiting.append(path)
            elif re.search(r"\.ko(\.\w+)?$", entry.name):
                found[_named(entry.name)] = path
    return found


async def with_needs(view: View, kernel: Kernel, modules: Sequence[str]) -> Kernel:
    """The kernel with what these modules need, read from the modules themselves where no modules.dep told it."""
    if kernel.depends or not kernel.modules:
        return kernel
    depends: dict[str, tuple[str, ...]] = {}
    for module in modules:
        seen: list[str] = []
        waiting = [module]
        while waiting and len(seen) < 64:
            current = waiting.pop()
            for needed in await _needs(view, kernel, current):
                if needed not in seen and needed != module:
                    seen.append(needed)
                    waiting.append(needed)
        depends[module] = tuple(seen)
    from dataclasses import replace

    return replace(kernel, depends=depends)


async def _needs(view: View, kernel: Kernel, module: str) -> tuple[str, ...]:
    """`depends=` of one module's .modinfo; nothing where it can't be read."""
    path = kernel.modules.get(module)
    if path is None:
        return ()
    try:
        raw = unpacked_module(path, await view.read(f"{kernel.folder}/{path}", limit=_MODULE_MAX))
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, FormatError):
        return ()
    match = re.search(rb"\0depends=([\w,-]*)\0", raw)
    return tuple(module_name(one) for one in match[1].decode().split(",") if one) if match else ()


def unpacked_module(path: str, raw: bytes) -> bytes:
    """A module without its compression, at most _MODULE_MAX bytes of it. Raises what the decompressor raises."""
    if path.endswith(".gz"):
        return zlib.decompressobj(31).decompress(raw, _MODULE_MAX)
    if path.endswith(".xz"):
        return lzma.LZMADecompressor(memlimit=128 * MiB).decompress(raw, _MODULE_MAX)
    if path.endswith(".bz2"):
        return bz2.BZ2Decompressor().decompress(raw, _MODULE_MAX)
    if path.endswith(".zst"):
        import zstandard

        try:
            with zstandard.ZstdDecompressor(max_window_size=128 * MiB).stream_reader(raw) as reader:
                return reader.read(_MODULE_MAX)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
    return raw


async def find_blacklist(view: View) -> Blacklist:
    """What modprobe's configuration keeps from being loaded."""
    found: dict[str, list[Evidence]] = {}
    for folder in (
        "/etc/modprobe.d",
        "/run/modprobe.d",
        "/usr/local/lib/modprobe.d",
        "/usr/lib/modprobe.d",
        "/lib/modprobe.d",
    ):
        for text in await texts_in(view, folder, ".conf"):
            for number, line in text.numbered():
                words = line.split()
                refused = (
                    len(words) > 2 and words[0] == "install" and re.fullmatch(r"(/usr)?/bin/(true|false)", words[2])
                )
                if (words[0] == "blacklist" and len(words) > 1) or refused:
                    places = found.setdefault(module_name(words[1]), [])
                    if not any(one.file.removeprefix("/usr") == text.path.removeprefix("/usr") for one in places):
                        places.append(text.at(number))
    return Blacklist(modules={name: tuple(places) for name, places in found.items()})


async def look_into(view: View, kernel: Kernel, wanted: frozenset[str]) -> tuple[Contents, str]:
    """What the initramfs of a kernel holds, and why it could not be read (else empty).

    Reading stops as soon as all of `wanted` were seen.
    """
    whole = Contents()
    for initrd in kernel.initrds:

        def enough(contents: Contents) -> bool:
            return all(contents.has_module(kernel.version, one) for one in wanted)

        try:
            size = initrd.length
            if size is None:
                size = (await view.stat(initrd.path)).size
            read_at = partial(_read_part, view, initrd)
            found = await read_initramfs(read_at, size, enough=enough)
        except UnreadableInitramfs as error:
            return whole, f"{initrd.path}: {error}"
        except OSError as error:
            return whole, f"{initrd.path}: {why_unreadable(error)}"
        except FormatError as error:
            return whole, f"{initrd.path}: its filesystem is damaged: {error.message}"
        whole.names |= found.names
        whole.members += found.members
        for version, modules in found.modules.items():
            whole.modules.setdefault(version, set()).update(modules)
    return whole, ""


async def _read_part(view: View, initrd: Initrd, offset: int, length: int) -> bytes:
    return await view.read_at(initrd.path, initrd.offset + offset, length)
