"""Small disks that boot, built in seconds: MBR with extlinux, and GPT with GRUB for UEFI; and the same, broken.

Debian's cloud kernel with its own virtio modules, an initramfs of busybox that says what initramfs-tools says, and an
init that says what systemd and getty say. `python -m tests.disks.bootable FILE [bios|uefi]` writes one.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pipeline.units import MiB
from tests.disks.mounts import mounted, system
from tests.stores.process import cache_folder, locked

Firmware = Literal["bios", "uefi"]
_META: Final = "linux-image-cloud-amd64"
# In the order in which they have to be loaded.
_MODULES: Final = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
)
_MBR_CODE: Final = ("/usr/lib/EXTLINUX/mbr.bin", "/usr/lib/syslinux/mbr/mbr.bin")
_ROOT_UUID: Final = "6b0c7b66-5f0f-4f6c-9a36-3f5f6f0a1c11"

_INITRAMFS = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
for module in {modules}; do /bin/busybox insmod /$module.ko; done
root=
for word in $(/bin/busybox cat /proc/cmdline); do case $word in root=*) root=${{word#root=}};; esac; done
device=$root
for i in 1 2 3 4 5 6 7 8; do
  case $root in UUID=*) device=$(/bin/busybox findfs $root 2>/dev/null);; esac
  [ -b "$device" ] && break
  /bin/busybox sleep 0.2
done
if ! /bin/busybox mount -t ext4 -o ro "$device" /root; then
  echo "Gave up waiting for root file system device."
  echo "ALERT!  $root does not exist.  Dropping to a shell!"
  echo "(initramfs) "
  while true; do /bin/busybox sleep 60; done
fi
exec /bin/busybox switch_root /root /sbin/init
"""

_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
while read device folder kind options rest; do
  case $device in
    UUID=*) /bin/busybox findfs $device >/dev/null && continue;;
    /dev/*) [ -b $device ] && continue;;
    *) continue;;
  esac
  echo "[ TIME ] Timed out waiting for device $device."
  echo "[DEPEND] Dependency failed for $folder."
  echo "[DEPEND] Dependency failed for Local File Systems."
  echo "You are in emergency mode. After logging in, type \\"journalctl -xb\\" to view"
  while true; do /bin/busybox sleep 60; done
done < /etc/fstab
{before}
echo
echo "Debian GNU/Linux 12 web01 ttyS0"
echo
echo -n "web01 login: "
{then}
while true; do /bin/busybox sleep 60; done
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootable:
    """What a disk is to be like; the defaults boot.

    Attributes:
        root: of the kernel's command line.
        fstab: the device of the root filesystem in it.
        with_virtio: the initramfs has the drivers of the disk.
        with_boot_code: the first sector has code.
        console: where the kernel speaks.
        before, then: what init does before and after the login prompt.
    """

    firmware: Firmware = "bios"
    root: str = f"UUID={_ROOT_UUID}"
    fstab: str = f"UUID={_ROOT_UUID}"
    with_virtio: bool = True
    with_boot_code: bool = True
    console: str = "console=tty0 console=ttyS0"
    before: str = ""
    then: str = ""


def kernel() -> Path:
    """The folder of an unpacked Debian kernel package, fetched with apt-get the first time."""
    folder = cache_folder() / "kernel"
    with locked(cache_folder() / "kernel.lock"):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            told = subprocess.run(["apt-cache", "depends", _META], check=True, capture_output=True, text=True).stdout
            name = next(line.split()[-1] for line in told.splitlines() if "Depends: linux-image" in line)
            subprocess.run(["apt-get", "download", name], cwd=folder, check=True, capture_output=True)
            (package,) = folder.glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", package, folder / "tree"], check=True)
            package.unlink()
            (folder / "complete").touch()
    return folder / "tree"


def make_bootable(path: Path, wanted: Bootable | None = None) -> Path:
    """Write the disk; returns `path`. Needs root, for extlinux writes through a mounted filesystem."""
    wanted = wanted or Bootable()
    folder = path.with_name(path.name + ".parts")
    folder.mkdir()
    try:
        (vmlinuz,) = (kernel() / "boot").glob("vmlinuz-*")
        initramfs = folder / "initrd"
        initramfs.write_bytes(gzip.compress(b"".join(_cpio(_initramfs(wanted))), 1))
        make = _make_bios if wanted.firmware == "bios" else _make_uefi
        make(path, folder, wanted, vmlinuz, initramfs)
    finally:
        shutil.rmtree(folder)
    return path


def _options(wanted: Bootable) -> str:
    return f"root={wanted.root} ro {wanted.console} panic=0 loglevel=4"


def _root(folder: Path, wanted: Bootable) -> Path:
    """The files of the root filesystem."""
    root = folder / "root"
    for name in ("bin", "sbin", "etc", "proc", "dev", "boot", "sys", "var/log"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    (root / "sbin/init").write_text(_INIT.format(before=wanted.before, then=wanted.then))
    (root / "sbin/init").chmod(0o755)
    (root / "etc/fstab").write_text(f"{wanted.fstab} / ext4 defaults 0 1\n")
    (root / "etc/hostname").write_text("web01\n")
    return root


def _make_bios(path: Path, folder: Path, wanted: Bootable, vmlinuz: Path, initramfs: Path) -> None:
    root = _root(folder, wanted)
    shutil.copy(vmlinuz, root / "boot/vmlinuz")
    shutil.copy(initramfs, root / "boot/initrd")
    (root / "extlinux").mkdir()
    (root / "extlinux/extlinux.conf").write_text(
        f"DEFAULT linux\nLABEL linux\n  KERNEL /boot/vmlinuz\n  INITRD /boot/initrd\n  APPEND {_options(wanted)}\n"
    )
    size = 48 * MiB
    partition = folder / "partition"
    _make_ext4(partition, root, size - MiB)
    (folder / "mnt").mkdir()
    with mounted(folder / "mnt", "ext4", partition, "loop"):
        system("extlinux", "--install", folder / "mnt/extlinux")
        system("sync", "--file-system", folder / "mnt")
    with path.open("wb") as file:
        file.truncate(size)
    _sfdisk(path, "label: dos\nstart=2048, type=83, bootable\n")
    _splice(path, MiB, partition)
    if wanted.with_boot_code:
        code = next(Path(one) for one in _MBR_CODE if Path(one).exists()).read_bytes()
        with path.open("r+b") as file:
            file.write(code[:440])


def _make_uefi(path: Path, folder: Path, wanted: Bootable, vmlinuz: Path, initramfs: Path) -> None:
    esp, partition = folder / "esp", folder / "partition"
    (folder / "grub.cfg").write_text(
        "serial --unit=0\nterminal_output console serial\nsearch --no-floppy --file /vmlinuz --set=root\n"
        f"linux /vmlinuz {_options(wanted)}\ninitrd /initrd\nboot\n"
    )
    modules = "part_gpt fat normal linux search search_fs_file echo serial"
    system(
        *("grub-mkstandalone", "-O", "x86_64-efi", "-o", folder / "grub.efi", "--install-modules=" + modules),
        *("--modules=" + modules, "--locales=", "--fonts=", "--themes=", f"boot/grub/grub.cfg={folder / 'grub.cfg'}"),
    )
    with esp.open("wb") as file:
        file.truncate(40 * MiB)
    system("mkfs.fat", "-F", "32", "-n", "ESP", esp)
    system("mmd", "-i", esp, "::/EFI", "::/EFI/BOOT")
    if wanted.with_boot_code:
        system("mcopy", "-i", esp, folder / "grub.efi", "::/EFI/BOOT/BOOTX64.EFI")
    system("mcopy", "-i", esp, vmlinuz, "::/vmlinuz")
    system("mcopy", "-i", esp, initramfs, "::/initrd")
    _make_ext4(partition, _root(folder, wanted), 16 * MiB)
    with path.open("wb") as file:
        file.truncate(60 * MiB)
    _sfdisk(path, "label: gpt\nstart=1MiB, size=40MiB, type=uefi\nstart=41MiB, size=16MiB, type=linux\n")
    _splice(path, MiB, esp)
    _splice(path, 41 * MiB, partition)


def _make_ext4(path: Path, root: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)
    # extlinux reads neither 64bit nor metadata_csum.
    features = "^64bit,^metadata_csum,^extent,^flex_bg"
    system("mke2fs", "-q", "-F", "-t", "ext4", "-O", features, "-U", _ROOT_UUID, "-d", root, "-m", "0", path)


def _sfdisk(path: Path, script: str) -> None:
    subprocess.run(["/usr/sbin/sfdisk", "-q", path], input=script, text=True, check=True, capture_output=True)


def _splice(path: Path, offset: int, part: Path) -> None:
    system("dd", f"if={part}", f"of={path}", "bs=1M", f"seek={offset // MiB}", "conv=notrunc,sparse", "status=none")


def _initramfs(wanted: Bootable) -> Iterator[tuple[str, bytes, int]]:
    yield "bin", b"", 0o040755
    yield "dev", b"", 0o040755
    yield "bin/busybox", Path("/bin/busybox").read_bytes(), 0o100755
    modules = _MODULES if wanted.with_virtio else ()
    yield "init", _INITRAMFS.format(modules=" ".join(modules)).encode(), 0o100755
    for module in modules:
        (file,) = (kernel() / "lib/modules").glob(f"*/kernel/drivers/*/{module}.ko")
        yield f"{module}.ko", file.read_bytes(), 0o100644


def _cpio(files: Iterator[tuple[str, bytes, int]]) -> Iterator[bytes]:
    """An archive as the kernel unpacks it ("newc"), with a console: before devtmpfs there is none."""
    for number, (name, data, mode) in enumerate(files, 1):
        yield _entry(number, name, data, mode)
    yield _entry(900, "dev/console", b"", 0o020600, device=(5, 1))
    yield _entry(0, "TRAILER!!!", b"", 0)


def _entry(number: int, name: str, data: bytes, mode: int, device: tuple[int, int] = (0, 0)) -> bytes:
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


if __name__ == "__main__":
    make_bootable(Path(sys.argv[1]), Bootable(firmware="uefi" if sys.argv[2:] == ["uefi"] else "bios"))
