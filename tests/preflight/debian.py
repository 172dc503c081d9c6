"""A Debian 12 on a disk, as its own tools make it: `python -m tests.preflight.debian`.

debootstrap, apt, update-initramfs, grub-install and update-grub make one raw disk (MBR, one ext4), which is kept below
`.cache/` and mounted read-only by the tests. Takes about three minutes and 900 MiB once; needs root and a loop device.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.disks.mbr import PARTITION_START, write_mbr
from tests.preflight.disks import ROOT_UUID

CACHE = Path(__file__).parents[2] / ".cache" / "preflight"
DISK = CACHE / "debian12.raw"
DRACUT = "boot/by-dracut.img"
_SIZE = 10 << 30  # most of it free: about 900 MiB are written
_BASE = "systemd-sysv,initramfs-tools,kmod,udev,zstd,sudo,e2fsprogs"
_PACKAGES = ("linux-image-cloud-amd64", "cloud-init", "cloud-guest-utils", "grub-pc", "netplan.io", "openssh-server")


def why_not() -> str:
    """Why it can't be made here; empty where it can."""
    if os.geteuid() != 0:
        return "making a Debian needs root"
    for program in ("debootstrap", "losetup", "mke2fs"):
        if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
            return f"{program} is not installed"
    return "" if mirror() else "there is no Debian mirror in the sources of apt"


def mirror() -> str:
    """The mirror that this machine uses itself."""
    for path in (*Path("/etc/apt/sources.list.d").glob("*.sources"), *Path("/etc/apt/sources.list.d").glob("*.list")):
        for line in path.read_text().splitlines():
            if match := re.match(r"(?:URIs:|deb(?: \[[^]]*\])?)\s*(\S+/debian/?)(?:\s|$)", line):
                return match[1]
    old = Path("/etc/apt/sources.list")
    found = re.search(r"^deb(?: \[[^]]*\])?\s+(\S+/debian/?)\s", old.read_text(), re.M) if old.exists() else None
    return found[1] if found else ""


def make(disk: Path = DISK) -> Path:
    """Make the disk where it is not there yet."""
    if disk.exists():
        return disk
    disk.parent.mkdir(parents=True, exist_ok=True)
    work = disk.with_suffix(".making")
    with work.open("wb") as file:
        file.truncate(_SIZE)
    write_mbr(work, _SIZE)
    try:
        with _loop(work, 0, "--partscan") as whole, ExitStack() as stack:
            part = f"{whole}p1"
            if not Path(part).exists():  # the loop driver was loaded without room for partitions
                _run("partx", "--add", whole)
            _run("mke2fs", "-q", "-t", "ext4", "-U", ROOT_UUID, part)
            root = stack.enter_context(_mounted(part, disk.with_suffix(".root")))
            _fill(root, part, whole, stack)
    except BaseException:
        work.unlink()
        raise
    work.rename(disk)
    return disk


def _fill(root: Path, part: str, whole: str, stack: ExitStack) -> None:
    _run("debootstrap", "--variant=minbase", f"--include={_BASE}", "bookworm", root, mirror())
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    (root / "etc/fstab").write_text(f"# <file system> <mount point>\nUUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\n")
    # A /dev of its own: GRUB names the root filesystem by UUID only where udev has made the link.
    _run("mount", "-t", "tmpfs", "dev", root / "dev")
    stack.callback(_run, "umount", root / "dev")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        _run("cp", "-a", f"/dev/{name}", root / "dev")
    stack.enter_context(_bound(root, "proc", "proc"))
    stack.enter_context(_bound(root, "sysfs", "sys"))
    environment = {"DEBIAN_FRONTEND": "noninteractive", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    for words in (
        ("apt-get", "update", "-q"),
        ("apt-get", "install", "-y", "-q", "--no-install-recommends", *_PACKAGES),
    ):
        _run("chroot", root, *words, env=environment)
    for device in (part, whole):
        _run("cp", "-a", device, root / "dev")
    (root / "dev/disk/by-uuid").mkdir(parents=True)
    (root / "dev/disk/by-uuid" / ROOT_UUID).symlink_to(part)
    _run("chroot", root, "grub-install", "--target=i386-pc", whole, env=environment)
    _run("chroot", root, "update-grub", env=environment)
    _make_with_dracut(root, environment)
    for path in (root / "etc/machine-id", root / "etc/resolv.conf"):
        path.write_text("")
    _run("chroot", root, "apt-get", "clean", env=environment)


def _make_with_dracut(root: Path, environment: dict[str, str]) -> None:
    """A second initramfs by dracut, for the reader; dracut itself does not stay."""
    version = next((root / "lib/modules").iterdir()).name
    install = ("apt-get", "install", "-y", "-q", "--no-install-recommends", "dracut-core")
    _run("chroot", root, *install, env=environment)
    modules = "virtio_blk virtio_pci ext4"
    _run(
        "chroot",
        root,
        "dracut",
        "-f",
        "--no-hostonly",
        "--add-drivers",
        modules,
        f"/{DRACUT}",
        version,
        env=environment,
    )
    _run("chroot", root, "apt-get", "purge", "-y", "-q", "--autoremove", "dracut-core", env=environment)


@contextmanager
def mounted(disk: Path = DISK) -> Iterator[Path]:
    """The root filesystem of the disk, mounted read-only without replaying anything."""
    with _loop(disk, PARTITION_START, "-r") as part, _mounted(part, disk.with_suffix(".mount"), "ro,noload") as root:
        yield root


@contextmanager
def _loop(disk: Path, offset: int, *words: str) -> Iterator[str]:
    device = _run("losetup", "--find", "--show", "-o", str(offset), *words, disk).strip()
    try:
        yield device
    finally:
        _run("losetup", "-d", device)


@contextmanager
def _mounted(device: str, folder: Path, options: str = "rw") -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    _run("mount", "-o", options, device, folder)
    try:
        yield folder
    finally:
        _run("umount", folder)
        folder.rmdir()


@contextmanager
def _bound(root: Path, kind: str, name: str) -> Iterator[None]:
    _run("mount", "-t", kind, kind, root / name)
    try:
        yield
    finally:
        _run("umount", root / name)


def _run(*words: str | Path, env: dict[str, str] | None = None) -> str:
    environment = env or os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, words))}: exit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout


if __name__ == "__main__":
    print(why_not() or make())
    sys.exit(bool(why_not()))
