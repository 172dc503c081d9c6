"""Disk to the other clouds' formats, against `qemu-img convert`, and compressed images read back against it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from perf.case import Attempt, Case, Contender, Goal, Ground, StoredFile
from perf.cases.images import CONVERT, qemu_img
from perf.export import export_to_file
from perf.measure import one

QEMU_VMDK = qemu_img("qemu-img vmdk streamOptimized", "vmdk", "-o", "subformat=streamOptimized")
# Without force_size qemu-img rounds the disk up to a geometry of cylinders, and compares another size.
QEMU_VHD = qemu_img("qemu-img vpc dynamic", "vpc", "-o", "subformat=dynamic,force_size=on")
QEMU_VHDX = qemu_img("qemu-img vhdx dynamic", "vhdx", "-o", "subformat=dynamic")


def _compressed(disk: Path) -> Path:
    """The disk as the qcow2 that qemu-img makes of it, kept beside the disk for the next round."""
    image = disk.with_suffix(".zlib.qcow2")
    if not image.exists():
        partial = image.with_suffix(".partial")
        subprocess.run([*CONVERT, "-c", "-O", "qcow2", str(disk), str(partial)], check=True)
        partial.rename(image)
    return image


def _read_by_qemu(ground: Ground) -> Attempt:
    image = ground.folder / "image.raw"
    command = ("qemu-img", "convert", "-m", "16", "-W", "-T", "none", "-t", "none", "-f", "qcow2", "-O", "raw")
    return Attempt(
        steps=(one(*command, str(_compressed(ground.disk)), str(image)),), image=StoredFile(path=image, format="raw")
    )


def _read_by_us(ground: Ground) -> Attempt:
    image = ground.folder / "image.raw"
    command = (*ground.product[:-1], "convert", "--quiet", "--no-verify", "-f", "qcow2", "-O", "raw")
    return Attempt(
        steps=(one(*command, str(_compressed(ground.disk)), str(image)),),
        image=StoredFile(path=image, format="raw"),
        environment={"XDG_STATE_HOME": str(ground.folder / "state")},
    )


CASES = (
    Case(
        name="vmdk-fast",
        summary="streamOptimized VMDK, our fast level",
        disk="system",
        ours=export_to_file("pipeline vmdk fast", "vmdk", {"use": "encode.vmdk", "level": "fast"}),
        rival=QEMU_VMDK,
        goals=(Goal("wall ratio", 8.0), Goal("size ratio", 1.12)),
    ),
    Case(
        name="vmdk-small",
        summary="streamOptimized VMDK, our small level",
        disk="system",
        ours=export_to_file("pipeline vmdk small", "vmdk", {"use": "encode.vmdk", "level": "small"}),
        rival=QEMU_VMDK,
        goals=(Goal("wall ratio", 4.0), Goal("size ratio", 1.03)),
    ),
    Case(
        name="vhd",
        summary="dynamic VHD",
        disk="system",
        ours=export_to_file("pipeline vhd dynamic", "vpc", {"use": "encode.vhd"}),
        rival=QEMU_VHD,
        goals=(Goal("wall ratio", 1.5),),
    ),
    Case(
        name="vhdx",
        summary="dynamic VHDX",
        disk="system",
        ours=export_to_file("pipeline vhdx", "vhdx", {"use": "encode.vhdx"}),
        rival=QEMU_VHDX,
        goals=(Goal("wall ratio", 1.5),),
    ),
    Case(
        name="read-qcow2-zlib",
        summary="a compressed qcow2 that qemu-img made, back to raw",
        disk="system",
        ours=Contender("pipeline convert qcow2 to raw", _read_by_us),
        rival=Contender("qemu-img convert qcow2 to raw", _read_by_qemu),
        goals=(Goal("wall ratio", 1.2),),
    ),
)
