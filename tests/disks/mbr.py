"""A master boot record with one bootable Linux partition, written without any partitioning tool.

Source: UEFI Specification 2.10, section 5.2.1 "Legacy Master Boot Record (MBR)".
"""

from __future__ import annotations

import struct
from pathlib import Path

SECTOR = 512
PARTITION_START = 1 << 20
"""Where the partition begins, in bytes: 1 MiB, as every partitioning tool of today does."""


def write_mbr(path: Path, disk_size: int, *, disk_id: int = 0x5EED0001) -> None:
    """Write the 512 bytes at the start of the image. The partition reaches from 1 MiB to the end of the disk."""
    record = bytearray(SECTOR)
    struct.pack_into("<I", record, 440, disk_id)
    # CHS fields hold their largest value, which says "see the LBA fields".
    chs = b"\xfe\xff\xff"
    sectors = (disk_size - PARTITION_START) // SECTOR
    struct.pack_into("<B3sB3sII", record, 446, 0x80, chs, 0x83, chs, PARTITION_START // SECTOR, sectors)
    record[510:512] = b"\x55\xaa"
    with path.open("r+b") as image:
        image.write(record)
