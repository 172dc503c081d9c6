"""The provider's commands that turn a stored object into an image over there."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from stages.preflight.profile import BootMode, Profile

# What a provider calls a boot mode.
_WORDS: dict[str, dict[BootMode, str]] = {
    "tencent_boot": {"bios": "Legacy BIOS", "uefi": "UEFI"},
    "aws_boot": {"bios": "legacy-bios", "uefi": "uefi"},
    "azure_generation": {"bios": "V1", "uefi": "V2"},
    "gcp_features": {"bios": "VIRTIO_SCSI_MULTIQUEUE", "uefi": "VIRTIO_SCSI_MULTIQUEUE,UEFI_COMPATIBLE"},
    "openstack_firmware": {"bios": "", "uefi": " --property hw_firmware_type=uefi"},
    "proxmox_firmware": {"bios": "", "uefi": " --bios ovmf --efidisk0 STORAGE:0"},
}


def import_steps(profile: Profile, url: str, *, boot_mode: BootMode | None = None, format: str = "") -> tuple[str, ...]:
    """The steps of a profile with the object's place filled in.

    What only the user knows stays in capitals: REGION, OS.

    Args:
        url: of the object, or a word in its place.
        format: of the image; the profile's first where it is not known.
    """
    mode = boot_mode or profile.boot_modes[0]
    parts = urlsplit(url)
    path = parts.path if parts.scheme else url
    file = path.rpartition("/")[2] or "IMAGE"
    format = (format or next(iter(profile.formats), "raw")).partition(":")[0]
    values = {
        "url": url,
        "bucket": parts.netloc or "BUCKET",
        "key": path.lstrip("/") or "KEY",
        "file": file,
        "name": re.sub(r"\.(qcow2|raw|img|vmdk|vhdx?|tar\.gz|ova)$", "", file),
        "format": format,
        "os": "OS",
        "os_version": "VERSION",
        "boot_mode": mode,
        "BOOT_MODE": mode.upper(),
        "FORMAT": format.upper(),
        **{name: words[mode] for name, words in _WORDS.items()},
    }
    return tuple(step.format_map(values) for step in profile.steps)
