"""Disks as letters, one a block: `A` data, `B` other data, `0` zeros that are stored, `-` a hole."""

from __future__ import annotations

import os
import random
from pathlib import Path

from pipeline.units import MiB


def letter_bytes(letter: str, length: int) -> bytes:
    """The bytes of one block: incompressible and the same for the same letter; zeros for `0` and `-`."""
    if letter in "0-":
        return bytes(length)
    return random.Random(letter).randbytes(length)


def write_disk(path: Path, letters: str, block: int = MiB, tail: int = 0) -> Path:
    """A raw image file of these blocks, `tail` more bytes of data at the end; holes are real holes."""
    with open(path, "wb") as file:
        for index, letter in enumerate(letters):
            if letter != "-":
                file.seek(index * block)
                file.write(letter_bytes(letter, block))
        file.truncate(len(letters) * block)
        if tail:
            file.seek(0, os.SEEK_END)
            file.write(letter_bytes("tail", tail))
    return path
