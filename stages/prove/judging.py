"""Tell from what a guest wrote whether it started, and if not, why and which rule of preflight would have said so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """A text that means that a guest did not start.

    Attributes:
        pattern: searched in what serial console and screen say.
        reason: what it means.
        rule: ids of the preflight rules that look for the cause; empty where none does.
    """

    pattern: re.Pattern[str]
    reason: str
    rule: str = ""


def _symptom(pattern: str, reason: str, rule: str = "") -> Symptom:
    return Symptom(pattern=re.compile(pattern, re.IGNORECASE | re.MULTILINE), reason=reason, rule=rule)


# No pattern goes on without end from a place where a text may have many: the guest chose the text.
# The most telling first: a kernel that panics for want of its root has said before that it found none.
SYMPTOMS: Final = (
    _symptom(
        r"ALERT!\s{1,8}\S+ does not exist|Gave up waiting for root (file system )?device",
        "the initramfs did not find the root filesystem: a driver is missing in it, or root= names a disk that is not",
        "drv.virtio.initramfs, boot.root_exists, boot.root_uuid",
    ),
    _symptom(
        r"dracut-initqueue(\[\d+\])?: Warning: .{0,80}timeout|Warning: /dev/\S+ does not exist|dracut:/?#",
        "dracut waited in vain for the root filesystem: a driver is missing in the initramfs, or root= names a disk "
        "that is not",
        "drv.virtio.initramfs, boot.root_exists, boot.root_uuid",
    ),
    _symptom(
        r"Dependency failed for .{0,80}Local File Systems",
        "a filesystem of /etc/fstab is not there",
        "fs.fstab.foreign, fs.fstab.devname",
    ),
    _symptom(
        r"You are in (rescue|emergency) mode|Entering emergency mode|Reached target .{0,80}Emergency Mode"
        r"|Cannot open access to console, the root account is locked|Give root password for maintenance",
        "it ended in emergency mode: often a filesystem of /etc/fstab that is not there, or is damaged",
        "fs.fstab.foreign, fs.fstab.devname",
    ),
    _symptom(
        r"VFS: (Unable to mount root fs|Cannot open root device)",
        "the kernel could not mount its root filesystem: no initramfs, or one without the driver",
        "drv.virtio.initramfs, boot.root_exists",
    ),
    _symptom(r"No working init found|Attempted to kill init", "there is no usable init on the root filesystem"),
    _symptom(r"Kernel panic", "the kernel panicked"),
    _symptom(
        r"^[ \t]{0,8}\(initramfs\)|Enter 'help' for a list of built-in commands", "it ended in the initramfs' shell"
    ),
    _symptom(
        r"grub rescue>",
        "GRUB did not find its files",
        "boot.loader, layout.closure",
    ),
    _symptom(
        r"Loading \S+\.\.\. ?failed|Could not find kernel image|error: you need to load the kernel first",
        "the boot loader could not load the kernel",
        "boot.loader",
    ),
    _symptom(
        r"No bootable device|not a bootable disk|could not read the boot disk|Missing operating system"
        r"|Operating system not found|No bootable option or device was found|UEFI Interactive Shell",
        "the firmware found nothing to boot",
        "boot.loader, boot.firmware, boot.efi.fallback",
    ),
)
# What a BIOS says last, before the first sector's code has its turn.
HANDED_OVER: Final = re.compile(r"Booting from Hard Disk\.\.\.\s*\Z")
NO_BOOT_CODE: Final = _symptom(
    HANDED_OVER.pattern,
    "the firmware started the disk's boot code, and that did nothing: it was wiped, or is broken",
    "boot.loader",
)
LOGIN: Final = re.compile(r"(?<!last )\blogin:", re.IGNORECASE)
_CONTROLS = re.compile(
    r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,256}\x07|[()][0-9A-B]|[=>78cDEHM])|[\x00-\x08\x0b-\x1f\x7f]"
)


def plain(text: str) -> str:
    """A console's text without what moves the cursor and changes colours."""
    return _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def find_symptom(text: str) -> tuple[Symptom, str] | None:
    """The most telling symptom of what a guest said, and the line it was found in."""
    for symptom in SYMPTOMS:
        match = symptom.pattern.search(text)
        if match is not None:
            start = text.rfind("\n", 0, match.start()) + 1
            end = text.find("\n", match.end())
            return symptom, text[start : end if end >= 0 else len(text)].strip()[:200]
    return None
