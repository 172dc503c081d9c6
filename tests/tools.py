"""Install what the tests need beyond Python packages: `python -m tests.tools`.

Debian's packages when they are missing and this is root, then the S3 servers. Takes no time when all is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.stores import install

# Program that a test runs, or file that it uses -> the Debian package that has it.
PROGRAMS: Final[Mapping[str, str]] = {
    "qemu-img": "qemu-utils",
    "mke2fs": "e2fsprogs",
    "losetup": "mount",
    "sfdisk": "fdisk",
    "openssl": "openssl",
    "lz4": "lz4",
    "zstd": "zstd",
    "gzip": "gzip",
    "pigz": "pigz",
    "chromium": "chromium",
    # Only the program is used, on a port of its own; where the package starts a service, that is the machine's matter.
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.fat": "dosfstools",
    "mcopy": "mtools",
    "partclone.extfs": "partclone",
    "sgdisk": "gdisk",
    "lvm": "lvm2",
    "node": "nodejs",
    "npm": "npm",
    "nginx": "nginx-light",
    "/usr/lib/nginx/modules/ngx_http_dav_ext_module.so": "libnginx-mod-http-dav-ext",
    "nbdkit": "nbdkit",
    "nbdcopy": "libnbd-bin",
    "cpio": "cpio",
    "xz": "xz-utils",
    "7zz": "7zip",
    "bzip2": "bzip2",
    "debootstrap": "debootstrap",
    "qemu-system-x86_64": "qemu-system-x86",
    "extlinux": "extlinux",
    "grub-mkstandalone": "grub-common",
    "busybox": "busybox-static",
    "/usr/share/OVMF/OVMF_CODE_4M.fd": "ovmf",
    "/usr/lib/grub/x86_64-efi/moddep.lst": "grub-efi-amd64-bin",
    "/usr/lib/EXTLINUX/mbr.bin": "extlinux",
}


def missing() -> list[str]:
    """The Debian packages of the programs that are not here."""
    return sorted({package for program, package in PROGRAMS.items() if not _is_here(program)})


def _is_here(program: str) -> bool:
    return Path(program).exists() if "/" in program else shutil.which(program, path=_PATH) is not None


# A user's PATH often lacks the folders where mke2fs and losetup are.
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _apt(*words: str) -> None:
    # RUNLEVEL=1: a package that has a service does not start it (invoke-rc.d(8)); tests start their own servers.
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    subprocess.run(["apt-get", *words], check=True, stdout=sys.stderr, env=quiet)


def main() -> int:
    """Install what is missing; returns the exit code."""
    packages = missing()
    if packages and (os.geteuid() != 0 or shutil.which("apt-get") is None):
        print(f"please install: {' '.join(packages)} (the tests that need them fail without)", file=sys.stderr)
    elif packages:
        _apt("update", "-qq")
        _apt("install", "-y", "-qq", "--no-install-recommends", *packages)
    return install.main([])


if __name__ == "__main__":
    sys.exit(main())
