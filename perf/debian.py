"""A real Debian system on a disk image: MBR, ext4, packages of a busy server, and what deleted files leave behind.

Needs root, debootstrap, e2fsprogs, util-linux, 12 GiB free, and a Debian mirror configured for apt on this machine.
A rebuild is not bit-identical: packages get updates and ext4 places files as it likes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.disks.mbr import PARTITION_START, write_mbr

MIB = 1 << 20
DISK_SIZE = 8 << 30

# Compilers, interpreters, databases, documents, a kernel: many kinds of bytes, 3 GiB and more of them.
PACKAGES = (
    "build-essential",
    "python3",
    "python3-numpy",
    "python3-scipy",
    "git",
    "vim",
    "perl-doc",
    "openjdk-17-jdk-headless",
    "golang-go",
    "nodejs",
    "llvm-14-dev",
    "nginx",
    "postgresql-15",
    "mariadb-server",
    "linux-image-cloud-amd64",
    "libreoffice-core",
    "qemu-utils",
    "man-db",
)

# Copied and deleted again after the trim: blocks that are free in the filesystem and full of old bytes.
RESIDUE_FOLDERS = ("usr/lib/go-1.19", "usr/share/go-1.19")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """Where apt on this machine gets Debian from."""

    uri: str
    suite: str
    keyring: str | None


def build(path: Path) -> None:
    """Write the image to `path`, which must not exist."""
    mirror = configured_mirror()
    with path.open("xb") as image:
        image.truncate(DISK_SIZE)
    write_mbr(path, DISK_SIZE)
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(path))
        _run("mkfs.ext4", "-q", "-L", "root", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        root = stack.enter_context(mounted(device, path.with_suffix(".mount")))
        _install(root, mirror)
        _age(root)


def configured_mirror() -> Mirror:
    """Find the main archive of this machine's release in apt's own configuration (both of its file formats)."""
    suite = _release()["VERSION_CODENAME"]
    for uri, suites, components, keyring in _apt_entries():
        if suite in suites and "main" in components:
            return Mirror(uri=uri, suite=suite, keyring=keyring)
    raise SystemExit(f"apt on this machine has no source for Debian {suite} main: add one to /etc/apt/sources.list")


def _install(root: Path, mirror: Mirror) -> None:
    keyring = ["--keyring", mirror.keyring] if mirror.keyring else []
    _run("debootstrap", "--variant=minbase", *keyring, mirror.suite, str(root), mirror.uri)
    (root / "etc/apt/sources.list").write_text(f"deb {mirror.uri} {mirror.suite} main\n")
    # Without this the packages' scripts would start servers on this machine.
    no_services = root / "usr/sbin/policy-rc.d"
    no_services.write_text("#!/bin/sh\nexit 101\n")
    no_services.chmod(0o755)
    _run("mount", "-t", "proc", "proc", str(root / "proc"))
    try:
        _chroot(root, "apt-get", "update")
        _chroot(root, "apt-get", "install", "-y", "--no-install-recommends", *_available(root, PACKAGES))
    finally:
        _run("umount", str(root / "proc"))
    no_services.unlink()


def _age(root: Path) -> None:
    """Do to the disk what years do: zeros that were written, logs, packages cleaned away, old blocks in free space."""
    with (root / "var/zeros").open("wb") as zeros:
        for _ in range(300):
            zeros.write(bytes(MIB))
    with (root / "var/log/files.log").open("wb") as log:
        _list_files(root, log.fileno(), 60_000_000)
    _chroot(root, "apt-get", "clean")
    for archive in root.glob("usr/lib/llvm-*/lib/*.a"):
        archive.unlink()
    os.sync()
    _run("fstrim", str(root))
    for folder in RESIDUE_FOLDERS:
        old, copy = root / folder, root / "var/tmp/residue"
        if old.is_dir():
            shutil.copytree(old, copy, symlinks=True)
            os.sync()
            shutil.rmtree(copy)
            os.sync()


def _list_files(root: Path, log: int, size: int) -> None:
    # Listed again and again with a new prefix until the log is long enough, as a nightly job would.
    for night in range(1000):
        if os.fstat(log).st_size >= size:
            return
        _run("find", str(root / "usr"), "-printf", f"night {night} %TY-%Tm-%Td %TT %s %m %u %g /%P\\n", stdout=log)


def _available(root: Path, names: Sequence[str]) -> list[str]:
    """Drop the names that this mirror does not know, and say so."""
    known = []
    for name in names:
        answer = _chroot(root, "apt-cache", "policy", name, capture=True)
        if "Candidate: (none)" in answer or "Candidate:" not in answer:
            print(f"no package {name} on this mirror: left out")
        else:
            known.append(name)
    return known


@contextmanager
def loop_device(path: Path) -> Iterator[str]:
    """Attach the partition of the image, from its first byte on, to a loop device."""
    device = _run("losetup", "--find", "--show", "-o", str(PARTITION_START), str(path), capture=True).strip()
    try:
        yield device
    finally:
        _run("losetup", "-d", device)


@contextmanager
def mounted(device: str, folder: Path) -> Iterator[Path]:
    """Mount a filesystem in `folder`, which is made and removed."""
    folder.mkdir()
    try:
        _run("mount", device, str(folder))
        try:
            yield folder
        finally:
            _run("umount", str(folder))
    finally:
        folder.rmdir()


def _chroot(root: Path, *command: str, capture: bool = False) -> str:
    return _run("chroot", str(root), *command, capture=capture)


def _run(*command: str, capture: bool = False, stdout: int | None = None) -> str:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    output = subprocess.PIPE if capture else stdout
    done = subprocess.run(command, check=True, env=environment, text=True, stdout=output)
    return done.stdout or ""


def _release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}


def _apt_entries() -> Iterator[tuple[str, list[str], list[str], str | None]]:
    """Yield (uri, suites, components, keyring) of every source, one-line and deb822 style (sources.list(5))."""
    folder = Path("/etc/apt/sources.list.d")
    for file in [Path("/etc/apt/sources.list"), *sorted(folder.glob("*.list"))]:
        for line in file.read_text().splitlines() if file.exists() else ():
            words = [word for word in line.split() if not word.startswith("[") and not word.endswith("]")]
            if len(words) >= 4 and words[0] == "deb":
                yield words[1], [words[2]], words[3:], None
    for file in sorted(folder.glob("*.sources")):
        for paragraph in file.read_text().split("\n\n"):
            fields = {
                name.strip(): value.strip()
                for name, _, value in (line.partition(":") for line in paragraph.splitlines() if line[:1] not in "# \t")
            }
            if "deb" in fields.get("Types", "").split():
                suites, components = fields["Suites"].split(), fields.get("Components", "").split()
                yield fields["URIs"].split()[0], suites, components, fields.get("Signed-By") or None
