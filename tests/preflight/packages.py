"""Unmodified Debian packages, unpacked: the kernel, cloud-init, VMware's tools. Fetched once, kept below `.cache/`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".cache" / "preflight" / "packages"
KERNEL = "linux-image-cloud-amd64"
NAMES = ("base-files", "cloud-init", "cloud-guest-utils", "open-vm-tools")
# Of the kernel only what rules look at: all of it would take ten times as long.
_OF_THE_KERNEL = (
    "./boot/config-*",
    "./boot/vmlinuz-*",
    "./lib/modules/*/modules.builtin",
    "./lib/modules/*/kernel/drivers/virtio/*",
    "./lib/modules/*/kernel/drivers/block/virtio_blk.ko*",
    "./lib/modules/*/kernel/drivers/net/virtio_net.ko*",
    "./lib/modules/*/kernel/drivers/net/net_failover.ko*",
    "./lib/modules/*/kernel/net/core/failover.ko*",
)


def unpacked() -> Path:
    """A folder with the files of all packages, and a dpkg database made of their own control files."""
    folder = CACHE / "tree"
    if (folder / "var/lib/dpkg/status").exists():
        return folder
    if any(shutil.which(program) is None for program in ("apt-get", "dpkg-deb", "tar")):
        pytest.skip("this is no Debian")
    shutil.rmtree(CACHE, ignore_errors=True)
    folder.mkdir(parents=True)
    kernel = _depends(KERNEL)
    _download(kernel, *NAMES)
    status = ""
    for file in sorted(CACHE.glob("*.deb")):
        if file.name.startswith("linux-image"):
            tar = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", file], stdout=subprocess.PIPE)
            _run("tar", "-x", "-C", folder, "--wildcards", *_OF_THE_KERNEL, stdin=tar.stdout)
            assert tar.wait() == 0
        else:
            _run("dpkg-deb", "-x", file, folder)
        control = _run("dpkg-deb", "-f", file)
        status += re.sub(r"^(Package: .*)$", r"\1\nStatus: install ok installed", control, count=1, flags=re.M) + "\n"
        file.unlink()
    (folder / "var/lib/dpkg").mkdir(parents=True, exist_ok=True)
    (folder / "var/lib/dpkg/status").write_text(status)
    return folder


def _depends(meta: str) -> str:
    """The kernel that the meta package stands for."""
    listed = _run("apt-cache", "depends", meta)
    match = re.search(r"Depends: (linux-image-\S+)", listed)
    if match is None:
        pytest.skip("apt knows no kernel: run apt-get update")
    return match[1]


def _download(*names: str) -> None:
    done = subprocess.run(["apt-get", "download", "-q", *names], cwd=CACHE, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the packages can't be fetched: {done.stderr[-300:]}")


def _run(*words: str | Path, stdin: object = None) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(words, stdin=stdin, capture_output=True, text=True, env=environment, check=False)  # type: ignore[call-overload]  # a pipe
    assert done.returncode == 0, done.stderr
    return str(done.stdout)
