"""Readers that share no code with the encoders: qemu-img, 7zz, and the letters themselves."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pipeline.flow.stage import StageSpec
from tests.chains import export as run_chain
from tests.chains import write_toml
from tests.encode.lettered import WINDOW, Export, LetterDisk, export


def write_raw(source: LetterDisk, path: Path, virtual_size: int) -> Path:
    """The disk as a raw file, with the zeros that rounding up adds."""
    source.write(path)
    with path.open("r+b") as file:
        file.truncate(virtual_size)
    return path


def compare(raw: Path, image: Path, format: str) -> None:
    """`qemu-img compare` finds the same bytes and the same size."""
    command = ["qemu-img", "compare", "-f", "raw", "-F", format, str(raw), str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr


def check(image: Path, format: str) -> None:
    """`qemu-img check` finds nothing, where it knows how to look."""
    if format == "vpc":
        return
    command = ["qemu-img", "check", "--output=json", "-f", format, str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["check-errors"] == 0


def unpack_7zz(raw: Path, image: Path, kind: str) -> None:
    """7zz unpacks the same disk."""
    with tempfile.TemporaryFile() as unpacked:
        command = ["7zz", "x", "-so", f"-t{kind}", str(image)]
        done = subprocess.run(command, stdout=unpacked, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        unpacked.seek(0)
        with raw.open("rb") as file:
            assert hashlib.file_digest(unpacked, "sha256").digest() == hashlib.file_digest(file, "sha256").digest()


def prove(
    spec: StageSpec,
    options: Any,
    source: LetterDisk,
    format: str,
    *,
    head_minimum: int = 0,
    window: int = WINDOW,
    kind: str = "",
) -> Export:
    """Export a disk and have its image judged.

    Args:
        format: QEMU's name for it.
        kind: 7-Zip's name for it; "" leaves that out.
    """
    made = export(spec, options, source, head_minimum=head_minimum, window=window)
    assert made.guest_bytes == source.size
    assert made.length <= made.layout.image_bytes_max
    assert (made.leaked_buffers, made.leaked_bytes) == (0, 0)
    with tempfile.TemporaryDirectory() as folder:
        image = made.write(Path(folder, "image"))
        raw = write_raw(source, Path(folder, "disk.raw"), made.layout.virtual_size)
        check(image, format)
        compare(raw, image, format)
        if kind:
            unpack_7zz(raw, image, kind)
    return made


async def run_to_file(folder: Path, encode: str, source: LetterDisk) -> Path:
    """A whole chain: the disk from a file, through the encoder (`name; option = value`), into a file."""
    source.write(folder / "disk.raw")
    toml = write_toml(
        folder / "export.toml",
        f'read.disk; path = "{folder / "disk.raw"}"',
        "checksum.guest",
        "sparse.zeros",
        encode,
        f'write.file; path = "{folder / "image"}"',
    )
    await run_chain(toml)
    return folder / "image"
