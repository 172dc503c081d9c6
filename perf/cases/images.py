"""Disk to a local image file, against `qemu-img convert` with its best flags and direct I/O on both sides."""

from __future__ import annotations

from perf.case import Attempt, Case, Contender, Goal, Ground, ImageFormat, StoredFile
from perf.export import export_to_file
from perf.measure import one

# Without -m 16 -W qemu-img keeps one core busy; without -T none -t none it measures the page cache.
CONVERT = ("qemu-img", "convert", "-m", "16", "-W", "-T", "none", "-t", "none", "-f", "raw")


def qemu_img(name: str, image_format: ImageFormat, *arguments: str) -> Contender:
    """Return the contender `qemu-img convert`."""

    def prepare(ground: Ground) -> Attempt:
        image = ground.folder / f"image.{image_format}"
        command = (*CONVERT, *arguments, "-O", image_format, str(ground.disk), str(image))
        return Attempt(steps=(one(*command),), image=StoredFile(path=image, format=image_format))

    return Contender(name, prepare)


QEMU_ZLIB = qemu_img("qemu-img qcow2 zlib", "qcow2", "-c")
QEMU_ZSTD = qemu_img("qemu-img qcow2 zstd", "qcow2", "-c", "-o", "compression_type=zstd")
QEMU_PLAIN = qemu_img("qemu-img qcow2 plain", "qcow2")
QEMU_RAW = qemu_img("qemu-img raw", "raw")

OUR_ZLIB = {"use": "encode.qcow2", "compression": "zlib", "level": "fast"}
OUR_ZLIB_SMALL = {"use": "encode.qcow2", "compression": "zlib", "level": "small"}
OUR_ZSTD = {"use": "encode.qcow2", "compression": "zstd", "level": "fast"}
OUR_ZSTD_SMALL = {"use": "encode.qcow2", "compression": "zstd", "level": "small"}
OUR_PLAIN = {"use": "encode.qcow2", "compression": "none"}
OUR_RAW = {"use": "encode.raw"}

CASES = (
    Case(
        name="zlib-fast",
        summary="qcow2 with zlib clusters, our fast level",
        disk="system",
        ours=export_to_file("pipeline qcow2 zlib fast", "qcow2", OUR_ZLIB),
        rival=QEMU_ZLIB,
        goals=(Goal("wall ratio", 8.0), Goal("size ratio", 1.10)),
    ),
    Case(
        name="zlib-small",
        summary="qcow2 with zlib clusters, our small level",
        disk="system",
        ours=export_to_file("pipeline qcow2 zlib small", "qcow2", OUR_ZLIB_SMALL),
        rival=QEMU_ZLIB,
        goals=(Goal("wall ratio", 3.0), Goal("size ratio", 1.04)),
    ),
    Case(
        name="zstd",
        summary="qcow2 with zstd clusters, our fast level",
        disk="system",
        ours=export_to_file("pipeline qcow2 zstd fast", "qcow2", OUR_ZSTD),
        rival=QEMU_ZSTD,
        goals=(Goal("wall ratio", 3.0), Goal("size ratio", 1.05)),
    ),
    Case(
        name="plain",
        summary="qcow2 without compression",
        disk="system",
        ours=export_to_file("pipeline qcow2 plain", "qcow2", OUR_PLAIN),
        rival=QEMU_PLAIN,
        goals=(Goal("wall ratio", 1.3),),
    ),
    Case(
        name="raw",
        summary="raw image, holes kept",
        disk="system",
        ours=export_to_file("pipeline raw", "raw", OUR_RAW),
        rival=QEMU_RAW,
        goals=(Goal("wall ratio", 1.1),),
    ),
)
