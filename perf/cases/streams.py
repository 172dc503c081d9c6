"""Disk to a compressed raw stream in a file, against `dd` into the usual compressor at the same level."""

from __future__ import annotations

import shlex

from perf.case import Attempt, Case, Contender, Goal, Ground, ImageFormat, StoredFile
from perf.export import export_to_file
from perf.measure import Step

RAW = {"use": "encode.raw"}


def dd_into(name: str, image_format: ImageFormat, compressor: str) -> Contender:
    """Return the contender `dd iflag=direct | compressor > image`."""

    def prepare(ground: Ground) -> Attempt:
        image = ground.folder / f"image.{image_format}"
        read = ("dd", f"if={ground.disk}", "bs=4M", "iflag=direct", "status=none")
        # The stopwatch has no redirection, and pigz writes only to stdout.
        pack = ("sh", "-c", f"exec {compressor} > {shlex.quote(str(image))}")
        return Attempt(steps=(Step((read, pack)),), image=StoredFile(path=image, format=image_format))

    return Contender(name, prepare)


CASES = (
    Case(
        name="raw-lz4",
        summary="raw image in lz4 frames",
        disk="system",
        ours=export_to_file("pipeline raw lz4", "raw+lz4", RAW, compress={"use": "compress.lz4"}),
        rival=dd_into("dd | lz4 -1", "raw+lz4", "lz4 -1 -c"),
        goals=(Goal("wall ratio", 1.5), Goal("size ratio", 1.05)),
    ),
    Case(
        name="raw-zstd",
        summary="raw image in zstd frames",
        disk="system",
        ours=export_to_file("pipeline raw zstd", "raw+zstd", RAW, compress={"use": "compress.zstd"}),
        rival=dd_into("dd | zstd -T0 -1", "raw+zstd", "zstd -T0 -1 -c -q"),
        goals=(Goal("wall ratio", 1.5), Goal("size ratio", 1.05)),
    ),
    Case(
        name="raw-gzip",
        summary="raw image in gzip members",
        disk="system",
        ours=export_to_file("pipeline raw gzip", "raw+gzip", RAW, compress={"use": "compress.gzip"}),
        rival=dd_into("dd | pigz", "raw+gzip", "pigz -c"),
        goals=(Goal("wall ratio", 1.0),),
    ),
)
