"""Fuzz every image reader, guided by coverage: `make fuzz SECONDS=60 FORMAT=qcow2`.

An input is a list of changes to a good image, so that few of them end at the magic number. Whatever comes of it, a
reader may only raise FormatError; a crash, a hang over 10 s or more than 512 MiB ends the fuzzer and keeps the input in
.cache/fuzz, from where `--again FILE` runs it alone.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import struct
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import FormatError
from pipeline.units import KiB, MiB

FORMATS = ("qcow2", "vhd", "vmdk", "vhdx", "ova", "gce", "raw", "qcow2+zstd", "gzip", "zstd", "lz4")
# Whole streams, as the usual tools make them, read without an index.
STREAMS = ("gzip", "zstd", "lz4")
_FOLDER = Path(".cache/fuzz")
_CHANGES_MAX = 24
_HANGS_S = 10
_MEMORY_MIB = 512
# Numbers that formats compare with: sizes, counts and their borders.
_NUMBERS = (0, 1, 2, 3, 7, 8, 9, 21, 22, 63, 64, 511, 512, 513, 4095, 4096, 65535, 65536, 1 << 20, 1 << 31, 1 << 32)


def main() -> None:
    """Fuzz one format in this process, or all of them, each in one of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", choices=("all", *FORMATS), default="all")
    parser.add_argument("--seconds", type=int, default=60, help="for each format")
    parser.add_argument("--again", type=Path, help="run one kept input")
    asked = parser.parse_args()
    if asked.format != "all":
        return _fuzz(asked.format, asked.seconds, asked.again)
    failed = []
    for format in FORMATS:
        command = [sys.executable, "-m", "tests.decode.fuzz", "--format", format, "--seconds", str(asked.seconds)]
        print(f"== {format}", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(format)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the inputs are in {_FOLDER}")
    return None


def _fuzz(format: str, seconds: int, again: Path | None) -> None:
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["stages.decode"]):
        from stages.decode.check.checking import check
        from stages.decode.opening import open_image
        from stages.decode.probing import probe_format
        from stages.decode.unpacked import UnpackedStream
    from tests.decode.images import BytesReader, content

    images = _good(format)
    loop = asyncio.new_event_loop()

    async def look(image: bytes) -> None:
        reader = BytesReader(image)
        steps: list[Callable[[], Awaitable[object]]] = [
            lambda: probe_format(reader, name_hint="disk"),
            lambda: _read(open_image(reader, format), content),
        ]
        if format in STREAMS:
            steps[1:] = [lambda: _unpack(UnpackedStream(reader, format, format))]
        elif "+" not in format:
            steps.append(lambda: check(reader, format, deep=True))
        for step in steps:
            try:
                await step()
            except FormatError:
                pass

    def one(data: bytes) -> None:
        loop.run_until_complete(look(_changed(images, atheris.FuzzedDataProvider(data))))

    kept = _FOLDER / format
    kept.mkdir(parents=True, exist_ok=True)
    arguments = [str(again)] if again else [str(kept), f"-max_total_time={seconds}", "-max_len=512", "-len_control=0"]
    limits = [f"-timeout={_HANGS_S}", f"-rss_limit_mb={_MEMORY_MIB}", f"-artifact_prefix={kept}/crash-"]
    atheris.Setup([sys.argv[0], *arguments, *limits], one)
    atheris.Fuzz()


async def _read(opening: Any, content: Any) -> None:
    image = await opening
    # What a header claims may be large; the tests of hostile images hold the time that holes take.
    if image.size <= 64 * MiB:
        await content(image)


async def _unpack(stream: Any) -> None:
    await stream.measure()
    for offset in (stream.size // 2, 0):
        await stream.read(offset, min(MiB, stream.size - offset))


def _good(format: str) -> list[bytes]:
    """Good images of a format, small."""
    from tests.decode.images import mixed_disk
    from tests.decode.made import made_by_qemu, made_gce, made_ova, made_stream

    disk = mixed_disk(512 * KiB + 512, seed=5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def of_qemu(format: str, options: str = "") -> bytes:
            return made_by_qemu(folder / "made", disk, format, options)[0]

        makers: dict[str, Callable[[], list[bytes]]] = {
            "qcow2": lambda: [of_qemu("qcow2"), of_qemu("qcow2", "cluster_size=512"), of_qemu("qcow2", "compat=0.10")],
            "vhd": lambda: [of_qemu("vhd", "force_size=on"), of_qemu("vhd", "subformat=fixed,force_size=on")],
            "vmdk": lambda: [of_qemu("vmdk"), of_qemu("vmdk", "subformat=streamOptimized"), made_stream(disk)],
            "vhdx": lambda: [of_qemu("vhdx", "block_size=1M")],
            "ova": lambda: [made_ova(made_stream(disk))],
            "gce": lambda: [made_gce(disk)],
            "raw": lambda: [disk],
            "qcow2+zstd": lambda: [_seekable(of_qemu("qcow2"))],
            **{one: partial(_packed, one, disk) for one in STREAMS},
        }
        return makers[format]()


def _packed(tool: str, disk: bytes) -> list[bytes]:
    """The disk as one stream, and as several."""
    parts = (disk, disk[: 100 * KiB], disk[100 * KiB :])
    whole, *cut = (subprocess.run([tool, "-c"], input=one, capture_output=True, check=True).stdout for one in parts)
    return [whole, b"".join(cut)]


def _seekable(image: bytes) -> bytes:
    """A zstd stream with a seek table. Source: Zstandard Seekable Format 0.1.0."""
    import zstandard

    chunks = [image[start : start + 256 * KiB] for start in range(0, len(image), 256 * KiB)]
    frames = [zstandard.compress(chunk) for chunk in chunks]
    entries = b"".join(struct.pack("<II", len(frame), len(chunk)) for frame, chunk in zip(frames, chunks, strict=True))
    table = entries + struct.pack("<IBI", len(frames), 0, 0x8F92EAB1)
    return b"".join(frames) + struct.pack("<II", 0x184D2A5E, len(table)) + table


def _changed(images: list[bytes], data: Any) -> bytes:
    """A good image with the changes that the input asks for."""
    image = bytearray(images[data.ConsumeIntInRange(0, len(images) - 1)])
    for _ in range(data.ConsumeIntInRange(1, _CHANGES_MAX)):
        if not data.remaining_bytes():
            break
        # Headers and tables lie at the ends.
        area = (512, 4 * KiB, 512 * KiB, len(image))[data.ConsumeIntInRange(0, 3)]
        at = data.ConsumeIntInRange(0, min(area, len(image) - 1))
        at = len(image) - 1 - at if data.ConsumeBool() else at
        width = (1, 2, 4, 8)[data.ConsumeIntInRange(0, 3)]
        order: Literal["big", "little"] = "big" if data.ConsumeBool() else "little"
        kind = data.ConsumeIntInRange(0, 4)
        if kind == 0:
            value = data.ConsumeIntInRange(0, (1 << 8 * width) - 1)
        elif kind == 1:
            value = _NUMBERS[data.ConsumeIntInRange(0, len(_NUMBERS) - 1)]
        elif kind == 2:
            value = -_NUMBERS[data.ConsumeIntInRange(0, len(_NUMBERS) - 1)]
        elif kind == 3:  # a neighbour of what is there
            value = int.from_bytes(image[at : at + width], order) + data.ConsumeIntInRange(-8, 8)
        else:
            del image[max(1, at) :]
            continue
        image[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)
    return bytes(image)


if __name__ == "__main__":
    main()
