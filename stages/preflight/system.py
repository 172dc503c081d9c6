"""What kind of system it is, and how one mends things there: package manager, boot menu, initramfs."""

from __future__ import annotations

import re
import shlex
import struct
from dataclasses import dataclass
from typing import Literal

from stages.disk.tree import View
from stages.preflight.findings import plain
from stages.preflight.texts import exists, read_text, words_of

Family = Literal["debian", "rhel", "suse", "alpine", "arch", "other"]

_FAMILIES: dict[str, Family] = {
    "debian": "debian",
    "ubuntu": "debian",
    "linuxmint": "debian",
    "raspbian": "debian",
    "kali": "debian",
    "rhel": "rhel",
    "centos": "rhel",
    "fedora": "rhel",
    "rocky": "rhel",
    "almalinux": "rhel",
    "ol": "rhel",
    "amzn": "rhel",
    "tencentos": "rhel",
    "opencloudos": "rhel",
    "anolis": "rhel",
    "openeuler": "rhel",
    "suse": "suse",
    "sles": "suse",
    "opensuse": "suse",
    "opensuse-leap": "suse",
    "opensuse-tumbleweed": "suse",
    "alpine": "alpine",
    "arch": "arch",
    "manjaro": "arch",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """A Linux distribution, as /etc/os-release names it.

    Attributes:
        has_dracut: whether its initramfs is made by dracut.
        file: where it was read.
        predates_os_release: whether it is so old that it has no os-release file.
    """

    id: str = ""
    version: str = ""
    title: str = ""
    family: Family = "other"
    has_dracut: bool = False
    file: str = "/etc/os-release"
    predates_os_release: bool = False

    def install(self, *packages: str) -> str:
        """The command that installs packages."""
        return f"{_INSTALL[self.family]} {shlex.join(packages)}" if self.family in _INSTALL else ""

    def remove(self, *packages: str) -> str:
        """The command that removes packages."""
        listed = " ".join(plain(one) for one in packages)
        return f"{_REMOVE[self.family]} {listed}" if self.family in _REMOVE else ""

    @property
    def update_menu(self) -> str:
        """The command that writes the boot menu again."""
        if self.family == "debian":
            return "update-grub"
        if self.family in ("rhel", "suse"):
            return "grub2-mkconfig -o /boot/grub2/grub.cfg"
        return "grub-mkconfig -o /boot/grub/grub.cfg"

    @property
    def clean_cache(self) -> str:
        """The command that empties the cache of the package manager."""
        return _CLEAN.get(self.family, "")

    def update_initramfs(self, kernel: str) -> str:
        """The command that makes the initramfs of a kernel again; of all kernels where none is named."""
        kernel = plain(kernel)
        if self.has_dracut or self.family in ("rhel", "suse"):
            return f"dracut -f --kver {kernel}" if kernel else "dracut -f --regenerate-all"
        if self.family == "alpine":
            return f"mkinitfs {kernel}".strip()
        if self.family == "arch":
            return "mkinitcpio -P"
        return f"update-initramfs -u -k {kernel or 'all'}"

    def add_to_initramfs(self, modules: tuple[str, ...], kernel: str) -> str:
        """The command that puts modules into the initramfs of a kernel."""
        listed = " ".join(modules)
        again = self.update_initramfs(kernel)
        if self.has_dracut or self.family in ("rhel", "suse"):
            return f"echo 'add_drivers+=\" {listed} \"' > /etc/dracut.conf.d/virtio.conf && {again}"
        if self.family == "alpine":
            return f"sed -i 's/^features=\"/features=\"virtio /' /etc/mkinitfs/mkinitfs.conf && {again}"
        if self.family == "arch":
            return f"sed -i 's/^MODULES=(/MODULES=({listed} /' /etc/mkinitcpio.conf && {again}"
        return f"printf '%s\\n' {listed} >> /etc/initramfs-tools/modules && {again}"

    @property
    def install_bios_loader(self) -> str:
        """The command that installs GRUB for BIOS; the disk's name is appended."""
        return f"{'grub2' if self.family in ('rhel', 'suse') else 'grub'}-install --target=i386-pc"

    @property
    def install_fallback_loader(self) -> str:
        """The command that installs the loader that firmware finds without a boot entry."""
        if self.family == "rhel":
            return (
                "mkdir -p /boot/efi/EFI/BOOT && cp /boot/efi/EFI/*/shimx64.efi /boot/efi/EFI/BOOT/BOOTX64.EFI && "
                "cp /boot/efi/EFI/*/grubx64.efi /boot/efi/EFI/BOOT/"
            )
        return f"{'grub2' if self.family == 'suse' else 'grub'}-install --target=x86_64-efi --removable"


_INSTALL = {
    "debian": "apt-get install -y",
    "rhel": "dnf install -y",
    "suse": "zypper --non-interactive install",
    "alpine": "apk add",
    "arch": "pacman -S --noconfirm",
}
_REMOVE = {
    "debian": "apt-get purge -y",
    "rhel": "dnf remove -y",
    "suse": "zypper --non-interactive remove",
    "alpine": "apk del",
    "arch": "pacman -Rns --noconfirm",
}
_CLEAN = {
    "debian": "apt-get clean",
    "rhel": "dnf clean all",
    "suse": "zypper clean --all",
    "alpine": "rm -rf /var/cache/apk/*",
    "arch": "pacman -Scc --noconfirm",
}


# Source: ELF, "ELF Header", e_machine.
_MACHINES = {3: "x86", 62: "x86_64", 183: "aarch64", 40: "arm", 243: "riscv64", 21: "ppc64", 22: "s390x"}
_PROGRAMS = (
    "/sbin/init",
    "/usr/lib/systemd/systemd",
    "/lib/systemd/systemd",
    "/bin/busybox",
    "/bin/sh",
    "/usr/bin/env",
)


async def find_architecture(view: View) -> str:
    """What processor the programs of a system are for, by the first one that is started; empty where none tells."""
    for path in _PROGRAMS:
        try:
            head = await view.read_at(path, 0, 20)
        except OSError:
            continue
        if len(head) == 20 and head[:4] == b"\x7fELF":
            machine = struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)[0]
            return _MACHINES.get(machine, f"machine {machine}")
    return ""


async def find_distribution(view: View) -> Distribution:
    """Which distribution it is; one without an id where nothing says so.

    Source: os-release(5).
    """
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        text = await read_text(view, path)
        if not text.lines:
            continue
        values = {}
        for _, line in text.numbered():
            name, _, value = line.partition("=")
            values[name] = " ".join(words_of(value))
        ids = [values.get("ID", "").lower(), *values.get("ID_LIKE", "").lower().split()]
        family: Family = next((_FAMILIES[one] for one in ids if one in _FAMILIES), "other")
        dracut = await exists(view, "/usr/bin/dracut") or await exists(view, "/usr/sbin/dracut")
        return Distribution(
            id=ids[0],
            version=values.get("VERSION_ID", ""),
            title=values.get("PRETTY_NAME", "") or ids[0],
            family=family,
            has_dracut=dracut,
            file=path,
        )
    return await _by_release_file(view)


# What distributions wrote before there was os-release, and still write: RHEL 6, Debian 6, SLES 11 have nothing else.
_RELEASE_FILES: tuple[tuple[str, str, Family, int], ...] = (
    ("/etc/redhat-release", "", "rhel", 7),
    ("/etc/SuSE-release", "", "suse", 12),
    ("/etc/alpine-release", "Alpine ", "alpine", 3),
    ("/etc/debian_version", "Debian ", "debian", 7),
    ("/etc/arch-release", "Arch Linux", "arch", 0),
)


async def _by_release_file(view: View) -> Distribution:
    """A distribution by the file that it wrote before there was os-release."""
    for path, before, family, since in _RELEASE_FILES:
        text = await read_text(view, path)
        if text.problem or not text.exists:
            continue
        title = (before + next((line for _, line in text.numbered()), "")).strip()
        version = re.search(r"\d[\d.]*", title)
        name = re.match(r"[A-Za-z]+", title)
        return Distribution(
            id=name[0].lower() if name else family,
            version=version[0] if version else "",
            title=title,
            family=family,
            has_dracut=await exists(view, "/sbin/dracut"),
            file=path,
            predates_os_release=version is not None and int(version[0].partition(".")[0][:4]) < since,
        )
    return Distribution()
