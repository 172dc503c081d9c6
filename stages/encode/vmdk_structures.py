"""The structures of a sparse VMDK: header, descriptor, markers, grain directories.

Source: VMware Virtual Disk Format 5.0, "Hosted Sparse Extent Header", "The Descriptor File", "Stream-Optimized
Compressed Sparse Extents".
"""

from __future__ import annotations

import struct
from typing import Literal

from pipeline.units import KiB
from stages.encode.birth import Birth

SECTOR = 512
GRAIN = 64 * KiB
GRAIN_SECTORS = GRAIN // SECTOR
TABLE_ENTRIES = 512
TABLE_LENGTH = 4 * TABLE_ENTRIES
TABLE_REACH = TABLE_ENTRIES * GRAIN  # guest bytes that one grain table describes
TABLE_SECTORS = TABLE_LENGTH // SECTOR

DESCRIPTOR_SECTOR = 1
DESCRIPTOR_SECTORS = 20  # most of it free: some programs add lines to it

# Offsets in the image are 32-bit numbers of sectors.
IMAGE_MAX = 2**32 * SECTOR

NO_DIRECTORY = 0xFFFFFFFFFFFFFFFF  # "look into the footer"

MARK_END = 0
MARK_TABLE = 1
MARK_DIRECTORY = 2
MARK_FOOTER = 3

_STREAM_FLAGS = 0x30001  # newlines can be checked, grains are compressed, there are markers
_SPARSE_FLAGS = 3  # newlines can be checked, there is a second directory

# magic, version, flags, capacity, grain size, descriptor (sector, sectors), entries of a table, directories (second,
# first), overhead, unclean shutdown, newlines, compression
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH433x")
_MARKER = struct.Struct("<QII496x")
GRAIN_HEADER = struct.Struct("<QI")

Adapter = Literal["lsilogic", "ide"]


def header(
    variant: Literal["streamOptimized", "monolithicSparse"],
    capacity: int,
    *,
    directory: int = NO_DIRECTORY,
    second_directory: int = 0,
    overhead: int = GRAIN_SECTORS,
) -> bytes:
    """The first sector; of a stream also the footer. All numbers are sectors."""
    is_stream = variant == "streamOptimized"
    return _HEADER.pack(
        b"KDMV",
        3 if is_stream else 1,  # VMware takes compressed grains from version 3 on only
        _STREAM_FLAGS if is_stream else _SPARSE_FLAGS,
        capacity,
        GRAIN_SECTORS,
        DESCRIPTOR_SECTOR,
        DESCRIPTOR_SECTORS,
        TABLE_ENTRIES,
        second_directory,
        directory,
        overhead,
        0,
        b"\n \r\n",
        1 if is_stream else 0,
    )


def descriptor(variant: str, capacity: int, *, name: str, adapter: Adapter, birth: Birth) -> bytes:
    """The text that describes the disk, padded to its sectors.

    Args:
        capacity: sectors.
        name: of the export; the extent is called so, with everything replaced that a reader could take for a path.
    """
    content_id = birth.number("vmdk content")
    if content_id >= 0xFFFFFFFE:  # these mean "none"
        content_id = 1
    heads, cylinders = (16, capacity // (16 * 63)) if adapter == "ide" else (255, -(-capacity // (255 * 63)))
    text = f"""# Disk DescriptorFile
version=1
CID={content_id:08x}
parentCID=ffffffff
createType="{variant}"

# Extent description
RW {capacity} SPARSE "{file_name(name)}.vmdk"

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "10"
ddb.geometry.cylinders = "{min(65535, cylinders)}"
ddb.geometry.heads = "{heads}"
ddb.geometry.sectors = "63"
ddb.adapterType = "{adapter}"
"""
    return text.encode("ascii").ljust(DESCRIPTOR_SECTORS * SECTOR, b"\0")


def file_name(name: str) -> str:
    """A name that is a file name everywhere, at most 80 characters; "disk" where nothing is left of it."""
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "_" for letter in name)
    return kept[:80].strip("_.") or "disk"


def marker(kind: int, sectors: int) -> bytes:
    """A sector that says what the following ones are."""
    return _MARKER.pack(sectors, 0, kind)
