"""Rules about what starts the system: firmware, loader, and the kernel's command line."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from stages.preflight.findings import Evidence, Outcome, failed, passed, plain, skipped, unknown
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import BIOS_BOOT, Subject
from stages.preflight.texts import find_ignoring_case, read_text, texts_in, words_of
from stages.preflight.volumes import Meaning

# What firmware of a virtual machine tries. One for 32-bit programs has 64 bits all the same.
_FALLBACKS = {"aarch64": "BOOTAA64.EFI", "riscv64": "BOOTRISCV64.EFI", "": "BOOTAA64.EFI"}
_RESUME_FILES = ("/etc/initramfs-tools/conf.d/resume", "/etc/initramfs-tools/conf.d/local")


async def check_firmware(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the system starts the way the target starts machines."""
    profile, mode, boots_by = target.profile, target.boot_mode, subject.boots_by
    if boots_by is None:
        yield unknown(
            "neither a BIOS loader nor an EFI system partition was found on the disk",
            remedy=f"{subject.distribution.install_bios_loader} {plain(subject.device)}",
        )
        return
    if subject.live is not None and subject.live.firmware == "uefi" and mode == "bios" and boots_by == "uefi":
        place = Evidence("/sys/firmware/efi")
        yield failed(
            "block",
            f"this host was started by UEFI and its disk has no BIOS loader; {profile.name} starts it by BIOS",
            place,
            command=f"{subject.distribution.install_bios_loader} {plain(subject.device)}",
        )
    elif boots_by == "uefi" and mode == "bios":
        yield failed(
            "block",
            f"the disk starts by UEFI and has no BIOS loader; {profile.name} is asked to start it by BIOS",
            remedy=_other_mode(profile.boot_modes, "uefi", f"{subject.distribution.install_bios_loader} DISK"),
        )
    elif boots_by == "bios" and mode == "uefi" and not subject.has_esp:
        yield failed(
            "block",
            f"the disk starts by BIOS and has no EFI system partition; {profile.name} is asked to start it by UEFI",
            remedy=_other_mode(profile.boot_modes, "bios", "make an EFI system partition"),
        )
    elif mode not in profile.boot_modes:
        yield failed(
            "block",
            f"{profile.name} starts machines by {' or '.join(profile.boot_modes)}, not by {mode}",
            remedy=f'Set boot_mode = "{profile.boot_modes[0]}".',
        )
    else:
        yield passed(f"it starts by {mode.upper()}, as {profile.name} does")


def _other_mode(modes: tuple[str, ...], mode: str, otherwise: str) -> str:
    if mode in modes:
        return f'Set boot_mode = "{mode}" (--boot-mode {mode}), or: {otherwise}'
    return f"Choose a target that starts by {mode.upper()}, or: {otherwise}"


async def check_fallback(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether firmware finds a loader without a boot entry of its own."""
    if target.boot_mode != "uefi" and subject.boots_by != "uefi":
        yield skipped("it starts by BIOS")
        return
    if subject.esp_folder is None:
        yield failed(
            "block",
            "no EFI folder was found: the EFI system partition is empty or not mounted",
            remedy="Mount it at /boot/efi and run: " + subject.distribution.install_fallback_loader,
        )
        return
    wanted = _FALLBACKS.get(subject.architecture, "BOOTX64.EFI")
    for name in dict.fromkeys((wanted, *(("BOOTX64.EFI",) if not subject.architecture else ()))):
        found = await find_ignoring_case(subject.view, f"{subject.esp_folder}/EFI/BOOT/{name}")
        if found is not None:
            yield passed(f"the fallback loader is {found}", Evidence(found))
            return
    yield failed(
        "block",
        f"there is no fallback loader EFI/BOOT/{wanted if subject.architecture else 'BOOTX64.EFI'}: boot entries of "
        "the firmware do not travel with the disk",
        Evidence(f"{subject.esp_folder}/EFI/BOOT"),
        command=subject.distribution.install_fallback_loader,
    )


async def check_loader(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether there is boot code where a BIOS looks for it, and a menu."""
    code, menus = subject.boot_code, subject.menus
    if target.boot_mode == "bios":
        if code is None:
            yield unknown(subject.table_problem, remedy=subject.table_remedy)
            return
        install = f"{subject.distribution.install_bios_loader} {plain(subject.device)}"
        if code.mbr == "none":
            yield failed("block", "no boot code in the first sector: a BIOS starts nothing", command=install)
            return
        if code.has_core is False:
            yield failed(
                "block", "GRUB's first part is there, its second part is not where that points to", command=install
            )
            return
        table = subject.table
        on_gpt = table is not None and table.kind == "gpt" and code.mbr == "grub"
        if table is not None and on_gpt and not any(one.type == BIOS_BOOT for one in table.partitions):
            yield failed(
                "warn",
                "GRUB for BIOS on a GPT disk without a BIOS boot partition: its second part lies in unclaimed room",
                remedy="Make a BIOS boot partition (type EF02) and install GRUB again.",
            )
        if code.mbr == "other":
            yield failed(
                "warn", "the boot code in the first sector is of a kind that is not known here", remedy=install
            )
    for problem in menus.problems:
        yield unknown(f"{problem.path} can't be read: {problem.problem}", Evidence(problem.path))
    if menus.entries:
        default = menus.entries[0]
        yield passed(
            f"{len(menus.entries)} boot entries ({', '.join(menus.loaders)}); the default is "
            f'"{default.title or default.kernel}"',
            default.where,
        )
    elif menus.files:
        yield failed(
            "block",
            f"the boot menu {menus.files[0]} starts no kernel",
            Evidence(menus.files[0]),
            command=subject.distribution.update_menu,
        )
    else:
        yield unknown("no boot menu was found", remedy=subject.distribution.update_menu)
    for entry in menus.entries:
        if not entry.kernel_found and entry.kernel:
            yield failed(
                "block" if entry.is_default else "warn",
                f'the boot entry "{entry.title}" starts {entry.kernel}, which is not there',
                entry.where,
                command=subject.distribution.update_menu,
            )
        for path in entry.missing:
            yield failed(
                "block" if entry.is_default else "warn",
                f'the boot entry "{entry.title}" loads {path}, which is not there',
                entry.where,
                command=subject.distribution.update_initramfs(entry.version),
            )


async def check_root_name(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the kernel finds its root filesystem by a name that travels with it."""
    found = False
    renames = target.profile.renames_disks
    named_so: dict[str, list[Evidence]] = {}
    for entry in subject.menus.entries:
        named = entry.value("root")
        if named is not None:
            found = True
            if _by_bus(subject.volumes.resolve(named)):
                named_so.setdefault(named, []).append(entry.where)
    for named, places in named_so.items():
        volume = subject.volumes.resolve(named).volume or subject.root
        spec = volume.best_spec if volume is not None else "UUID=..."
        becomes = f"the disk becomes /dev/{target.profile.hardware.disk}" if renames else "disks may get other names"
        yield failed(
            "block" if renames and not _keeps_its_name(named, target) else "warn",
            f"the kernel line uses root={named}; {becomes} there: say root={spec}",
            *places,
            command=_name_root(subject, named, spec, places[0].file),
        )
    defaults = await read_text(subject.view, "/etc/default/grub")
    for number, line in defaults.numbered():
        if re.match(r"(export\s+)?GRUB_DISABLE_LINUX_UUID=[\"']?true", line):
            yield failed(
                "warn",
                "GRUB_DISABLE_LINUX_UUID is set: the next update-grub writes device names",
                defaults.at(number),
                command=f"sed -i '{number}d' {defaults.path} && {subject.distribution.update_menu}",
            )
        elif match := re.match(r"GRUB_CMDLINE_LINUX(?:_DEFAULT)?=(.*)", line):
            for word in words_of(" ".join(words_of(match[1]))):
                if word.startswith("root=") and _by_bus(subject.volumes.resolve(word[5:])):
                    yield failed(
                        "warn",
                        f"the next update-grub writes {word}",
                        defaults.at(number),
                        command=(
                            f"sed -i '{number}s#{plain(word)} *##' {defaults.path} && "
                            f"{subject.distribution.update_menu}"
                        ),
                    )
    if subject.menus.entries and not found:
        if subject.root is not None and any(one.inside for one in subject.menus.entries):
            yield passed("the unified kernel image finds its root partition by its type")
            return
        yield failed(
            "warn",
            "no boot entry says root=: only a partition of the right type is found without",
            subject.menus.entries[0].where,
            command=subject.distribution.update_menu,
        )
    elif not subject.menus.entries:
        yield unknown("no boot menu was found")


def _name_root(subject: Subject, named: str, spec: str, file: str) -> str:
    if "bls" in subject.menus.loaders:
        return f"grubby --update-kernel=ALL --remove-args=root --args=root={plain(spec)}"
    if "grub" in subject.menus.loaders:
        return f"sed -i '/GRUB_DISABLE_LINUX_UUID/d' /etc/default/grub && {subject.distribution.update_menu}"
    return f"sed -i 's#root={plain(named)}#root={plain(spec)}#' {plain(file)}"


def _by_bus(meaning: Meaning) -> bool:
    """Whether a name depends on the bus or the make of the disk."""
    return meaning.naming == "device" or meaning.naming == "path"


def _keeps_its_name(named: str, target: Target) -> bool:
    disk = target.profile.hardware.disk
    return bool(disk) and re.match(rf"/dev/{re.escape(disk)}p?\d*$", named) is not None


async def check_root_exists(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether what the kernel line calls root is in the image."""
    told: set[str] = set()
    for entry in subject.menus.entries:
        named = entry.value("root")
        if not named or named in told:
            continue
        told.add(named)
        if named.startswith(("live:", "nfs", "ZFS=", "zfs:", "tmpfs", "overlay", "/dev/nfs", "/dev/ram", "gpt-auto")):
            yield unknown(f"root={named} is nothing that can be looked up on a disk", entry.where)
            continue
        meaning = subject.volumes.resolve(named)
        if meaning.volume is not None:
            kept = target.kept is None or meaning.volume.number is None or meaning.volume.number in target.kept
            if kept:
                yield passed(f"root={named} is {meaning.volume.name} ({meaning.volume.kind})", entry.where)
            else:
                yield failed(
                    "block",
                    f"root={named} is {meaning.volume.name}, which this export drops",
                    entry.where,
                    remedy=f"Keep partition {meaning.volume.number}.",
                )
        elif meaning.naming == "path" or (meaning.naming == "other" and "=" not in named):
            yield unknown(f"root={named} can't be looked up on the disk", entry.where)
        elif subject.table is None:
            yield unknown(f"root={named} could not be looked up: {subject.table_problem}", entry.where)
        elif not meaning.is_certain:
            inside = ", ".join(subject.volumes.opaque)
            yield unknown(f"root={named} was not found; it may be inside of {inside}", entry.where)
        else:
            where = (
                f" (it is on {subject.live.elsewhere[named]})"
                if subject.live and named in subject.live.elsewhere
                else ""
            )
            yield failed(
                "block" if entry.is_default else "warn",
                f"root={named} is not in this image{where}",
                entry.where,
                command=subject.distribution.update_menu,
            )
    if not told:
        yield skipped("no boot entry names a root filesystem")


async def check_resume(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the boot waits for a place to resume from that is not there."""
    places: dict[str, Evidence] = {}
    for entry in subject.menus.entries:
        named = entry.value("resume")
        if named:
            places.setdefault(named, entry.where)
    for path in _RESUME_FILES:
        text = await read_text(subject.view, path)
        for number, line in text.numbered():
            if match := re.match(r"RESUME=(\S+)", line):
                value = match[1].strip("\"'")
                if value not in ("none", "auto", ""):
                    places.setdefault(value, text.at(number))
    for text in await texts_in(subject.view, "/etc/dracut.conf.d", ".conf"):
        for number, line in text.numbered():
            for match in re.finditer(r"resume=([^\s\"']+)", line):
                places.setdefault(match[1], text.at(number))
    for named, where in places.items():
        meaning = subject.volumes.resolve(named)
        dropped = (
            meaning.volume is not None
            and target.kept is not None
            and meaning.volume.number is not None
            and meaning.volume.number not in target.kept
        )
        if meaning.volume is not None and not dropped:
            if _by_bus(meaning) and target.profile.renames_disks:
                yield failed(
                    "warn",
                    f"resume={named} names a disk that becomes /dev/{target.profile.hardware.disk}",
                    where,
                    command=_drop_resume(subject, where, named),
                )
            else:
                yield passed(f"resume={named} is {meaning.volume.name}", where)
        elif not meaning.is_certain:
            yield unknown(
                f"resume={named} was not found; it may be inside of {', '.join(subject.volumes.opaque)}", where
            )
        else:
            yield failed(
                "warn",
                f"the resume device {named} is not in the image: the boot waits 30 to 90 s for it",
                where,
                command=_drop_resume(subject, where, named),
            )
    if not places:
        yield passed("nothing is resumed from")


def _drop_resume(subject: Subject, where: Evidence, named: str) -> str:
    again = subject.distribution.update_initramfs("")
    if where.file.startswith("/etc/initramfs-tools/"):
        return f"sed -i 's#^RESUME=.*#RESUME=none#' {where.file} && {again}"
    if where.file.startswith("/etc/"):
        return f"sed -i 's# *resume={plain(named)}##' {plain(where.file)} && {again}"
    return f"sed -i 's# *resume={plain(named)}##' /etc/default/grub && {subject.distribution.update_menu}"


async def check_command_line(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the kernel line says what the vendor asks for and nothing that it refuses."""
    wanted, refused = target.profile.command_line.wants, target.profile.command_line.forbids
    if not wanted and not refused:
        yield skipped(f"{target.profile.name} asks for no arguments")
        return
    if not subject.menus.entries:
        yield unknown("no boot menu was found")
        return
    entry = subject.menus.entries[0]
    for one in refused:
        if one in entry.arguments or any(word.startswith(f"{one}=") for word in entry.arguments):
            yield failed(
                "warn",
                f"the kernel line has {one}, which {target.profile.name} asks to leave out",
                entry.where,
                command=_change_line(subject, remove=one),
            )
    missing = [one for one in wanted if not _says(entry.arguments, one)]
    if missing:
        yield failed(
            "warn",
            f"the kernel line lacks {' '.join(missing)}, which {target.profile.name} asks for",
            entry.where,
            command=_change_line(subject, add=" ".join(missing)),
        )
    if not missing:
        yield passed(f"the kernel line has what {target.profile.name} asks for", entry.where)


def _says(arguments: tuple[str, ...], wanted: str) -> bool:
    name, equals, value = wanted.partition("=")
    if name == "console" and equals:
        return any(one.partition(",")[0] == f"console={value.partition(',')[0]}" for one in arguments)
    return wanted in arguments


def _change_line(subject: Subject, *, add: str = "", remove: str = "") -> str:
    if "bls" in subject.menus.loaders:
        return (
            f"grubby --update-kernel=ALL --args='{add}'"
            if add
            else f"grubby --update-kernel=ALL --remove-args={remove}"
        )
    change = f's/^GRUB_CMDLINE_LINUX="/&{add} /' if add else rf"s/\b{remove}\b *//"
    return f"sed -i '{change}' /etc/default/grub && {subject.distribution.update_menu}"


RULES = (
    Rule(
        id="boot.firmware",
        title="the system starts the way the target starts machines",
        why=(
            "A disk whose loader is for UEFI is nothing to a BIOS, and the other way round. Live, /sys/firmware/efi "
            "says how the host was started; on a disk, the first sector and the EFI system partition. The guide: "
            "`ls /sys/firmware/efi`."
        ),
        check=check_firmware,
    ),
    Rule(
        id="boot.efi.fallback",
        title="firmware finds a loader without a boot entry",
        why=(
            "UEFI keeps the list of loaders in the mainboard, which does not travel. New firmware tries "
            "EFI/BOOT/BOOTX64.EFI on the EFI system partition and nothing else."
        ),
        check=check_fallback,
    ),
    Rule(
        id="boot.loader",
        title="boot code and boot menu are there",
        why=(
            "A BIOS runs the first sector; GRUB's there loads its second part from a fixed place, which a cut or a "
            "copy of partitions loses. Then a menu must start kernels that exist. The guide: an image without its MBR "
            "can't boot."
        ),
        check=check_loader,
    ),
    Rule(
        id="boot.root_uuid",
        title="the kernel line names the root filesystem by UUID or label",
        why=(
            "root=/dev/sda1 means nothing where the disk is /dev/vda; names by-id and by-path carry the old hardware. "
            "All menus are read: grub.cfg, loader entries, grubenv, extlinux, legacy GRUB, unified images, and what "
            "the next update would write. The guide asks for root=UUID."
        ),
        check=check_root_name,
    ),
    Rule(
        id="boot.root_exists",
        title="the root filesystem that the kernel line names is in the image",
        why=(
            "A UUID that is on another disk, or that changed when the filesystem was made again, ends in the "
            "initramfs's emergency shell. UUIDs, labels, PARTUUIDs and logical volumes are looked up on the exported "
            "disk."
        ),
        check=check_root_exists,
    ),
    Rule(
        id="boot.resume",
        title="no boot waits for a place to resume from",
        why=(
            "An initramfs that is told to resume from a swap space that is not there waits half a minute or more for "
            "it."
        ),
        check=check_resume,
    ),
    Rule(
        id="boot.cmdline",
        title="the kernel line has what the vendor asks for",
        why="Some clouds ask for arguments (a serial console, longer waits for the root disk) and against others.",
        check=check_command_line,
    ),
)
