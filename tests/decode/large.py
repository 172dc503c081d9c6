"""A large qcow2 image that costs a few MiB of disk and a second: the tables are real, its data clusters are holes."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pipeline.units import GiB, KiB, MiB

SIZE = 100 * GiB
DATA = 10 * GiB
# As far as one L2 table reaches: each of them is in use.
_SPAN = 512 * MiB
_KEPT = DATA // (SIZE // _SPAN) // (64 * KiB) * (64 * KiB)


def make_large_qcow2(path: Path) -> Path:
    """100 GiB virtual, of which 10 GiB are allocated, a tenth of every 512 MiB, all over the file. By QEMU's tools."""
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", str(path), f"{SIZE}"]
    subprocess.run(create, check=True)
    commands = [f"discard {at + _KEPT} {_SPAN - _KEPT}" for at in range(0, SIZE, _SPAN)]
    subprocess.run(
        ["qemu-io", "-d", "unmap", "-f", "qcow2", str(path)],
        input="\n".join([*commands, "q", ""]),
        stdout=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return path
