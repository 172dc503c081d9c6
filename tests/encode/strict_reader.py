"""A qcow2 reader for tests that forgives nothing. It shares no code with the encoder or with stages/decode."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import zstandard


class StrictReader:
    """Reads guest clusters of an image file, and the fields of its header as numbers."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.length = path.stat().st_size
        head = self.file.read(112)
        names = "magic version backing backing_length cluster_bits size crypt l1_entries l1_offset table_offset"
        names += " table_clusters snapshots snapshots_offset incompatible compatible autoclear refcount_order"
        names += " header_length kind"
        self.header = dict(zip(names.split(), struct.unpack(">IIQIIQIIQQIIQQQQIIB7x", head), strict=True))
        self.cluster = 1 << self.header["cluster_bits"]
        assert self.length % self.cluster == 0

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def at(self, offset: int, length: int) -> bytes:
        """Image bytes, all of them."""
        assert offset + length <= self.length
        self.file.seek(offset)
        data = self.file.read(length)
        assert len(data) == length
        return data

    def entry(self, guest: int) -> int:
        """The L2 entry of the cluster at a guest offset; 0 where there is no table."""
        number = guest // self.cluster
        index, inner = divmod(number, self.cluster // 8)
        assert index < self.header["l1_entries"]
        (l1,) = struct.unpack(">Q", self.at(self.header["l1_offset"] + 8 * index, 8))
        if l1 == 0:
            return 0
        table = l1 ^ 1 << 63
        assert table % self.cluster == 0
        assert 0 < table < self.length
        (entry,) = struct.unpack(">Q", self.at(table + 8 * inner, 8))
        return int(entry)

    def read(self, guest: int) -> bytes:
        """The cluster at a guest offset."""
        entry = self.entry(guest)
        if entry == 0:
            return bytes(self.cluster)
        if not entry >> 62 & 1:
            assert entry >> 63
            offset = entry ^ 1 << 63
            assert offset % self.cluster == 0
            return self.at(offset, self.cluster)
        assert not entry >> 63
        shift = 62 - (self.header["cluster_bits"] - 8)
        offset = entry & (1 << shift) - 1
        sectors = (entry ^ 1 << 62) >> shift
        stream = self.at(offset, (sectors + 1) * 512 - offset % 512)
        if self.header["kind"]:
            data = zstandard.ZstdDecompressor().decompressobj().decompress(stream)
        else:
            inflate = zlib.decompressobj(-12)
            data = inflate.decompress(stream)
            assert inflate.eof
            used = len(stream) - len(inflate.unused_data)
            assert (offset + used - 1) // 512 == offset // 512 + sectors
        assert len(data) == self.cluster
        return data
