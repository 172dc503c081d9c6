"""Every rule passes on a system that is right and fails on one that is not, and says where."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.units import GiB, MiB
from stages.disk.tree import Kind
from stages.preflight.findings import Finding
from stages.preflight.rules import all_rules
from stages.preflight.subject import LiveFacts, LiveMount
from tests.preflight import systems
from tests.preflight.disks import (
    BIOS_GUID,
    BOOT_UUID,
    ESP_GUID,
    LINUX_GUID,
    ROOT_UUID,
    SWAP_UUID,
    findings_of,
    grub_sectors,
    subject_of,
    table_of,
    target_of,
    volume,
)
from tests.preflight.systems import DEBIAN_KERNEL, FSTAB, grub_cfg, initrd, kernel_files
from tests.preflight.trees import Content, Made, MadeView, folder, link, with_mode

CFG = "/boot/grub/grub.cfg"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One system and what a rule says about it.

    Attributes:
        files: laid over a Debian, or over `system`.
        said: part of the message; the finding that has it must be there.
        at: `file:line` of its evidence.
        remedy: part of it.
    """

    id: str
    said: str
    status: str = "fail"
    severity: str = ""
    at: str = ""
    remedy: str = ""
    files: dict[str, Content] = field(default_factory=dict)
    system: Callable[[], dict[str, Content]] = systems.debian_files
    disk: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    profile: str = "tencent"
    space: dict[str, int] = field(default_factory=dict)


def fails(id: str, severity: str, said: str, at: str = "", **named: Any) -> Case:
    return Case(id=id, severity=severity, said=said, at=at, **named)


def passes(id: str, said: str, at: str = "", **named: Any) -> Case:
    return Case(id=id, status="pass", said=said, at=at, **named)


def unknown(id: str, said: str, at: str = "", **named: Any) -> Case:
    return Case(id=id, status="unknown", severity="warn", said=said, at=at, **named)


def skips(id: str, said: str, **named: Any) -> Case:
    return Case(id=id, status="skipped", said=said, **named)


def gpt(*types: str, **named: Any) -> dict[str, Any]:
    """A disk with a GPT."""
    return {"table": table_of("gpt", types or (LINUX_GUID,), **named)}


UNREADABLE: dict[str, Any] = {"unreadable": "permission denied"}
EFI: dict[str, Any] = {
    "table": table_of("gpt", (LINUX_GUID, ESP_GUID)),
    "volumes": [volume(1), volume(2, "vfat", "ABCD-1234")],
    "sectors": {},
}
LVM: dict[str, Any] = {
    "table": table_of("mbr", ("0x83", "0x8e")),
    "volumes": [
        volume(1, "xfs", BOOT_UUID),
        volume(2, "lvm2", "abcdef-lvm"),
        volume(None, "xfs", ROOT_UUID, names=("/dev/mapper/rl-root", "/dev/rl/root"), inside="lvm"),
    ],
}


def fstab(*lines: str) -> dict[str, Content]:
    """The right fstab with more lines: they are lines 3, 4 and so on."""
    return {"/etc/fstab": FSTAB + "".join(f"{line}\n" for line in lines)}


def menu(**named: str) -> dict[str, Content]:
    return {CFG: with_mode(grub_cfg(**named), 0o444)}


def config(**values: str) -> dict[str, Content]:
    return {f"/boot/config-{DEBIAN_KERNEL}": systems.config_text(values)}


def live(**named: Any) -> dict[str, Any]:
    named.setdefault("firmware", "bios")
    return {"live": LiveFacts(**named), "disk_name": "sda"}


def mounted(point: str, *disks: str, kind: str = "ext4", writable: bool = True) -> LiveMount:
    return LiveMount(point=point, kind=kind, source="/dev/x", writable=writable, disks=frozenset(disks))


IFCFG = "/etc/sysconfig/network-scripts/ifcfg-ens192"
NETPLAN = "/etc/netplan/01-installer.yaml"
NM = "/etc/NetworkManager/system-connections/wired.nmconnection"
BUILTIN = {
    **kernel_files(DEBIAN_KERNEL, builtin=("virtio", "virtio_ring", "virtio_pci", "virtio_blk", "ext4", "jbd2")),
    f"/boot/initrd.img-{DEBIAN_KERNEL}": initrd(DEBIAN_KERNEL, ()),
}
NO_MODULES: dict[str, Content] = {f"/lib/modules/{DEBIAN_KERNEL}": None}


def two_kernels(second: str, first: str = DEBIAN_KERNEL) -> dict[str, Content]:
    """A Debian that starts `first` and has `second` installed too."""
    files: dict[str, Content] = {CFG: with_mode(grub_cfg(first) + grub_cfg(second), 0o444)}
    for version in (first, second):
        files |= kernel_files(version)
        files[f"/boot/vmlinuz-{version}"] = systems.kernel_image(version)
        files[f"/boot/initrd.img-{version}"] = initrd(version)
        files[f"/boot/config-{version}"] = systems.config_text()
    return files


def old_kernel(version: str) -> dict[str, Content]:
    """A kernel from before there was virtio."""
    files = two_kernels(version, version) | kernel_files(
        version, missing=[one for one in systems.VIRTIO if "virt" in one]
    )
    names = ("VIRTIO", "VIRTIO_PCI", "VIRTIO_BLK", "VIRTIO_NET")
    files[f"/boot/config-{version}"] = systems.config_text(dict.fromkeys(names, "n"))
    return files


CASES = [
    # The table
    passes("disk.table", "uses MBR, which tencent takes"),
    fails("disk.table", "block", "uses GPT; tencent with BIOS boot accepts MBR only", disk=gpt(), remedy="boot_mode"),
    passes("disk.table", "uses GPT", disk=gpt(), profile="generic"),
    passes("disk.table", "uses GPT, which tencent takes", disk=gpt(), target={"boot_mode": "uefi"}),
    fails("disk.table", "block", "no partition table", disk={"table": table_of("none", ())}),
    passes(
        "disk.table", "data disk has no partition table", disk={"table": table_of("none", ())}, target={"kind": "data"}
    ),
    unknown("disk.table", "permission denied", disk=UNREADABLE, remedy="root"),
    passes("disk.gpt.health", "table is sound"),
    passes("disk.gpt.health", "both headers", disk=gpt()),
    fails(
        "disk.gpt.health",
        "warn",
        "backup header is missing",
        disk=gpt(problems=("the backup header is missing",)),
        remedy="sgdisk -e",
    ),
    fails("disk.gpt.health", "block", "both GPT headers", disk={"table": table_of("protective", (), problems=("x",))}),
    passes("disk.sector", "512 bytes"),
    fails("disk.sector", "block", "4096 bytes", disk=gpt(sector=4096)),
    # Booting
    passes("boot.firmware", "starts by BIOS, as tencent does"),
    fails("boot.firmware", "block", "starts by UEFI", disk=EFI, remedy="--boot-mode uefi"),
    passes("boot.firmware", "starts by UEFI", disk=EFI, profile="generic"),
    fails("boot.firmware", "block", "no EFI system partition", target={"boot_mode": "uefi"}),
    fails(
        "boot.firmware",
        "block",
        "this host was started by UEFI",
        "/sys/firmware/efi",
        disk={**EFI, **live(firmware="uefi")},
        remedy="grub-install",
    ),
    unknown("boot.firmware", "neither a BIOS loader nor", disk={"sectors": {}}),
    skips("boot.efi.fallback", "BIOS"),
    fails(
        "boot.efi.fallback",
        "block",
        "no fallback loader",
        "/boot/efi/EFI/BOOT",
        disk=EFI,
        files={"/boot/efi/EFI/debian/grubx64.efi": b"MZ"},
        remedy="--removable",
    ),
    passes("boot.efi.fallback", "BOOTX64.EFI", disk=EFI, files={"/boot/efi/EFI/BOOT/BOOTX64.EFI": b"MZ"}),
    passes(
        "boot.efi.fallback",
        "bootx64.efi",
        "/boot/efi/efi/Boot/bootx64.efi",
        disk=EFI,
        files={"/boot/efi/EFI": None, "/boot/efi/efi/Boot/bootx64.efi": b"MZ"},
    ),
    fails("boot.efi.fallback", "block", "no EFI folder", disk=EFI),
    passes("boot.loader", 'the default is "Debian GNU/Linux"', f"{CFG}:4"),
    fails(
        "boot.loader", "block", "no boot code", disk={"sectors": {}}, remedy="grub-install --target=i386-pc /dev/sda"
    ),
    fails("boot.loader", "block", "second part", disk={"sectors": grub_sectors(core=False)}),
    fails("boot.loader", "warn", "without a BIOS boot partition", disk=gpt()),
    passes("boot.loader", "2 boot entries", disk=gpt(BIOS_GUID, LINUX_GUID)),
    unknown("boot.loader", "no boot menu", files={CFG: None}),
    fails("boot.loader", "block", "starts no kernel", CFG, files={CFG: "set default=0\n"}),
    fails(
        "boot.loader",
        "block",
        "vmlinuz-6.1.0-13-amd64, which is not there",
        f"{CFG}:4",
        files={f"/boot/vmlinuz-{DEBIAN_KERNEL}": None},
    ),
    fails(
        "boot.loader",
        "block",
        "initrd.img-6.1.0-13-amd64, which is not there",
        f"{CFG}:4",
        files={f"/boot/initrd.img-{DEBIAN_KERNEL}": None},
        remedy="update-initramfs",
    ),
    passes("boot.root_uuid", "names the root filesystem"),
    fails(
        "boot.root_uuid",
        "block",
        "root=/dev/sda1; the disk becomes /dev/vda",
        f"{CFG}:4",
        files=menu(root="/dev/sda1"),
        remedy="update-grub",
    ),
    fails("boot.root_uuid", "warn", "root=/dev/sda1", f"{CFG}:4", files=menu(root="/dev/sda1"), profile="azure"),
    fails("boot.root_uuid", "warn", "root=/dev/vda1", files=menu(root="/dev/vda1")),
    fails("boot.root_uuid", "block", "by-id", files=menu(root="/dev/disk/by-id/ata-DISK-part1")),
    passes("boot.root_uuid", "names the root filesystem", files=menu(root="LABEL=root")),
    fails(
        "boot.root_uuid",
        "warn",
        "GRUB_DISABLE_LINUX_UUID",
        "/etc/default/grub:2",
        files={"/etc/default/grub": "GRUB_DEFAULT=0\nGRUB_DISABLE_LINUX_UUID=true\n"},
    ),
    fails(
        "boot.root_uuid",
        "warn",
        "writes root=/dev/sda1",
        "/etc/default/grub:1",
        files={"/etc/default/grub": 'GRUB_CMDLINE_LINUX="quiet root=/dev/sda1"\n'},
    ),
    fails("boot.root_uuid", "block", "root=/dev/loop0p1", f"{CFG}:4", files=menu(root="/dev/loop0p1")),
    fails("boot.root_uuid", "warn", "no boot entry says root=", files={CFG: grub_cfg().replace("root=", "boot=")}),
    passes("boot.root_exists", "is /dev/sda1 (ext4)", f"{CFG}:4"),
    fails(
        "boot.root_exists",
        "block",
        f"root=UUID={BOOT_UUID} is not in this image",
        f"{CFG}:4",
        files=menu(root=f"UUID={BOOT_UUID}"),
    ),
    fails("boot.root_exists", "block", "which this export drops", f"{CFG}:4", target={"kept": frozenset({2})}),
    unknown(
        "boot.root_exists",
        "may be inside of /dev/sda1 (luks)",
        files=menu(root=f"UUID={BOOT_UUID}"),
        disk={"opaque": ("/dev/sda1 (luks)",)},
    ),
    passes("boot.root_exists", "is /dev/sda1", files=menu(root="PARTUUID=5A5A1234-01")),
    fails("boot.root_exists", "block", "PARTUUID=5a5a1234-02 is not", files=menu(root="PARTUUID=5a5a1234-02")),
    unknown("boot.root_exists", "nothing that can be looked up", files=menu(root="ZFS=rpool/ROOT")),
    passes("boot.resume", "nothing is resumed from"),
    fails(
        "boot.resume",
        "warn",
        f"resume device UUID={SWAP_UUID} is not in the image",
        "/etc/initramfs-tools/conf.d/resume:1",
        files={"/etc/initramfs-tools/conf.d/resume": f"RESUME=UUID={SWAP_UUID}\n"},
        remedy="RESUME=none",
    ),
    fails("boot.resume", "warn", "resume device /dev/sda5", f"{CFG}:4", files=menu(arguments="resume=/dev/sda5")),
    passes(
        "boot.resume",
        "is /dev/sda2",
        files=menu(arguments=f"resume=UUID={SWAP_UUID}"),
        disk={"volumes": [volume(1), volume(2, "swap", SWAP_UUID)]},
    ),
    skips("boot.cmdline", "asks for no arguments"),
    fails("boot.cmdline", "warn", "lacks", f"{CFG}:4", profile="azure"),
    fails("boot.cmdline", "warn", "has quiet", f"{CFG}:4", files=menu(arguments="quiet"), profile="azure"),
    passes(
        "boot.cmdline",
        "has what azure asks for",
        profile="azure",
        files=menu(arguments="console=tty0 console=ttyS0,115200n8 earlyprintk=ttyS0 rootdelay=300 net.ifnames=0"),
    ),
    # Devices
    passes("fs.crypttab", "nothing is encrypted"),
    fails("fs.crypttab", "warn", "/dev/sda2 is encrypted", disk={"volumes": [volume(1), volume(2, "luks", "1-2")]}),
    fails(
        "fs.crypttab", "block", "oci refuses", disk={"volumes": [volume(1), volume(2, "luks", "1-2")]}, profile="oci"
    ),
    fails(
        "fs.crypttab",
        "warn",
        "chip or token",
        "/etc/crypttab:1",
        files={"/etc/crypttab": "root UUID=1-2 none luks,tpm2-device=auto\n"},
    ),
    fails(
        "fs.crypttab",
        "warn",
        "which is not in the image",
        "/etc/crypttab:2",
        files={"/etc/crypttab": "# name device\ndata UUID=9-9 none luks\n"},
    ),
    fails(
        "fs.crypttab",
        "warn",
        "the key file of data is not in the image: /mnt/stick/key",
        "/etc/crypttab:1",
        files={"/etc/crypttab": f"data UUID={ROOT_UUID} /mnt/stick/key luks\n"},
    ),
    passes("fs.mdadm", "no RAID"),
    fails("fs.mdadm", "warn", "member of a RAID array", disk={"volumes": [volume(1), volume(2, "md", "1-2")]}),
    fails(
        "fs.mdadm",
        "warn",
        "called differently",
        "/etc/mdadm/mdadm.conf:1",
        files={"/etc/mdadm/mdadm.conf": "DEVICE /dev/sda1 /dev/sdb1\n"},
    ),
    skips("fs.lvm.filter", "no LVM"),
    passes("fs.lvm.filter", "looks at every device", system=systems.rhel_files, disk=LVM),
    fails(
        "fs.lvm.filter",
        "block",
        "pins physical volumes",
        "/etc/lvm/devices/system.devices:2",
        system=systems.rhel_files,
        disk=LVM,
        remedy="rm /etc/lvm/devices/system.devices",
        files={
            "/etc/lvm/devices/system.devices": "# LVM uses devices listed in this file.\n"
            "IDTYPE=sys_wwid IDNAME=naa.5000c500 DEVNAME=/dev/sda2 PVID=abc PART=2\n"
        },
    ),
    fails(
        "fs.lvm.filter",
        "warn",
        "filter names devices",
        "/etc/lvm/lvm.conf:2",
        system=systems.rhel_files,
        disk=LVM,
        files={"/etc/lvm/lvm.conf": 'devices {\n  filter = [ "a|/dev/sda2|", "r|.*|" ]\n}\n'},
    ),
    # fstab
    passes("fs.fstab.foreign", "1 entries", "/etc/fstab"),
    fails(
        "fs.fstab.foreign",
        "block",
        f"UUID={BOOT_UUID} on /data is not in the image",
        "/etc/fstab:3",
        files=fstab(f"UUID={BOOT_UUID} /data ext4 defaults 0 2"),
        remedy="nofail",
    ),
    fails(
        "fs.fstab.foreign",
        "block",
        "/dev/sdb1 on /data",
        "/etc/fstab:3",
        files=fstab("/dev/sdb1 /data ext4 defaults 0 2"),
    ),
    fails(
        "fs.fstab.foreign",
        "block",
        "it is on sdb",
        "/etc/fstab:3",
        files=fstab(f"UUID={BOOT_UUID} /data ext4 rw 0 2"),
        disk=live(elsewhere={f"UUID={BOOT_UUID}": "sdb"}),
    ),
    fails(
        "fs.fstab.foreign",
        "info",
        "goes on without it",
        "/etc/fstab:3",
        files=fstab(f"UUID={BOOT_UUID} /data ext4 defaults,nofail 0 2"),
    ),
    fails("fs.fstab.foreign", "warn", "swap space", "/etc/fstab:3", files=fstab(f"UUID={SWAP_UUID} none swap sw 0 0")),
    passes(
        "fs.fstab.foreign",
        "1 entries",
        files=fstab(
            "tmpfs /tmp tmpfs rw 0 0",
            "server:/x /y nfs rw 0 0",
            "/swapfile none swap sw 0 0",
            "/home/a /b none bind 0 0",
        ),
    ),
    fails(
        "fs.fstab.foreign",
        "block",
        "is not exported",
        "/etc/fstab:3",
        target={"kept": frozenset({1})},
        files=fstab(f"UUID={BOOT_UUID} /data ext4 rw 0 2"),
        disk={"volumes": [volume(1), volume(2, "ext4", BOOT_UUID)]},
    ),
    unknown("fs.fstab.foreign", "larger than", "/etc/fstab", files={"/etc/fstab": Made(size=GiB)}),
    unknown("fs.fstab.foreign", "could not be looked up", disk={**UNREADABLE, "volumes": []}),
    passes("fs.fstab.devname", "no filesystem is named by its device"),
    fails(
        "fs.fstab.devname",
        "block",
        f"/dev/sda1 on / names a device that is called differently there: use UUID={ROOT_UUID}",
        "/etc/fstab:1",
        files={"/etc/fstab": "/dev/sda1 / ext4 defaults 0 1\n"},
        remedy=rf"sed -i '1s#^\s*/dev/sda1#UUID={ROOT_UUID}#' /etc/fstab",
    ),
    fails(
        "fs.fstab.devname",
        "warn",
        "/dev/sda2 on /srv",
        "/etc/fstab:3",
        files=fstab("/dev/sda2 /srv ext4 rw 0 2"),
        disk={"volumes": [volume(1), volume(2, "ext4", BOOT_UUID)]},
    ),
    passes("fs.fstab.netfs", "waits for no server"),
    fails(
        "fs.fstab.netfs",
        "warn",
        "files:/srv on /srv",
        "/etc/fstab:3",
        files=fstab("files:/srv /srv nfs4 rw 0 0"),
        remedy="_netdev,nofail",
    ),
    passes("fs.fstab.netfs", "waits for no server", files=fstab("//nas/x /x cifs _netdev 0 0")),
    # Key files
    passes("fs.shadow", "file of root's", "/etc/shadow:2"),
    passes("fs.shadow", "file of root's", system=systems.rhel_files),
    fails(
        "fs.shadow",
        "block",
        "immutable; the cloud cannot set a password",
        "/etc/shadow",
        remedy="chattr -i",
        files={"/etc/shadow": Made(content=b"root:x:\n", mode=0o640, immutable=True)},
    ),
    fails(
        "fs.shadow",
        "block",
        "append-only",
        files={"/etc/shadow": Made(content=b"root:x:\n", mode=0o640, append_only=True)},
    ),
    fails("fs.shadow", "block", "missing", files={"/etc/shadow": None}, remedy="pwconv"),
    fails("fs.shadow", "block", "belongs to user 1000", files={"/etc/shadow": with_mode("root:x:\n", 0o640, uid=1000)}),
    fails(
        "fs.shadow", "warn", "by everybody", files={"/etc/shadow": with_mode("root:x:\n", 0o644)}, remedy="chmod 640"
    ),
    fails("fs.shadow", "warn", "odd mode 0660", files={"/etc/shadow": with_mode("root:x:\n", 0o660)}),
    fails("fs.shadow", "block", "no line for root", files={"/etc/shadow": with_mode("daemon:*:\n", 0o640)}),
    fails("fs.shadow", "block", "is a directory", files={"/etc/shadow": folder()}),
    unknown(
        "fs.shadow",
        "immutable can't be told",
        files={"/etc/shadow": Made(content=b"root:", mode=0o640, immutable=None)},
    ),
    unknown(
        "fs.shadow", "permission denied", files={"/etc/shadow": Made(content=b"root:", mode=0o640, fails=errno.EACCES)}
    ),
    passes("fs.critical", "key files were looked at"),
    fails("fs.critical", "warn", "/etc/passwd is missing", files={"/etc/passwd": None}),
    fails(
        "fs.critical",
        "warn",
        "/etc/sudoers has the mode 0666",
        "/etc/sudoers",
        files={"/etc/sudoers": with_mode("", 0o666)},
        remedy="chmod 0440",
    ),
    fails(
        "fs.critical",
        "warn",
        "/etc/fstab is immutable",
        files={"/etc/fstab": Made(content=b"", immutable=True)},
        remedy="chattr -i",
    ),
    fails("fs.critical", "warn", "/etc/os-release", files={"/etc/os-release": None}),
    # Space and state
    passes("fs.free", "10 GiB free", "/"),
    fails("fs.free", "warn", "50 MiB free", "/", space={"free": 50 * MiB}, remedy="apt-get clean"),
    fails("fs.free", "block", "/ is full", "/", space={"free": 1000}),
    fails("fs.free", "warn", "90 inodes", "/", space={"inodes_free": 90}),
    passes("fs.clean", "1 filesystems"),
    fails(
        "fs.clean",
        "warn",
        "/dev/sda1 (ext4) was not unmounted",
        disk={"volumes": [volume(1, state="dirty")]},
        remedy="fsck -p /dev/sda1",
    ),
    skips("fs.clean", "in use", disk=live()),
    unknown("fs.clean", "no filesystem", disk={"volumes": [volume(1, "unknown", "")]}),
    # Drivers
    passes("drv.virtio.kernel", "has what tencent needs", f"/boot/config-{DEBIAN_KERNEL}:3"),
    fails(
        "drv.virtio.kernel",
        "block",
        "CONFIG_VIRTIO_BLK is not set",
        f"/boot/config-{DEBIAN_KERNEL}:3",
        files={**config(VIRTIO_BLK="n"), **NO_MODULES, **kernel_files(DEBIAN_KERNEL, missing=("virtio_blk",))},
    ),
    fails("drv.virtio.kernel", "block", "CONFIG_VIRTIO_PCI=m, and there is no virtio_pci.ko", files=NO_MODULES),
    passes(
        "drv.virtio.kernel",
        "has what tencent needs",
        files={**config(VIRTIO="y", VIRTIO_PCI="y", VIRTIO_BLK="y", VIRTIO_NET="y", EXT4_FS="y"), **NO_MODULES},
    ),
    fails(
        "drv.virtio.kernel",
        "block",
        "virtio_blk.ko is listed in modules.dep and not there",
        f"/lib/modules/{DEBIAN_KERNEL}/modules.dep",
        files={f"/lib/modules/{DEBIAN_KERNEL}/kernel/drivers/virtio_blk.ko": None},
    ),
    unknown("drv.virtio.kernel", "nothing says", files={f"/boot/config-{DEBIAN_KERNEL}": None, **NO_MODULES}),
    fails("drv.virtio.kernel", "block", "no kernel was found", files={"/boot": None}),
    passes("drv.virtio.kernel", "has what azure needs", profile="azure"),
    fails(
        "drv.virtio.kernel",
        "block",
        "has no hv_storvsc",
        profile="azure",
        files={**NO_MODULES, **config(HYPERV_STORAGE="n"), **kernel_files(DEBIAN_KERNEL, missing=("hv_storvsc",))},
    ),
    fails(
        "drv.virtio.kernel",
        "block",
        "has no ena",
        profile="aws-import",
        files={**NO_MODULES, **config(ENA_ETHERNET="n"), **kernel_files(DEBIAN_KERNEL, missing=("ena",))},
    ),
    passes("drv.virtio.initramfs", "virtio_blk", f"/boot/initrd.img-{DEBIAN_KERNEL}"),
    passes("drv.virtio.initramfs", "built in", files=BUILTIN),
    fails(
        "drv.virtio.initramfs",
        "block",
        "lacks virtio_blk",
        f"/boot/initrd.img-{DEBIAN_KERNEL}",
        remedy="update-initramfs",
        files={
            f"/boot/initrd.img-{DEBIAN_KERNEL}": initrd(
                DEBIAN_KERNEL, [one for one in systems.BOOT_MODULES if one != "virtio_blk"]
            )
        },
    ),
    fails(
        "drv.virtio.initramfs",
        "block",
        "lacks virtio_ring",
        files={
            f"/boot/initrd.img-{DEBIAN_KERNEL}": initrd(
                DEBIAN_KERNEL, [one for one in systems.BOOT_MODULES if one != "virtio_ring"]
            )
        },
    ),
    fails(
        "drv.virtio.initramfs",
        "block",
        "its modules are for 5.10.0-1-amd64",
        files={f"/boot/initrd.img-{DEBIAN_KERNEL}": initrd("5.10.0-1-amd64")},
    ),
    fails(
        "drv.virtio.initramfs",
        "block",
        "lacks ext4, jbd2",
        files={
            f"/boot/initrd.img-{DEBIAN_KERNEL}": initrd(
                DEBIAN_KERNEL, [one for one in systems.BOOT_MODULES if one not in ("ext4", "jbd2")]
            )
        },
    ),
    fails("drv.virtio.initramfs", "block", "has no initramfs", files={CFG: grub_cfg().replace("initrd", "echo")}),
    unknown("drv.virtio.initramfs", "lzo", files={f"/boot/initrd.img-{DEBIAN_KERNEL}": b"\x89LZO\0\r\n\x1a\n"}),
    passes("drv.virtio.blacklist", "nothing keeps"),
    fails(
        "drv.virtio.blacklist",
        "block",
        "virtio_blk is blacklisted",
        "/etc/modprobe.d/local.conf:2",
        files={"/etc/modprobe.d/local.conf": "# ours\nblacklist virtio-blk\n"},
        remedy="sed -i '2d'",
    ),
    fails(
        "drv.virtio.blacklist",
        "block",
        "virtio_net is blacklisted",
        "/etc/modprobe.d/hard.conf:1",
        files={"/etc/modprobe.d/hard.conf": "install virtio_net /bin/false\n"},
    ),
    fails(
        "drv.virtio.blacklist",
        "block",
        "the kernel line refuses virtio_pci",
        f"{CFG}:4",
        files=menu(arguments="modprobe.blacklist=floppy,virtio_pci"),
    ),
    fails(
        "drv.virtio.blacklist",
        "info",
        "built in all the same",
        files={**BUILTIN, "/etc/modprobe.d/a.conf": "blacklist virtio_blk\n"},
    ),
    # Software
    passes("sw.vmware", "no VMware tools among 2 packages"),
    fails(
        "sw.vmware",
        "warn",
        "open-vm-tools 22.4.2-1",
        "/var/lib/dpkg/status:11",
        remedy="apt-get purge -y open-vm-tools",
        files={"/var/lib/dpkg/status": systems.dpkg_status("open-vm-tools")},
    ),
    passes(
        "sw.vmware",
        "no VMware tools",
        files={
            "/var/lib/dpkg/status": systems.dpkg_status()
            + "\nPackage: open-vm-tools\nStatus: deinstall ok config-files\n"
        },
    ),
    fails(
        "sw.vmware",
        "block",
        "vmhgfs.ko",
        f"/lib/modules/{DEBIAN_KERNEL}/misc/vmhgfs.ko",
        files={f"/lib/modules/{DEBIAN_KERNEL}/misc/vmhgfs.ko": b""},
    ),
    fails(
        "sw.vmware",
        "warn",
        "installed by hand",
        "/usr/bin/vmware-uninstall-tools.pl",
        files={"/usr/bin/vmware-uninstall-tools.pl": ""},
        remedy="vmware-uninstall-tools.pl",
    ),
    unknown("sw.vmware", "packages can't be listed", files={"/var/lib/dpkg/status": None}),
    unknown(
        "sw.vmware",
        "/var/lib/rpm/Packages is an rpm database in a Berkeley DB, which is not read here",
        system=systems.rhel_files,
        files={"/var/lib/rpm/rpmdb.sqlite": None, "/var/lib/rpm/Packages": bytes(12) + b"\x61\x15\x06\0"},
        remedy="rpm -qa --qf '%{NAME}\\n' | grep -xE 'open-vm-tools.*|",
    ),
    fails(
        "sw.vmware",
        "warn",
        "installed by hand",
        system=systems.rhel_files,
        files={
            "/var/lib/rpm/rpmdb.sqlite": None,
            "/usr/lib/sysimage/rpm/Packages.db": b"RpmP",
            "/usr/bin/vmware-uninstall-tools.pl": "",
        },
    ),
    passes("sw.xen", "no Xen tools"),
    fails(
        "sw.xen",
        "warn",
        "xe-guest-utilities",
        files={"/var/lib/dpkg/status": systems.dpkg_status("xe-guest-utilities")},
    ),
    fails("sw.xen", "warn", "/usr/sbin/xe-daemon", "/usr/sbin/xe-daemon", files={"/usr/sbin/xe-daemon": ""}),
    passes("sw.virtualbox", "no VirtualBox"),
    fails(
        "sw.virtualbox",
        "block",
        "vboxguest.ko.xz",
        files={
            f"/lib/modules/{DEBIAN_KERNEL}/misc/vboxguest.ko.xz": b"",
            "/var/lib/VBoxGuestAdditions/config": "INSTALL_DIR='/opt/VBoxGuestAdditions-7.0'\n",
        },
        remedy="/opt/VBoxGuestAdditions-7.0/uninstall.sh",
    ),
    passes("sw.parallels", "no Parallels"),
    fails("sw.parallels", "warn", "installed by hand", files={"/usr/lib/parallels-tools/install": ""}),
    passes("sw.hyperv", "no Hyper-V"),
    fails("sw.hyperv", "warn", "hyperv-daemons", files={"/var/lib/dpkg/status": systems.dpkg_status("hyperv-daemons")}),
    fails(
        "sw.hyperv",
        "info",
        "hyperv-daemons",
        profile="azure",
        files={"/var/lib/dpkg/status": systems.dpkg_status("hyperv-daemons")},
    ),
    passes("sw.cloudagent", "no agent of another cloud"),
    unknown("sw.cloudagent", "packages can't be listed", files={"/var/lib/dpkg/status": None}),
    fails("sw.cloudagent", "warn", "the Azure agent", files={"/var/lib/dpkg/status": systems.dpkg_status("waagent")}),
    passes(
        "sw.cloudagent", "no agent", profile="azure", files={"/var/lib/dpkg/status": systems.dpkg_status("waagent")}
    ),
    fails(
        "sw.cloudagent",
        "warn",
        "which alibaba asks to remove",
        profile="alibaba",
        files={"/var/lib/dpkg/status": systems.dpkg_status("qemu-guest-agent")},
    ),
    # cloud-init
    passes("agent.cloudinit.installed", "cloud-init 22.4.2-1 is installed", "/var/lib/dpkg/status:6"),
    fails(
        "agent.cloudinit.installed",
        "block",
        "not installed",
        remedy="apt-get install -y cloud-init cloud-guest-utils",
        files={"/usr/bin/cloud-init": None, "/var/lib/dpkg/status": "Package: a\nStatus: install ok installed\n"},
    ),
    fails(
        "agent.cloudinit.installed",
        "warn",
        "not installed",
        profile="generic",
        files={"/usr/bin/cloud-init": None, "/var/lib/dpkg/status": "Package: a\nStatus: install ok installed\n"},
    ),
    fails(
        "agent.cloudinit.installed",
        "warn",
        "older than 21.2",
        profile="azure",
        files={"/var/lib/dpkg/status": systems.dpkg_status().replace("22.4.2", "19.4.1")},
    ),
    passes(
        "agent.cloudinit.installed",
        "waagent",
        profile="azure",
        files={"/usr/sbin/waagent": "", "/usr/bin/cloud-init": None},
    ),
    passes("agent.cloudinit.enabled", "runs at boot"),
    fails(
        "agent.cloudinit.enabled",
        "block",
        "by a file",
        "/etc/cloud/cloud-init.disabled",
        files={"/etc/cloud/cloud-init.disabled": ""},
        remedy="rm /etc/cloud/cloud-init.disabled",
    ),
    fails(
        "agent.cloudinit.enabled",
        "block",
        "kernel line switches",
        f"{CFG}:4",
        files=menu(arguments="cloud-init=disabled"),
    ),
    fails(
        "agent.cloudinit.enabled",
        "block",
        "cloud-final.service not enabled",
        files={"/etc/systemd/system/cloud-init.target.wants/cloud-final.service": None},
        remedy="systemctl enable cloud-final",
    ),
    fails(
        "agent.cloudinit.enabled",
        "block",
        "cloud-init.service is masked",
        files={"/etc/systemd/system/cloud-init.service": link("/dev/null"), "/dev/null": Made(kind=Kind.CHARACTER)},
    ),
    skips("agent.cloudinit.enabled", "not installed", files={"/usr/bin/cloud-init": None}),
    passes("agent.cloudinit.enabled", "runs at boot", system=systems.alpine_files),
    fails(
        "agent.cloudinit.enabled", "block", "no runlevel", system=systems.alpine_files, files={"/etc/runlevels": None}
    ),
    passes("agent.cloudinit.datasource", "every data source"),
    passes(
        "agent.cloudinit.datasource",
        "ConfigDrive is among",
        "/etc/cloud/cloud.cfg.d/90.cfg:1",
        files={"/etc/cloud/cloud.cfg.d/90.cfg": "datasource_list: [ NoCloud, ConfigDrive ]\n"},
    ),
    fails(
        "agent.cloudinit.datasource",
        "warn",
        "asks Azure only",
        "/etc/cloud/cloud.cfg.d/90.cfg:2",
        files={"/etc/cloud/cloud.cfg.d/90.cfg": "# ours\ndatasource_list:\n  - Azure\n"},
    ),
    passes("agent.cloudinit.state", "no trace"),
    fails(
        "agent.cloudinit.state",
        "warn",
        "has run here already",
        "/var/lib/cloud/instance",
        files={"/var/lib/cloud/instance": link("instances/i-1")},
        remedy="cloud-init clean",
    ),
    fails(
        "agent.cloudinit.state",
        "warn",
        "earlier first boot",
        "/etc/netplan/50-cloud-init.yaml",
        files={"/etc/netplan/50-cloud-init.yaml": ""},
    ),
    fails("agent.cloudinit.state", "info", "machine-id", "/etc/machine-id:1", files={"/etc/machine-id": "abc\n"}),
    fails(
        "agent.cloudinit.state",
        "warn",
        "leave the network alone",
        "/etc/cloud/cloud.cfg.d/99.cfg:1",
        files={"/etc/cloud/cloud.cfg.d/99.cfg": "network: {config: disabled}\n"},
    ),
    passes("agent.cloudinit.growpart", "can grow"),
    fails("agent.cloudinit.growpart", "info", "growpart is not installed", files={"/usr/bin/growpart": None}),
    fails(
        "agent.cloudinit.growpart", "info", "partition 2 lies behind", disk={"table": table_of("mbr", ("0x83", "0x82"))}
    ),
    # Hardware
    passes("hw.video", "Cirrus VGA; nothing here"),
    fails(
        "hw.video",
        "warn",
        "driver nvidia",
        "/etc/X11/xorg.conf:3",
        files={
            "/usr/bin/Xorg": "",
            "/etc/X11/xorg.conf": 'Section "Device"\n  Identifier "Card"\n  Driver "nvidia"\nEndSection\n',
        },
    ),
    fails(
        "hw.video",
        "info",
        "driver nvidia",
        files={"/etc/X11/xorg.conf": 'Section "Device"\n  Driver "nvidia"\nEndSection\n'},
    ),
    passes(
        "hw.video", "nothing here", files={"/etc/X11/xorg.conf": 'Section "Device"\nDriver "modesetting"\nEndSection\n'}
    ),
    passes("hw.diskname", "name no disk"),
    fails(
        "hw.diskname",
        "warn",
        "/etc/smartd.conf names /dev/sda, which becomes /dev/vda",
        "/etc/smartd.conf:2",
        files={"/etc/smartd.conf": "# disks\n/dev/sda -a\n"},
    ),
    fails(
        "hw.diskname",
        "warn",
        "/dev/sda1, which becomes /dev/vda1",
        "/etc/systemd/system/backup.service:2",
        files={"/etc/systemd/system/backup.service": "[Service]\nExecStart=/sbin/dump /dev/sda1\n"},
        remedy="by-uuid",
    ),
    skips("hw.diskname", "may keep", profile="azure"),
    passes("hw.nic", "no network configuration is bound"),
    fails(
        "hw.nic",
        "warn",
        "for ens192",
        "/etc/network/interfaces:3",
        files={"/etc/network/interfaces": "auto lo\niface lo inet loopback\nauto ens192\niface ens192 inet dhcp\n"},
    ),
    fails(
        "hw.nic",
        "warn",
        "static address",
        "/etc/network/interfaces:2",
        files={"/etc/network/interfaces": "auto eth0\niface eth0 inet static\n address 10.0.0.2/24\n"},
    ),
    fails(
        "hw.nic",
        "warn",
        "by their addresses",
        "/etc/udev/rules.d/70-persistent-net.rules:1",
        files={
            "/etc/udev/rules.d/70-persistent-net.rules": 'SUBSYSTEM=="net", ATTR{address}=="00:0c:29:1", NAME="eth0"\n'
        },
        remedy="rm ",
    ),
    fails(
        "hw.nic",
        "warn",
        "one card by its address",
        f"{NETPLAN}:6",
        files={NETPLAN: "network:\n version: 2\n ethernets:\n  a:\n   match:\n    macaddress: 00:11:22:33:44:55\n"},
    ),
    fails(
        "hw.nic",
        "warn",
        "card of another name",
        f"{NETPLAN}:4",
        files={NETPLAN: "network:\n version: 2\n ethernets:\n  ens33:\n   dhcp4: true\n"},
    ),
    passes(
        "hw.nic",
        "no network configuration is bound",
        files={NETPLAN: 'network:\n version: 2\n ethernets:\n  any:\n   match: {name: "e*"}\n   dhcp4: true\n'},
    ),
    fails(
        "hw.nic",
        "warn",
        "one card by its address",
        f"{IFCFG}:2",
        system=systems.rhel_files,
        files={IFCFG: "DEVICE=eth0\nHWADDR=00:0C:29:AA:BB:CC\nBOOTPROTO=dhcp\n"},
    ),
    fails(
        "hw.nic",
        "block",
        "one card by its address",
        f"{IFCFG}:2",
        system=systems.rhel_files,
        files={IFCFG: "DEVICE=eth0\nHWADDR=00:0C:29:AA:BB:CC\nBOOTPROTO=dhcp\n", "/usr/bin/cloud-init": None},
    ),
    fails(
        "hw.nic",
        "warn",
        "bound to ens192",
        f"{NM}:3",
        system=systems.rhel_files,
        files={NM: "[connection]\nid=wired\ninterface-name=ens192\n[ipv4]\nmethod=auto\n"},
    ),
    fails("hw.nic", "warn", "2 network cards", disk=live(nics=("eth0", "eth1"))),
    passes("hw.console", "speaks on ttyS0", f"{CFG}:4"),
    fails("hw.console", "info", "no serial console", f"{CFG}:4", files=menu(arguments="quiet")),
    fails("hw.console", "warn", "no serial console", files=menu(arguments="quiet"), profile="gcp"),
    # Layout
    passes("layout.system", "Debian GNU/Linux 12"),
    fails("layout.system", "block", "no system was found", disk={"no_system": "nothing there"}),
    unknown("layout.system", "no system was found", disk={"no_system": "x", "opaque": ("/dev/sda1 (luks)",)}),
    passes("layout.closure", "whole system lies on this disk"),
    fails(
        "layout.closure",
        "block",
        "/home lives on sdb",
        "/proc/self/mountinfo",
        disk=live(mounts=(mounted("/", "sda"), mounted("/home", "sdb"))),
    ),
    fails("layout.closure", "info", "/media/usb lives on sdb", disk=live(mounts=(mounted("/media/usb", "sdb"),))),
    fails(
        "layout.closure",
        "block",
        f"/boot (UUID={BOOT_UUID}) is not on this disk",
        "/etc/fstab:3",
        files=fstab(f"UUID={BOOT_UUID} /boot ext4 rw 0 2"),
    ),
    skips("layout.cut", "whole disk"),
    passes("layout.cut", "hold everything", target={"kept": frozenset({1})}),
    fails(
        "layout.cut",
        "block",
        "the cut drops /srv (/dev/sda2)",
        "/etc/fstab:3",
        target={"kept": frozenset({1})},
        files=fstab(f"UUID={BOOT_UUID} /srv ext4 rw 0 2"),
        remedy="through = 2",
        disk={"volumes": [volume(1), volume(2, "ext4", BOOT_UUID)]},
    ),
    skips("live.risk", "an image"),
    fails("live.risk", "warn", "/ mounted read-write", disk=live(mounts=(mounted("/", "sda"),)), remedy="freeze"),
    fails(
        "live.risk",
        "info",
        "/ mounted read-write",
        disk=live(mounts=(mounted("/", "sda"),)),
        target={"consistency": "live"},
    ),
    passes(
        "live.risk", "kept still by freeze", disk=live(mounts=(mounted("/", "sda"),)), target={"consistency": "freeze"}
    ),
    passes("live.risk", "nothing of this disk", disk=live(mounts=(mounted("/", "sda", writable=False),))),
    # Limits
    passes("out.size", "20 GiB"),
    fails("out.size", "block", "takes disks of 500 GiB", disk={"table": table_of(size=600 * GiB)}),
    fails(
        "out.size",
        "warn",
        "its filesystems hold 90 GiB",
        space={"total": 100 * GiB},
        disk={"volumes": [volume(1, size=100 * GiB)]},
    ),
    passes("out.size", "20 GiB", target={"file_size_max": 20 * GiB}, space={"total": 100 * GiB}),
    fails("out.size", "warn", "decimal units", disk={"table": table_of(size=480 * GiB)}),
    fails("out.size", "block", "takes images of 50 GiB", target={"file_size": 60 * GiB}),
    fails("out.size", "warn", "at most", target={"file_size_max": 60 * GiB}),
    fails("out.size", "block", "whole 1 GiB", profile="gcp", target={"virtual_size": 10 * GiB + MiB}),
    unknown("out.size", "could not be told", disk=UNREADABLE),
    skips("out.space", "no folder"),
    passes("out.space", "20 GiB are free", target={"room": 20 * GiB, "file_size": GiB}),
    fails("out.space", "block", "1 GiB are free", target={"room": GiB, "file_size": 2 * GiB}),
    fails("out.space", "warn", "may have up to 2 GiB", target={"room": GiB, "file_size_max": 2 * GiB}),
    skips("out.format", "no image"),
    passes("out.format", "takes qcow2", target={"format": "qcow2:zlib"}),
    fails("out.format", "block", "does not take vhdx", target={"format": "vhdx"}),
    fails("out.format", "block", "azure does not take vhd dynamic", target={"format": "vhd:dynamic"}, profile="azure"),
    skips("out.name", "no name yet"),
    passes("out.name", "is a name", target={"name": "web01"}),
    fails("out.name", "block", "names of 60 characters", target={"name": "x" * 61}),
    fails("out.name", "block", "does not take the name", target={"name": "Web_01"}, profile="gcp"),
    # What other preflights look at beyond the guide
    passes("drv.virtio.default", "starts by itself"),
    fails(
        "drv.virtio.default",
        "info",
        "6.1.0-20-amd64 is newer",
        f"{CFG}:4",
        files=two_kernels("6.1.0-20-amd64"),
    ),
    fails("drv.virtio.default", "warn", "for debugging", files=two_kernels("6.1.0-12-amd64", first="6.1.0-13-debug")),
    fails(
        "drv.virtio.default",
        "warn",
        "lacks drivers; 6.1.0-12-amd64 has them",
        files={
            **two_kernels("6.1.0-12-amd64"),
            **NO_MODULES,
            **config(VIRTIO_BLK="n"),
        },
    ),
    passes("drv.virtio.default", "starts by itself", files=two_kernels("6.1.0-12-amd64")),
    fails(
        "drv.virtio.kernel",
        "block",
        "has no btrfs, which the root filesystem needs: CONFIG_BTRFS_FS is not set",
        files={**config(BTRFS_FS="n"), **NO_MODULES, **kernel_files(DEBIAN_KERNEL, missing=("btrfs",))},
        disk={"volumes": [volume(1, "btrfs")]},
    ),
    passes("drv.virtio.kernel", "has what", disk={"volumes": [volume(1, "ext3")]}),
    fails(
        "drv.virtio.kernel",
        "block",
        "kernel/drivers/failover.ko is listed in modules.dep and not there",
        files={f"/lib/modules/{DEBIAN_KERNEL}/kernel/drivers/failover.ko": None},
    ),
    unknown(
        "drv.virtio.kernel",
        "virtio_blk, which the disk of tencent needs, can't be told",
        files={
            f"/boot/config-{DEBIAN_KERNEL}": None,
            **kernel_files(DEBIAN_KERNEL, missing=("virtio_blk",)),
            f"/lib/modules/{DEBIAN_KERNEL}/modules.builtin": None,
        },
    ),
    fails("drv.virtio.kernel", "block", "older than 2.6.25", files=old_kernel("2.6.18-194.el5")),
    skips("fs.kind", "asks for no filesystems"),
    passes("fs.kind", "takes the filesystems", profile="aws-import"),
    fails(
        "fs.kind",
        "block",
        "/ is f2fs; aws-import reads",
        "/etc/fstab:2",
        profile="aws-import",
        disk={"volumes": [volume(1, "f2fs")]},
    ),
    fails(
        "fs.kind",
        "block",
        "subvolume",
        "/etc/fstab:1",
        profile="aws-import",
        files={"/etc/fstab": f"UUID={ROOT_UUID} / btrfs subvol=@ 0 0\n"},
        disk={"volumes": [volume(1, "btrfs")]},
    ),
    fails(
        "fs.kind",
        "warn",
        "/dev/sda2 is swap space, which azure asks to leave out",
        profile="azure",
        disk={"volumes": [volume(1), volume(2, "swap", SWAP_UUID)]},
    ),
    passes("fs.uuid", "1 filesystems have UUIDs of their own"),
    fails(
        "fs.uuid",
        "block",
        "/dev/sda1 and /dev/sda2 have the same UUID",
        "/etc/fstab:2",
        disk={"volumes": [volume(1), volume(2)]},
        remedy="tune2fs -U random /dev/sda2",
    ),
    fails("fs.uuid", "warn", "the same UUID", disk={"volumes": [volume(1), volume(2, uuid="a"), volume(3, uuid="A")]}),
    passes("fs.uuid", "0 filesystems", disk={"volumes": [volume(1, "btrfs"), volume(2, "btrfs")]}),
    fails(
        "fs.free",
        "warn",
        "/srv: 5 MiB free (10 MiB at least)",
        "/srv",
        space={"free": 5 * MiB},
        files={**fstab(f"UUID={BOOT_UUID} /srv ext4 rw 0 2"), "/srv": folder()},
        disk={"volumes": [volume(1), volume(2, "ext4", BOOT_UUID)]},
    ),
    passes("sw.antivirus", "no virus scanners"),
    fails(
        "sw.antivirus", "info", "clamav-daemon", files={"/var/lib/dpkg/status": systems.dpkg_status("clamav-daemon")}
    ),
    fails(
        "sw.antivirus",
        "warn",
        "/opt/CrowdStrike/falconctl",
        profile="aws-import",
        files={"/opt/CrowdStrike/falconctl": ""},
    ),
    fails(
        "sw.xen",
        "warn",
        "drivers of Xen are loaded",
        "/etc/modprobe.d/xen.conf:1",
        files={"/etc/modprobe.d/xen.conf": "alias eth0 xennet\nalias scsi_hostadapter xenblk\n"},
        remedy="sed -i '1s/^/# /' /etc/modprobe.d/xen.conf",
    ),
    fails(
        "sw.xen",
        "warn",
        "console that only Xen has",
        "/etc/inittab:2",
        files={"/etc/inittab": "# consoles\nco:2345:respawn:/sbin/agetty hvc0 9600 vt100\n"},
    ),
    fails(
        "sw.xen",
        "warn",
        "drivers of Xen are loaded",
        "/etc/sysconfig/kernel:1",
        system=systems.suse_files,
        files={"/etc/sysconfig/kernel": 'INITRD_MODULES="xenblk ext3"\n'},
    ),
    passes("access.ssh", "runs at boot", "/usr/sbin/sshd"),
    passes("access.ssh", "runs at boot", system=systems.alpine_files),
    fails(
        "access.ssh",
        "warn",
        "no SSH server is installed",
        files={"/usr/sbin/sshd": None},
        remedy="apt-get install -y openssh-server",
    ),
    fails(
        "access.ssh",
        "warn",
        "does not run at boot",
        files={f"{systems.SSH}/ssh.service": None},
        remedy="systemctl enable ssh",
    ),
    fails("access.ssh", "warn", "does not run", files={"/etc/systemd/system/ssh.service": link("/dev/null")}),
    fails(
        "access.ssh",
        "warn",
        "switched off by a file",
        "/etc/ssh/sshd_not_to_be_run",
        files={"/etc/ssh/sshd_not_to_be_run": ""},
        remedy="rm /etc/ssh/sshd_not_to_be_run",
    ),
    passes("access.login", "the agent gives one at first boot"),
    fails("access.login", "warn", "root's password is locked", "/etc/shadow", files={"/usr/bin/cloud-init": None}),
    passes(
        "access.login",
        "may log in: root by key",
        files={"/usr/bin/cloud-init": None, "/root/.ssh/authorized_keys": "ssh-ed25519 AAAA me\n"},
    ),
    passes(
        "access.login",
        "may log in: root by password",
        files={"/usr/bin/cloud-init": None, "/etc/shadow": with_mode("root:$6$salt$hash:19000::::::\n", 0o640)},
    ),
    unknown(
        "access.login",
        "permission denied",
        files={"/usr/bin/cloud-init": None, "/root/.ssh/authorized_keys": Made(fails=errno.EACCES)},
    ),
    passes("access.dhcp", "dhclient", "/sbin/dhclient"),
    fails(
        "access.dhcp",
        "warn",
        "no DHCP client",
        files={"/sbin/dhclient": None},
        remedy="apt-get install -y isc-dhcp-client",
    ),
    passes("hw.cpu", "for x86_64"),
    passes("hw.cpu", "x86-64-v2", system=systems.rhel_files),
    fails(
        "hw.cpu",
        "block",
        "programs are for x86; aws-import takes x86_64",
        profile="aws-import",
        files={"/sbin/init": systems.program(3)},
    ),
    unknown("hw.cpu", "no program tells", files={"/sbin/init": None}),
    passes(
        "boot.efi.fallback",
        "BOOTAA64.EFI",
        disk=EFI,
        files={"/sbin/init": systems.program(183), "/boot/efi/EFI/BOOT/BOOTAA64.EFI": b"MZ"},
    ),
    fails(
        "boot.efi.fallback",
        "block",
        "EFI/BOOT/BOOTX64.EFI",
        disk=EFI,
        files={"/boot/efi/EFI/BOOT/BOOTIA32.EFI": b"MZ"},
    ),
    passes("sec.selinux", "not set up"),
    fails(
        "sec.selinux",
        "info",
        "SELinux is enforcing",
        "/etc/selinux/config:2",
        system=systems.rhel_files,
        files={"/etc/selinux/config": "# modes\nSELINUX=enforcing\nSELINUXTYPE=targeted\n"},
        remedy="sed -i '2s/enforcing/permissive/' /etc/selinux/config",
    ),
    fails("sec.selinux", "warn", "enforcing", profile="alibaba", files={"/etc/selinux/config": "SELINUX=enforcing\n"}),
    passes(
        "sec.selinux",
        "permissive",
        files={"/etc/selinux/config": "SELINUX=enforcing\n", **menu(arguments="enforcing=0")},
    ),
    fails(
        "sec.selinux",
        "info",
        "labels every file",
        "/.autorelabel",
        files={"/.autorelabel": ""},
        remedy="rm /.autorelabel",
    ),
    passes("sec.secrets", "no keys"),
    fails(
        "sec.secrets",
        "info",
        "the SSH server's own keys, credentials of AWS travel with the image",
        "/root/.aws/credentials",
        files={"/etc/ssh/ssh_host_ed25519_key": "x", "/root/.aws/credentials": "[default]\n"},
    ),
    fails(
        "agent.cloudinit.datasource",
        "warn",
        "asks NoCloud only",
        "/etc/cloud/ds-identify.cfg:1",
        files={
            "/etc/cloud/ds-identify.cfg": "datasource: NoCloud\n",
            "/etc/cloud/cloud.cfg.d/90.cfg": "datasource_list: [ ConfigDrive ]\n",
        },
    ),
    fails("agent.cloudinit.datasource", "warn", "asks NoCloud only", f"{CFG}:4", files=menu(arguments="ds=nocloud")),
    fails(
        "agent.cloudinit.enabled",
        "block",
        "ds-identify's policy",
        "/etc/cloud/ds-identify.cfg:1",
        files={"/etc/cloud/ds-identify.cfg": "policy: disabled\n"},
        remedy="sed -i '1d'",
    ),
    fails("agent.cloudinit.growpart", "info", "resize2fs is not installed", files={"/usr/sbin/resize2fs": None}),
    fails(
        "hw.nic",
        "block",
        "one card by its address",
        f"{NM}:3",
        system=systems.rhel_files,
        files={NM: "[connection]\nid=wired\nmac-address=00:0C:29:AA:BB:CC\n", "/usr/bin/cloud-init": None},
    ),
    fails("hw.video", "info", "nomodeset", f"{CFG}:4", files=menu(arguments="nomodeset")),
    fails(
        "hw.diskname",
        "warn",
        "/dev/sda1, which becomes /dev/vda1",
        "/var/spool/cron/crontabs/root:1",
        files={"/var/spool/cron/crontabs/root": "5 4 * * * /sbin/tune2fs -l /dev/sda1\n"},
    ),
    fails("live.risk", "warn", "2 MiB a second", disk=live(mounts=(mounted("/", "sda"),), written_per_s=2 * MiB + 0.5)),
    passes("fs.critical", "key files", files={"/etc/os-release": None, "/etc/debian_version": "6.0.10\n"}),
    fails("fs.critical", "warn", "/etc/os-release", files={"/etc/os-release": None, "/etc/debian_version": "12.1\n"}),
    passes("disk.table", "uses hybrid", disk={"table": table_of("hybrid", (LINUX_GUID,))}, profile="gcp"),
]


def named(case: Case) -> str:
    return f"{case.id}-{case.status}-{case.said}"[:90]


# What these complain of lies in no file: tables, sectors, superblocks, sizes.
_WITHOUT_A_FILE = ("disk.", "out.", "boot.firmware", "boot.loader", "boot.efi", "fs.clean", "fs.crypttab", "fs.kind",
                   "fs.mdadm", "fs.uuid", "layout.system", "agent.cloudinit.growpart")  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=named)
async def test_rule_says_what_is_wrong_and_where(case: Case) -> None:
    view = MadeView(case.files, below=MadeView(case.system()), **case.space)
    disk: dict[str, Any] = (LVM if case.system is systems.rhel_files else {}) | case.disk
    subject = await subject_of(view, **disk)
    findings = await findings_of(subject, target_of(subject, case.profile, **case.target), case.id)
    found = [one for one in findings if case.said in one.message]
    assert found, f"nobody says {case.said!r}: {[(one.status, one.severity, one.message) for one in findings]}"
    one = found[0]
    assert one.status == case.status, one
    if one.status == "fail":
        assert one.remedy
        assert one.evidence or case.id.startswith(_WITHOUT_A_FILE)
    if case.severity:
        assert one.severity == case.severity, one
    if case.at:
        assert case.at in [str(place) for place in one.evidence], one
    assert case.remedy in one.remedy, one
    if case.status == "pass":
        assert not [other for other in findings if other.status in ("fail", "unknown")], findings


def test_every_rule_has_passed_and_failed() -> None:
    for rule in all_rules():
        statuses = {case.status for case in CASES if case.id == rule.id}
        assert {"pass", "fail"} <= statuses, rule.id


def test_every_rule_says_why_it_is_asked() -> None:
    assert all(rule.why.strip().endswith(".") and rule.title for rule in all_rules())
    assert len({rule.id for rule in all_rules()}) == len(all_rules())


SYSTEMS: dict[str, tuple[Callable[[], dict[str, Content]], dict[str, Any]]] = {
    "debian": (systems.debian_files, {}),
    "rhel": (systems.rhel_files, LVM),
    "suse": (systems.suse_files, {"volumes": [volume(1, "btrfs")]}),
    "alpine": (systems.alpine_files, {}),
    "arch": (
        systems.arch_files,
        {
            "table": table_of("gpt", (ESP_GUID, LINUX_GUID)),
            "volumes": [volume(1, "vfat", "ABCD-1234"), volume(2)],
            "sectors": {},
        },
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
async def test_a_good_system_of_each_family_is_ready(name: str) -> None:
    files, disk = SYSTEMS[name]
    subject = await subject_of(MadeView(files()), **disk)
    mode = {"boot_mode": "uefi"} if name == "arch" else {}
    findings = await findings_of(subject, target_of(subject, "tencent", **mode))
    wrong = [one for one in findings if one.status in ("unknown", "fail") and one.severity != "info"]
    assert not wrong, [(one.id, one.message) for one in wrong]
    assert [kernel.version for kernel in subject.kernels]


def blocking(findings: tuple[Finding, ...]) -> set[str]:
    return {one.id for one in findings if one.blocks}


@pytest.mark.parametrize("name", SYSTEMS)
async def test_a_system_of_each_family_without_virtio_in_its_initramfs_is_blocked(name: str) -> None:
    files, disk = SYSTEMS[name]
    made = files()
    few = [one for one in systems.BOOT_MODULES if "virtio" not in one]
    if name == "arch":
        made = systems.arch_files(modules=few)
    else:
        version = (await subject_of(MadeView(made), **disk)).kernels[0].version
        path = next(one for one in made if "/initr" in one and one.startswith("/boot"))
        made[path] = initrd(version, few)
    subject = await subject_of(MadeView(made), **disk)
    mode = {"boot_mode": "uefi"} if name == "arch" else {}
    findings = await findings_of(subject, target_of(subject, "tencent", **mode))
    assert blocking(findings) == {"drv.virtio.initramfs"}
    one = next(one for one in findings if one.blocks)
    assert {
        "debian": "update-initramfs",
        "rhel": "dracut",
        "suse": "dracut",
        "alpine": "mkinitfs",
        "arch": "mkinitcpio",
    }[name] in one.remedy


async def test_a_data_disk_is_not_asked_for_a_system() -> None:
    subject = await subject_of(MadeView({"/photos/a.jpg": b"x"}))
    findings = await findings_of(subject, target_of(subject, kind="data"))
    assert not blocking(findings)
    assert {one.status for one in findings if one.id.startswith(("boot", "drv", "agent", "fs.shadow"))} == {"skipped"}


async def test_what_is_ignored_is_recorded_and_stops_nothing() -> None:
    from stages.preflight.rules import find_rule, judge

    subject = await subject_of(MadeView(systems.debian_files()), **gpt(BIOS_GUID, LINUX_GUID), volumes=[volume(2)])
    target = target_of(subject)
    rules = [find_rule("disk.table")]
    (loud,) = await judge(subject, target, rules=rules)
    (quiet,) = await judge(subject, target, rules=rules, ignored=["disk.table"])
    assert loud.blocks
    assert not quiet.blocks
    assert quiet.to_json()["ignored"] is True
