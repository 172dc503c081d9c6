"""Damage that a filesystem's checker must find."""

from __future__ import annotations

import struct
from pathlib import Path


def flip_block_bitmap(path: Path, offset: int = 0) -> None:
    """Flip the bits of one byte of the first block bitmap of the ext filesystem at this offset of a file.

    Source: Linux, Documentation/filesystems/ext4: s_first_data_block at 0x14, s_log_block_size at 0x18; the block group
    descriptors begin in the block behind the superblock's, with bg_block_bitmap_lo.
    """
    with path.open("r+b") as file:
        file.seek(offset + 1024 + 0x14)
        first, log = struct.unpack("<II", file.read(8))
        block = 1024 << log
        file.seek(offset + (first + 1) * block)
        (bitmap,) = struct.unpack("<I", file.read(4))
        file.seek(offset + bitmap * block + 4)
        flipped = bytes(255 - byte for byte in file.read(1))
        file.seek(offset + bitmap * block + 4)
        file.write(flipped)
