"""Codecs for single clusters, grains and windows: deflate in its three framings, and zstd, each a stream of its own.

Source: QCOW2 image format, "Compressed Clusters Descriptor"; RFC 1950; RFC 1951; RFC 1952; RFC 8878.

Raw deflate keeps to a window of 4 KiB. The specification of qcow2 names no window, but readers inflate with -12, and
a stream that looks further back breaks all of them but the most lenient.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.units import KiB

Level = Literal["fast", "small"]

WINDOW_BITS = 12

# What zstd's "fast" adds to level 1: a larger hash table finds more in a cluster of 64 KiB. Measured on shared objects
# and text: 0.9 % smaller and 3 % slower than plain level 1, whose images are 4.3 % larger than level 3 (so near to the
# 5 % that we promise that other disks could break it). 16 gains 0.1 % more and costs 1 % more.
_FAST_HASH_LOG = 15
_FAST_HASH_FROM = 64 * KiB


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to compress a cluster.

    Attributes:
        name: codec, level and library version.
        compress: one whole cluster to one stream that is complete by itself; may be longer than the cluster.
            Threads: any, several at once.
    """

    name: str
    compress: Callable[[memoryview | bytes], bytes]

    def identity(self) -> str:
        """The name and a checksum of what the codec makes of a fixed sample.

        Two codecs with one identity give the same bytes: a library may choose other code for another CPU, and a
        version number does not tell that.
        """
        return f"{self.name} {hashlib.sha256(self.compress(_sample())).hexdigest()[:16]}"


def deflate(level: Level) -> Codec:
    """Raw deflate with a 4 KiB window: ISA-L level 1, or zlib-ng level 4.

    Measured on clusters of a Debian system against zlib level 6, which QEMU uses: zlib-ng level 4 is 3.4 times as fast
    and its streams are 3.4 % larger; level 6 is 2.9 times as fast, 2.1 % larger; level 3 is 4.5 % larger.
    """
    if level == "fast":
        import isal
        from isal import igzip_lib

        igzip = igzip_lib.compress
        raw, memory = igzip_lib.COMP_DEFLATE, igzip_lib.MEM_LEVEL_LARGE

        def compress(cluster: memoryview | bytes) -> bytes:
            packed: bytes = igzip(cluster, 1, raw, memory, WINDOW_BITS)
            return packed

        return Codec(f"deflate-12 isal {isal.__version__} level 1", compress)

    import zlib_ng
    from zlib_ng import zlib_ng as ng

    def compress_small(cluster: memoryview | bytes) -> bytes:
        stream = ng.compressobj(4, ng.DEFLATED, -WINDOW_BITS, 9)
        first: bytes = stream.compress(cluster)
        rest: bytes = stream.flush()
        return first + rest

    return Codec(f"deflate-12 zlib-ng {zlib_ng.__version__} ({ng.ZLIBNG_VERSION}) level 4", compress_small)


def zlib_stream(level: Level) -> Codec:
    """Deflate in zlib framing with its full window: ISA-L level 2, or libdeflate level 4.

    Measured on grains of 64 KiB of a Debian system against zlib level 6, which QEMU uses, per thread: ISA-L is 14 times
    as fast and its streams are 9 % larger; libdeflate is 4 times as fast and its streams are 1 % larger. ISA-L level 1
    is no faster and its streams are 10 % larger; libdeflate level 6 gains 2 % and takes twice as long.
    """
    if level == "fast":
        import isal
        from isal import igzip_lib

        return Codec(f"zlib isal {isal.__version__} level 2", _igzip(igzip_lib.COMP_ZLIB))
    import deflate as libdeflate

    return Codec(
        f"zlib libdeflate ({libdeflate.__version__}) level 4", lambda data: bytes(libdeflate.zlib_compress(data, 4))
    )


def gzip_member(level: Level) -> Codec:
    """A whole gzip member without name and time, by the same libraries and levels as `zlib_stream`."""
    if level == "fast":
        import isal
        from isal import igzip_lib

        return Codec(f"gzip isal {isal.__version__} level 2", _igzip(igzip_lib.COMP_GZIP))
    import deflate as libdeflate

    return Codec(
        f"gzip libdeflate ({libdeflate.__version__}) level 4", lambda data: bytes(libdeflate.gzip_compress(data, 4))
    )


def _igzip(framing: int) -> Callable[[memoryview | bytes], bytes]:
    from isal import igzip_lib

    igzip, memory = igzip_lib.compress, igzip_lib.MEM_LEVEL_LARGE

    def compress(data: memoryview | bytes) -> bytes:
        packed: bytes = igzip(data, 2, framing, memory, 15)
        return packed

    return compress


def zstd(level: Level, cluster_size: int) -> Codec:
    """One zstd frame a cluster, with content size and without checksum: level 1 or level 3."""
    import zstandard

    number = 1 if level == "fast" else 3
    tuned = {"hash_log": _FAST_HASH_LOG} if level == "fast" and cluster_size >= _FAST_HASH_FROM else {}
    local = threading.local()  # a compressor must not be used by two threads at once

    def compress(cluster: memoryview | bytes) -> bytes:
        compressor: zstandard.ZstdCompressor | None = getattr(local, "compressor", None)
        if compressor is None:
            parameters = zstandard.ZstdCompressionParameters.from_level(
                number, source_size=cluster_size, write_content_size=1, write_checksum=0, write_dict_id=0, **tuned
            )
            compressor = local.compressor = zstandard.ZstdCompressor(compression_params=parameters)
        return compressor.compress(cluster)

    library = ".".join(map(str, zstandard.ZSTD_VERSION))
    extra = "".join(f" {key} {value}" for key, value in tuned.items())
    return Codec(f"zstd {library} level {number}{extra}", compress)


def _sample() -> bytes:
    """64 KiB with noise, a skewed alphabet and repeats near and far, the same on every machine."""
    noise = hashlib.shake_256(b"codec self-test").digest(16 * KiB)
    skewed = bytes(value & value >> 4 for value in noise)
    return noise + skewed + noise[1000:9192] + skewed[-3000:] * 8 + bytes(192)
