"""Systems of several distributions, written down by hand after their real layouts.

The Debian one has the lines that debootstrap, update-grub and cloud-init leave; the slow tests hold a real one against
the same rules. The others (RHEL family, SUSE, Alpine, Arch) exist by hand only; docs/preflight.md says so.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Sequence
from dataclasses import replace

from tests.preflight.disks import BOOT_UUID, ROOT_UUID
from tests.preflight.initrds import cpio, packed
from tests.preflight.trees import Content, Made, MadeView, folder, link, with_mode

VIRTIO = {
    "virtio": (),
    "virtio_ring": (),
    "virtio_pci_modern_dev": (),
    "virtio_pci_legacy_dev": (),
    "virtio_pci": ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev"),
    "virtio_blk": ("virtio_ring", "virtio"),
    "virtio_scsi": ("virtio_ring", "virtio"),
    "sd_mod": (),
    "net_failover": ("failover",),
    "failover": (),
    "virtio_net": ("virtio_ring", "virtio", "net_failover", "failover"),
    "ext4": ("jbd2",),
    "jbd2": (),
    "xfs": (),
    "btrfs": (),
    "nvme": (),
    "ena": (),
    "hv_vmbus": (),
    "hv_storvsc": ("hv_vmbus",),
    "hv_netvsc": ("hv_vmbus",),
    "vfat": (),
    "udf": (),
    "dm_mod": (),
}
BOOT_MODULES = ("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk",
                "virtio_scsi", "sd_mod", "ext4", "jbd2", "xfs", "btrfs", "nvme", "hv_vmbus", "hv_storvsc",
                "dm_mod")  # fmt: skip
_OPTIONS = ("VIRTIO", "VIRTIO_PCI", "VIRTIO_BLK", "VIRTIO_NET", "SCSI_VIRTIO", "BLK_DEV_SD", "EXT4_FS", "XFS_FS",
            "BTRFS_FS", "BLK_DEV_NVME", "ENA_ETHERNET", "HYPERV", "HYPERV_STORAGE", "HYPERV_NET", "VFAT_FS", "UDF_FS",
            "BLK_DEV_DM")  # fmt: skip


def module_path(name: str, suffix: str = "") -> str:
    """Where a module lies below its kernel's folder."""
    return f"kernel/drivers/{name}.ko{suffix}"


def kernel_files(
    version: str,
    *,
    suffix: str = "",
    base: str = "/lib/modules",
    builtin: Sequence[str] = (),
    missing: Sequence[str] = (),
) -> dict[str, Content]:
    """A folder of modules with its lists, and the kernel's configuration."""
    modules = [one for one in VIRTIO if one not in builtin and one not in missing]
    files: dict[str, Content] = {f"{base}/{version}/{module_path(one, suffix)}": b"\x7fELF" for one in modules}
    there = set(modules)
    files[f"{base}/{version}/modules.dep"] = "".join(
        f"{module_path(one, suffix)}: {' '.join(module_path(need, suffix) for need in VIRTIO[one] if need in there)}\n"
        for one in modules
    )
    files[f"{base}/{version}/modules.builtin"] = (
        "".join(f"kernel/drivers/{one}.ko\n" for one in builtin) or "kernel/a.ko\n"
    )
    return files


def config_text(values: dict[str, str] | None = None) -> str:
    """A kernel's configuration in which everything is a module, unless said otherwise."""
    values = {**dict.fromkeys(_OPTIONS, "m"), **(values or {})}
    return "".join(
        f"CONFIG_{name}={value}\n" if value != "n" else f"# CONFIG_{name} is not set\n"
        for name, value in values.items()
    )


def kernel_image(version: str, payload: bytes = b"") -> bytes:
    """The first sectors of a bzImage, and what it unpacks. Source: Linux Documentation/arch/x86/boot.rst."""
    head = bytearray(2048)
    head[0x1F1] = 3
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<II", head, 0x248, 0, len(payload))
    struct.pack_into("<H", head, 0x20E, 0x400)
    text = f"{version} (builder@host) #1 SMP\0".encode()
    head[0x600 : 0x600 + len(text)] = text
    return bytes(head) + payload


def initrd(version: str, modules: Sequence[str] = BOOT_MODULES, *, codec: str = "gzip", suffix: str = "") -> bytes:
    """An initramfs with some modules."""
    names = [f"usr/lib/modules/{version}/{module_path(one, suffix)}" for one in modules]
    return packed(cpio(["init", "usr/lib", *names]), codec)


def program(machine: int = 62) -> Made:
    """The head of a program for a processor: 62 is x86_64, 3 x86, 183 aarch64."""
    head = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 2, machine)
    return replace(with_mode("", 0o755), content=head)


KEY_FILES: dict[str, Content] = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "/etc/group": "root:x:0:\n",
    "/etc/shadow": with_mode("daemon:*:1::::::\nroot:!:19000:0:99999:7:::\n", 0o640),
    "/etc/gshadow": with_mode("root:*::\n", 0o640),
    "/etc/sudoers": with_mode("root ALL=(ALL) ALL\n", 0o440),
    "/etc/issue": "Linux\n",
    "/etc/machine-id": "",
    "/sbin/init": program(),
    "/sbin/dhclient": program(),
    "/usr/sbin/sshd": program(),
    "/usr/sbin/resize2fs": program(),
    "/usr/sbin/xfs_growfs": program(),
    "/usr/sbin/btrfs": program(),
}
SSH = "/etc/systemd/system/multi-user.target.wants"

_STAGES = ("cloud-init-local", "cloud-init", "cloud-config", "cloud-final")
CLOUD_INIT: dict[str, Content] = {
    "/usr/bin/cloud-init": with_mode("#!/usr/bin/python3\n", 0o755),
    "/usr/bin/growpart": with_mode("#!/bin/sh\n", 0o755),
    "/etc/cloud/cloud.cfg": "users:\n  - default\n",
    "/lib/systemd/system-generators/cloud-init-generator": with_mode("#!/bin/sh\n", 0o755),
    **{
        f"/etc/systemd/system/cloud-init.target.wants/{one}.service": link(f"/lib/systemd/system/{one}.service")
        for one in _STAGES
    },
    **{f"/lib/systemd/system/{one}.service": "[Unit]\n" for one in _STAGES},
}

DEBIAN_KERNEL = "6.1.0-13-amd64"
GRUB_CFG = """\
set default="0"
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple' {{
    insmod ext2
    linux /boot/vmlinuz-{version} root={root} ro {arguments}
    initrd /boot/initrd.img-{version}
}}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced' {{
    menuentry 'Debian GNU/Linux, with Linux {version}' $menuentry_id_option 'gnulinux-{version}' {{
        linux /boot/vmlinuz-{version} root={root} ro {arguments}
        initrd /boot/initrd.img-{version}
    }}
}}
"""
FSTAB = f"# <file system> <mount point> <type> <options> <dump> <pass>\nUUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\n"


def grub_cfg(version: str = DEBIAN_KERNEL, root: str = f"UUID={ROOT_UUID}", arguments: str = "console=ttyS0") -> str:
    """What update-grub writes, without its functions."""
    return GRUB_CFG.format(version=version, root=root, arguments=arguments)


def dpkg_status(*packages: str, status: str = "install ok installed") -> str:
    """dpkg's database with some packages."""
    listed = ("base-files", "cloud-init", *packages)
    return (
        "\n".join(f"Package: {one}\nStatus: {status}\nVersion: 22.4.2-1\nArchitecture: all\n" for one in listed) + "\n"
    )


def debian(**changes: Content) -> MadeView:
    """Debian 12: one ext4 root, GRUB for BIOS, initramfs-tools, cloud-init."""
    return MadeView(debian_files())


def debian_files() -> dict[str, Content]:
    """The files of a Debian 12."""
    version = DEBIAN_KERNEL
    return {
        **KEY_FILES,
        **CLOUD_INIT,
        **kernel_files(version),
        "/etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\nVERSION_ID="12"\n',
        "/etc/fstab": FSTAB,
        "/etc/default/grub": 'GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX=""\n',
        "/boot/grub/grub.cfg": with_mode(grub_cfg(), 0o444),
        f"/boot/vmlinuz-{version}": kernel_image(version),
        f"/boot/initrd.img-{version}": initrd(version),
        f"/boot/config-{version}": config_text(),
        "/var/lib/dpkg/status": dpkg_status(),
        "/etc/network/interfaces": "auto lo\niface lo inet loopback\n",
        f"{SSH}/ssh.service": link("/lib/systemd/system/ssh.service"),
    }


def rpm_database(*packages: str) -> bytes:
    """rpm's SQLite database with the tables that it has, written by SQLite. Source: rpm lib/backend/sqlite.cc."""
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE 'Packages' (hnum INTEGER PRIMARY KEY AUTOINCREMENT, blob BLOB NOT NULL)")
    database.execute("CREATE TABLE 'Name' (key 'TEXT' NOT NULL, hnum INTEGER NOT NULL, idx INTEGER NOT NULL)")
    for number, name in enumerate(packages, 1):
        database.execute("INSERT INTO Packages VALUES (?, ?)", (number, bytes(3000)))
        database.execute("INSERT INTO Name VALUES (?, ?, 0)", (name, number))
    database.commit()
    return database.serialize()


RHEL_KERNEL = "5.14.0-362.el9.x86_64"


def rhel_files() -> dict[str, Content]:
    """A RHEL 9: boot loader entries with grubenv, dracut, xz modules, rpm, root in LVM, /boot of its own."""
    version = RHEL_KERNEL
    return {
        **KEY_FILES,
        **{path: value for path, value in CLOUD_INIT.items() if not path.startswith("/lib/")},
        **kernel_files(version, suffix=".xz", base="/usr/lib/modules"),
        "/lib": link("usr/lib"),
        **{
            path.replace("/lib/", "/usr/lib/", 1): value
            for path, value in CLOUD_INIT.items()
            if path.startswith("/lib/")
        },
        "/etc/shadow": with_mode("root:!locked::0:99999:7:::\n", 0o000),
        "/etc/gshadow": with_mode("root:::\n", 0o000),
        "/etc/os-release": 'NAME="Rocky Linux"\nID="rocky"\nID_LIKE="rhel centos fedora"\nVERSION_ID="9.3"\n'
        'PRETTY_NAME="Rocky Linux 9.3 (Blue Onyx)"\n',
        "/usr/bin/dracut": with_mode("#!/bin/bash\n", 0o755),
        f"{SSH}/sshd.service": link("/usr/lib/systemd/system/sshd.service"),
        "/var/lib/rpm/rpmdb.sqlite": rpm_database("bash", "cloud-init", "dracut"),
        "/etc/fstab": f"/dev/mapper/rl-root / xfs defaults 0 0\nUUID={BOOT_UUID} /boot xfs defaults 0 0\n",
        "/boot/grub2/grub.cfg": with_mode('set default="${saved_entry}"\ninsmod blscfg\nblscfg\n', 0o600),
        "/boot/grub2/grubenv": f"# GRUB Environment Block\nsaved_entry=abc-{version}\n"
        "kernelopts=root=/dev/mapper/rl-root ro resume=/dev/mapper/rl-root console=ttyS0\n",
        f"/boot/loader/entries/abc-{version}.conf": f"title Rocky Linux ({version}) 9.3\nversion {version}\n"
        f"linux /vmlinuz-{version}\ninitrd /initramfs-{version}.img $tuned_initrd\noptions $kernelopts\n"
        "grub_users $grub_users\n",
        f"/boot/vmlinuz-{version}": kernel_image(version),
        f"/boot/initramfs-{version}.img": initrd(version, codec="xz", suffix=".xz"),
        f"/boot/config-{version}": config_text(),
    }


SUSE_KERNEL = "5.14.21-150500.55-default"


def suse_files() -> dict[str, Content]:
    """A SLES 15: btrfs with subvolumes, grub2, dracut with zstd modules, wicked."""
    version = SUSE_KERNEL
    return {
        **KEY_FILES,
        **CLOUD_INIT,
        **kernel_files(version, suffix=".zst", base="/usr/lib/modules"),
        "/etc/os-release": 'NAME="SLES"\nID="sles"\nID_LIKE="suse"\nVERSION_ID="15.5"\n'
        'PRETTY_NAME="SUSE Linux Enterprise Server 15 SP5"\n',
        "/usr/bin/dracut": with_mode("#!/bin/bash\n", 0o755),
        f"{SSH}/sshd.service": link("/usr/lib/systemd/system/sshd.service"),
        "/usr/lib/sysimage/rpm/rpmdb.sqlite": rpm_database("bash", "cloud-init", "wicked"),
        "/etc/fstab": f"UUID={ROOT_UUID} / btrfs defaults 0 0\nUUID={ROOT_UUID} /home btrfs subvol=/@/home 0 0\n",
        "/boot/grub2/grub.cfg": with_mode(grub_cfg(version).replace("/boot/initrd.img-", "/boot/initrd-"), 0o600),
        f"/boot/vmlinuz-{version}": kernel_image(version),
        f"/boot/initrd-{version}": initrd(version, codec="zstd", suffix=".zst"),
        f"/boot/config-{version}": config_text(),
        "/etc/sysconfig/network/ifcfg-eth0": "BOOTPROTO='dhcp'\nSTARTMODE='auto'\n",
    }


ALPINE_KERNEL = "6.6.14-0-virt"


def alpine_files() -> dict[str, Content]:
    """An Alpine: extlinux, OpenRC, apk, gzip modules, kernel and initramfs without a version in their names."""
    version = ALPINE_KERNEL
    cloud = {path: value for path, value in CLOUD_INIT.items() if "systemd" not in path}
    return {
        **KEY_FILES,
        **cloud,
        **kernel_files(version, suffix=".gz"),
        "/etc/os-release": 'NAME="Alpine Linux"\nID=alpine\nVERSION_ID=3.19.1\nPRETTY_NAME="Alpine Linux v3.19"\n',
        "/etc/fstab": f"UUID={ROOT_UUID}\t/\text4\trw,relatime 0 1\n",
        "/boot/extlinux.conf": "DEFAULT virt\nPROMPT 0\nLABEL virt\n  MENU LABEL Linux virt\n  LINUX vmlinuz-virt\n"
        f"  INITRD initramfs-virt\n  APPEND root=UUID={ROOT_UUID} modules=sd-mod,ext4 console=ttyS0\n",
        "/boot/vmlinuz-virt": kernel_image(version),
        "/boot/initramfs-virt": initrd(version, suffix=".gz"),
        "/boot/config-virt": config_text(),
        "/lib/apk/db/installed": "P:alpine-base\nV:3.19.1-r0\n\nP:cloud-init\nV:23.4-r0\n\n",
        "/etc/runlevels/boot/cloud-init-local": link("/etc/init.d/cloud-init-local"),
        "/etc/runlevels/default/cloud-init": link("/etc/init.d/cloud-init"),
        "/etc/init.d/cloud-init-local": "",
        "/etc/init.d/cloud-init": "",
        "/etc/runlevels/default/sshd": link("/etc/init.d/sshd"),
    }


ARCH_KERNEL = "6.7.4-arch1-1"


def arch_files(*, modules: Sequence[str] = BOOT_MODULES) -> dict[str, Content]:
    """An Arch with one unified kernel image on its EFI system partition."""
    version = ARCH_KERNEL
    image = unified_image(
        {
            ".linux": kernel_image(version),
            ".initrd": initrd(version, modules, codec="zstd", suffix=".zst"),
            ".cmdline": f"root=UUID={ROOT_UUID} rw console=ttyS0\0".encode(),
            ".uname": version.encode(),
        }
    )
    return {
        **KEY_FILES,
        **CLOUD_INIT,
        **kernel_files(version, suffix=".zst", base="/usr/lib/modules"),
        "/etc/shadow": with_mode("root::14871::::::\n", 0o600),
        "/etc/os-release": 'NAME="Arch Linux"\nPRETTY_NAME="Arch Linux"\nID=arch\n',
        "/etc/fstab": f"UUID={ROOT_UUID} / ext4 rw,relatime 0 1\nUUID=ABCD-1234 /efi vfat rw 0 2\n",
        "/efi/EFI/Linux/arch-linux.efi": image,
        "/efi/EFI/BOOT/BOOTX64.EFI": b"MZ",
        f"{SSH}/sshd.service": link("/usr/lib/systemd/system/sshd.service"),
        "/var/lib/pacman/local/linux-6.7.4.arch1-1/desc": "",
        "/var/lib/pacman/local/cloud-init-23.4-1/desc": "",
    }


def unified_image(sections: dict[str, bytes]) -> bytes:
    """A PE file of sections. Source: Microsoft PE Format, "COFF File Header", "Section Table"."""
    head = bytearray(b"MZ".ljust(64, b"\0"))
    struct.pack_into("<I", head, 60, 64)
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, len(sections), 0, 0, 0, 0, 0)
    table, body = b"", b""
    offset = 64 + 24 + 40 * len(sections)
    for name, content in sections.items():
        raw = content + bytes(-len(content) % 512)
        table += struct.pack("<8sIIII12xI", name.encode(), len(content), 0x1000, len(raw), offset + len(body), 0)
        body += raw
    return bytes(head) + coff + table + body


__all__ = ["Made", "folder"]
