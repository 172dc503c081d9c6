"""Proves that an image a contender wrote holds the disk: a time for a wrong image is no time."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from perf.case import Attempt, Ground, Store, StoredFile, StoredObject


class ImageWrong(Exception):
    """The image is damaged or differs from the disk."""


def stored_bytes(attempt: Attempt, ground: Ground) -> int | None:
    """Return what the image takes up: the blocks of a raw file (it has holes), the length of everything else."""
    match attempt.image:
        case None:
            return None
        case StoredFile(path=path, format="raw"):
            return path.stat().st_blocks * 512
        case StoredFile(path=path):
            return path.stat().st_size
        case StoredObject(key=key):
            return _store(ground).size(key)


def prove(attempt: Attempt, ground: Ground) -> str | None:
    """Compare the image with the disk by tools that share no code with ours, and check its structure.

    Returns what was proven, None where there is no image.

    Raises:
        ImageWrong: with what the tool said.
    """
    match attempt.image:
        case None:
            return None
        case StoredFile(is_proven=False):
            return None
        case StoredFile(path=path, format=format, filesystem=filesystem) if filesystem:
            return _prove_filesystem(path, format, filesystem, ground)
        case StoredFile(path=path, format=format):
            pass
        case StoredObject(key=key, format=format):
            path = ground.folder / "fetched"
            _store(ground).fetch(key, path)
    proven = []
    if "+" in format:
        path, format = _unpacked(path, format.partition("+")[2], ground), "raw"
        proven.append("unpacks")
    if format not in ("raw", "vpc"):  # qemu-img has no check for the latter
        _ask("qemu-img", "check", "-q", "-f", format, str(path))
        proven.append("check clean")
    _ask("qemu-img", "compare", "-f", "raw", "-F", format, str(ground.disk), str(path))
    return ", ".join([*proven, "identical"])


_CHECKERS = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n"), "btrfs": ("btrfs", "check")}


def _prove_filesystem(path: Path, format: str, filesystem: str, ground: Ground) -> str:
    """Let the filesystem's own checker look at an image of used blocks."""
    raw = ground.folder / "unpacked"
    if format != "raw":
        _ask("qemu-img", "check", "-q", "-f", format, str(path))
    _ask("qemu-img", "convert", "-f", format, "-O", "raw", str(path), str(raw))
    _ask(*_CHECKERS[filesystem], str(raw))
    return f"{filesystem} clean"


def _unpacked(path: Path, tool: str, ground: Ground) -> Path:
    """The image inside, unpacked by the codec's own tool, with holes."""
    unpacked = ground.folder / "unpacked"
    command = f"{tool} -dc {shlex.quote(str(path))} | dd of={shlex.quote(str(unpacked))} bs=1M conv=sparse status=none"
    _ask("bash", "-o", "pipefail", "-c", command)
    return unpacked


def _store(ground: Ground) -> Store:
    if ground.store is None:
        raise ValueError("the image is an object, but this run has no store")
    return ground.store


def _ask(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise ImageWrong(f"{command[0]} {command[1]} exits {done.returncode}: {done.stdout.strip()[-500:]}")
