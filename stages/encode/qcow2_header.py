"""The first cluster of a qcow2 image.

Source: QCOW2 image format, "Header".
"""

from __future__ import annotations

import struct

from stages.encode.qcow2_geometry import Geometry

MAGIC = b"QFI\xfb"
VERSION = 3
HEADER_LENGTH = 112
ZSTD_BIT = 1 << 3  # incompatible feature: the compression type is not deflate
DEFLATE, ZSTD = 0, 1

# magic, version, backing file (offset, length), cluster bits, size, encryption, L1 (entries, offset), refcount table
# (offset, clusters), snapshots (count, offset), features (incompatible, compatible, autoclear), refcount order, header
# length, compression type and pad
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIB7x")


def pack_header(
    geometry: Geometry, *, l1_offset: int, table_offset: int, table_clusters: int, compression: int = DEFLATE
) -> bytes:
    """The header without what pads it to a cluster. Offsets are image bytes."""
    return _HEADER.pack(
        MAGIC,
        VERSION,
        0,
        0,
        geometry.cluster_bits,
        geometry.virtual_size,
        0,
        geometry.l1_entries,
        l1_offset,
        table_offset,
        table_clusters,
        0,
        0,
        ZSTD_BIT if compression == ZSTD else 0,
        0,
        0,
        geometry.refcount_bits.bit_length() - 1,
        HEADER_LENGTH,
        compression,
    )
