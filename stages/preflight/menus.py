"""Boot menus: every line that starts a kernel, wherever a boot loader keeps it.

Nothing is executed: GRUB's scripts are read line by line, variables are replaced where their value is plain. A kernel
path in a menu is relative to the filesystem that the loader reads; it is looked for below /, /boot and the EFI
partition.

Source: GNU GRUB manual 2.06, "Simple configuration handling" and "The GRUB environment block"; UAPI Group, "UAPI.1 Boot
Loader Specification"; SYSLINUX wiki, "Config"; bootparam(7).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from stages.disk.tree import View
from stages.preflight.findings import Evidence
from stages.preflight.texts import (
    Text,
    exists,
    is_folder,
    names_in,
    read_text,
    texts_in,
    why_unreadable,
    words_of,
)
from stages.preflight.uki import PeSection, read_sections, section_text

_ENTRIES_MAX = 500
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_GRUB_CONFIGS = (
    "/boot/grub/grub.cfg",
    "/boot/grub2/grub.cfg",
    "/etc/grub2.cfg",
    "/etc/grub2-efi.cfg",
)
_LEGACY = ("/boot/grub/menu.lst", "/boot/grub/grub.conf")
_SYSLINUX = (
    "/boot/extlinux.conf",
    "/boot/extlinux/extlinux.conf",
    "/boot/syslinux/syslinux.cfg",
    "/extlinux.conf",
)
EFI_FOLDERS = ("/boot/efi", "/efi", "/boot")


@dataclass(frozen=True, slots=True, kw_only=True)
class BootEntry:
    """One way to start a kernel.

    Attributes:
        kernel: where the kernel is in the system, as a path; as the menu says it where nothing is there.
        kernel_found: whether it is there.
        initrds: likewise; those that are not there are in `missing`.
        arguments: of the kernel, variables replaced.
        where: the line that carries the arguments.
        is_default: what starts when nobody touches a key, as far as can be told.
        inside: of a unified kernel image: its sections.
        version: of the kernel, where the entry says it.
    """

    title: str
    kernel: str
    arguments: tuple[str, ...]
    where: Evidence
    id: str = ""
    initrds: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    kernel_found: bool = False
    is_default: bool = False
    inside: tuple[tuple[str, PeSection], ...] = ()
    version: str = ""

    def value(self, name: str) -> str | None:
        """The last value of an argument `name=value`; "" for a bare name; None where it is not there."""
        found = None
        for one in self.arguments:
            if one == name:
                found = ""
            elif one.startswith(f"{name}="):
                found = one[len(name) + 1 :].strip("\"'")
        return found

    def values(self, name: str) -> list[str]:
        """All values of an argument that may be given many times."""
        return [one[len(name) + 1 :] for one in self.arguments if one.startswith(f"{name}=")]


@dataclass(frozen=True, slots=True, kw_only=True)
class BootMenus:
    """Every entry of every menu, the default first.

    Attributes:
        files: menus that were found.
        problems: menus that could not be read, with the reason.
        loaders: kinds of loader whose configuration is there: grub, bls, systemd-boot, extlinux, uki, legacy grub.
    """

    entries: tuple[BootEntry, ...]
    files: tuple[str, ...]
    problems: tuple[Text, ...]
    loaders: tuple[str, ...]


async def find_menus(view: View) -> BootMenus:
    """Read all boot menus of a system.

    Raises:
        OSError, FormatError: a folder that holds them can't be read.
    """
    reader = _MenuReader(view)
    await reader.read()
    entries = [await _placed(view, one) for one in reader.entries[:_ENTRIES_MAX]]
    if entries and not any(one.is_default for one in entries):
        entries[0] = replace(entries[0], is_default=True)
    entries.sort(key=lambda one: not one.is_default)
    return BootMenus(
        entries=tuple(entries),
        files=tuple(reader.files),
        problems=tuple(reader.problems),
        loaders=tuple(dict.fromkeys(reader.loaders)),
    )


async def _placed(view: View, entry: BootEntry) -> BootEntry:
    """The entry with the places of its kernel and its initramfs in the system."""
    if entry.inside:
        return entry
    found = await place_of(view, entry.kernel)
    initrds: list[str] = []
    missing: list[str] = []
    for one in entry.initrds:
        place = await place_of(view, one)
        (initrds if place else missing).append(place or one)
    return replace(
        entry,
        kernel=found or entry.kernel,
        kernel_found=found is not None,
        initrds=tuple(initrds),
        missing=tuple(missing),
    )


async def place_of(view: View, path: str) -> str | None:
    """Where a path of a boot menu is in the system; None where it is nowhere."""
    path = re.sub(r"^\([^)]*\)", "", path)
    path = "/" + path.lstrip("/")
    candidates = [path, f"/boot{path}"] if path.startswith("/boot/") else [f"/boot{path}", path]
    candidates += [f"{folder}{path}" for folder in EFI_FOLDERS]
    # A root in a btrfs subvolume: the loader sees /@/boot/vmlinuz.
    rest = path
    for _ in range(3):
        rest = "/" + rest[1:].partition("/")[2]
        if rest == "/":
            break
        candidates += [rest, f"/boot{rest}"]
    for candidate in dict.fromkeys(candidates):
        if await exists(view, candidate):
            return candidate
    return None


class _MenuReader:
    """Reads one menu after the other; the same file under two names counts once."""

    def __init__(self, view: View) -> None:
        self.entries: list[BootEntry] = []
        self.files: list[str] = []
        self.problems: list[Text] = []
        self.loaders: list[str] = []
        self._view = view
        self._seen: set[str] = set()
        self._variables: dict[str, str] = {}
        self._default = ""

    async def read(self) -> None:
        for path in ("/boot/grub/grubenv", "/boot/grub2/grubenv"):
            await self._read_environment(path)
        for path in _GRUB_CONFIGS:
            await self._read_grub(path)
        for folder in ("/boot/efi/EFI", "/efi/EFI"):
            for name in await names_in(self._view, folder) if await is_folder(self._view, folder) else ():
                await self._read_grub(f"{folder}/{name}/grub.cfg")
        await self._read_loader_entries("/boot/loader/entries", "bls" if "grub" in self.loaders else "systemd-boot")
        for folder in ("/boot/efi", "/efi"):
            await self._read_loader_entries(f"{folder}/loader/entries", "systemd-boot")
        for path in _LEGACY:
            await self._read_legacy(path)
        for path in _SYSLINUX:
            await self._read_syslinux(path)
        for folder in EFI_FOLDERS:
            await self._read_unified(f"{folder}/EFI/Linux")

    async def _text(self, path: str) -> Text | None:
        text = await read_text(self._view, path)
        if not text.exists:
            return None
        try:
            real = await self._view.resolve(path)
        except OSError:
            real = path
        if real in self._seen:
            return None
        self._seen.add(real)
        if text.problem:
            self.problems.append(text)
            return None
        self.files.append(path)
        return text

    async def _read_environment(self, path: str) -> None:
        text = await read_text(self._view, path)
        for _, line in text.numbered():
            name, equals, value = line.partition("=")
            if equals:
                self._variables[name] = value
        self._default = self._variables.get("saved_entry", self._default)

    def _replaced(self, text: str) -> str:
        """Variables replaced by their values where these are known; others stay out."""
        for _ in range(4):  # a value may name another variable; nobody nests deeper
            text, count = _VARIABLE.subn(lambda match: self._variables.get(match[1] or match[2], ""), text)
            if not count:
                break
        return text

    async def _read_grub(self, path: str) -> None:
        text = await self._text(path)
        if text is None:
            return
        self.loaders.append("grub")
        title, id = "", ""
        initrds: list[str] = []
        begun: BootEntry | None = None
        found: list[BootEntry] = []
        default = ""
        for number, line in text.numbered():
            words = words_of(line)
            if not words:
                continue
            verb, rest = words[0], words[1:]
            if verb == "set" and rest and "=" in rest[0]:
                name, _, value = rest[0].partition("=")
                if name == "default":
                    if not value.startswith("$"):
                        default = value
                elif name not in self._variables or not value.startswith("$"):
                    self._variables[name] = value
            elif verb in ("menuentry", "submenu"):
                title = rest[0] if rest else ""
                id = rest[rest.index("$menuentry_id_option") + 1] if "$menuentry_id_option" in rest[:-1] else ""
                if "--id" in rest[:-1]:
                    id = rest[rest.index("--id") + 1]
            elif verb in ("linux", "linux16", "linuxefi") and rest:
                arguments = words_of(self._replaced(" ".join(f'"{one}"' if " " in one else one for one in rest[1:])))
                begun = BootEntry(
                    title=title,
                    id=id,
                    kernel=self._replaced(rest[0]),
                    arguments=tuple(arguments),
                    where=text.at(number),
                )
                found.append(begun)
                initrds = []
            elif verb in ("initrd", "initrd16", "initrdefi") and begun is not None:
                initrds += [self._replaced(one) for one in rest]
                found[-1] = replace(found[-1], initrds=tuple(initrds))
            elif verb == "blscfg":
                self.loaders.append("bls")
        self.entries += self._with_default(found, self._default or default)

    def _with_default(self, entries: list[BootEntry], default: str) -> list[BootEntry]:
        """The entries with the one that starts by itself marked, by number, title or id."""
        if not entries or any(one.is_default for one in self.entries):
            return entries
        wanted = default.rpartition(">")[2] if ">" in default else default
        number = int(wanted) if wanted.isdigit() and len(wanted) < 4 and ">" not in default else None
        chosen = next((at for at, one in enumerate(entries) if wanted and wanted in (one.title, one.id)), number)
        if chosen is None or chosen >= len(entries):
            chosen = 0
        return [replace(one, is_default=at == chosen) for at, one in enumerate(entries)]

    async def _read_loader_entries(self, folder: str, loader: str) -> None:
        if not await is_folder(self._view, folder):
            return
        found: list[BootEntry] = []
        for text in await texts_in(self._view, folder, ".conf"):
            if await self._text(text.path) is None:
                continue
            self.loaders.append(loader)
            values: dict[str, str] = {}
            initrds: list[str] = []
            options, where = "", text.at(0)
            for number, line in text.numbered():
                key, _, value = line.partition(" ")
                value = value.strip()
                if key == "options":
                    options, where = f"{options} {value}", text.at(number)
                elif key == "initrd":
                    initrds += [one for one in value.split() if not one.startswith("$")]
                else:
                    values[key] = value
            kernel = values.get("linux") or values.get("efi") or ""
            if kernel and not where.line:
                where = text.at(1)
            if kernel:
                found.append(
                    BootEntry(
                        title=values.get("title", ""),
                        id=text.path.rpartition("/")[2].removesuffix(".conf"),
                        kernel=kernel,
                        version=values.get("version", ""),
                        arguments=tuple(words_of(self._replaced(options))),
                        initrds=tuple(initrds),
                        where=where,
                    )
                )
        found.sort(key=lambda one: version_key(one.version or one.id), reverse=True)
        default = self._default
        if loader == "systemd-boot":
            conf = await read_text(self._view, f"{folder.rpartition('/')[0]}/loader.conf")
            default = next((line.split()[-1] for _, line in conf.numbered() if line.startswith("default ")), "")
            default = default.removesuffix(".conf").rstrip("*")
        self.entries += self._with_default(found, default)

    async def _read_legacy(self, path: str) -> None:
        text = await self._text(path)
        if text is None:
            return
        self.loaders.append("legacy grub")
        title, default = "", "0"
        found: list[BootEntry] = []
        for number, line in text.numbered():
            words = line.replace("=", " ", 1).split() if line.startswith("default") else line.split()
            if words[0] == "default" and len(words) > 1:
                default = words[1]
            elif words[0] == "title":
                title = line[5:].strip()
            elif words[0] == "kernel" and len(words) > 1:
                where = text.at(number)
                found.append(BootEntry(title=title, kernel=words[1], arguments=tuple(words[2:]), where=where))
            elif words[0] == "initrd" and found:
                found[-1] = replace(found[-1], initrds=tuple(words[1:]))
        self.entries += self._with_default(found, default)

    async def _read_syslinux(self, path: str) -> None:
        text = await self._text(path)
        if text is None:
            return
        self.loaders.append("extlinux")
        folder = path.rpartition("/")[0]
        label, default = "", ""
        found: list[BootEntry] = []
        for number, line in text.numbered():
            key, _, value = line.partition(" ")
            key, value = key.upper(), value.strip()
            if key == "DEFAULT":
                default = value
            elif key == "LABEL":
                label = value
            elif key in ("KERNEL", "LINUX"):
                found.append(
                    BootEntry(title=label, id=label, kernel=_beside(folder, value), arguments=(), where=text.at(number))
                )
            elif key == "INITRD" and found:
                found[-1] = replace(found[-1], initrds=tuple(_beside(folder, one) for one in value.split(",")))
            elif key == "APPEND" and found:
                words = words_of(value)
                inline = [one[7:] for one in words if one.startswith("initrd=")]
                initrds = tuple(_beside(folder, one) for one in inline) or found[-1].initrds
                found[-1] = replace(found[-1], arguments=tuple(words), initrds=initrds, where=text.at(number))
        found = [one for one in found if not one.kernel.endswith((".c32", ".bin"))]
        self.entries += self._with_default(found, default)

    async def _read_unified(self, folder: str) -> None:
        for name in await names_in(self._view, folder) if await is_folder(self._view, folder) else ():
            path = f"{folder}/{name}"
            if not name.lower().endswith(".efi"):
                continue
            cmdline, version = "", ""
            try:
                real = await self._view.resolve(path)
                if real in self._seen:
                    continue
                self._seen.add(real)
                sections = await read_sections(self._view, path)
                if ".linux" not in sections:
                    continue
                if ".cmdline" in sections:
                    cmdline = await section_text(self._view, path, sections[".cmdline"])
                if ".uname" in sections:
                    version = await section_text(self._view, path, sections[".uname"])
            except OSError as error:
                self.problems.append(Text(path=path, problem=why_unreadable(error)))
                continue
            self.files.append(path)
            self.loaders.append("uki")
            self.entries.append(
                BootEntry(
                    title=name,
                    id=name,
                    kernel=path,
                    kernel_found=True,
                    arguments=tuple(words_of(cmdline)),
                    where=Evidence(f"{path} (.cmdline)"),
                    inside=tuple(sections.items()),
                    version=version,
                )
            )


def _beside(folder: str, path: str) -> str:
    return path if path.startswith("/") else f"{folder}/{path}"


def version_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts 6.9 before 6.10."""
    parts = re.findall(r"\d+|[a-z]+", text.lower())
    return tuple((1, int(one[:18]), "") if one.isdigit() else (0, 0, one) for one in parts)
