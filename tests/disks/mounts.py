"""Loop devices and mounts for tests that run as root; each is gone when its block ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mounts need root")

# A user's PATH often lacks the folders where losetup and mke2fs are.
_ENVIRONMENT = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}


def system(*command: object, check: bool = True) -> str:
    """Run a system tool; returns what it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env=_ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def loop_device(file: Path, *, sector: int = 512, read_only: bool = True) -> Iterator[Path]:
    """A block device over a file."""
    access = ("--read-only",) if read_only else ()
    device = system("losetup", "--find", "--show", "--sector-size", sector, *access, file).strip()
    try:
        yield Path(device)
    finally:
        system("losetup", "--detach", device)


@contextmanager
def mounted(folder: Path, kind: str, source: object = "none", options: str = "rw") -> Iterator[Path]:
    """A mounted file system; the folder is made where it is not there."""
    folder.mkdir(exist_ok=True)
    system("mount", "-t", kind, "-o", options, source, folder)
    try:
        yield folder
    finally:
        system("umount", "--lazy", folder)
