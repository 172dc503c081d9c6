"""Compress the image into independent zstd frames that end in a seek table.

Source: RFC 8878, sections 3.1.1 and 3.1.2; Zstandard Seekable Format 0.1.0, "Seek_Table_Footer", "Seek_Table_Entries".
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.flow.stage import PIECES_IN_SEQUENCE, Layout, StageContext, StageSpec, option
from pipeline.units import MiB
from stages.compress.frames import FrameCompressor, wrap_layout
from stages.compress.index import FRAME_INDEX, FrameIndex
from stages.encode.codecs import Codec, Level

_SKIPPABLE_MAGIC = 0x184D2A5E
_SEEKABLE_MAGIC = 0x8F92EAB1
_HEADER = struct.Struct("<II")  # magic, length of what follows
_ENTRY = 8  # two 32-bit numbers: bytes in the stream, bytes unpacked
_FOOTER = struct.Struct("<IBI")  # frames, descriptor (no checksums in the table: each frame has its own), magic
_ENTRIES_AT_ONCE = MiB // _ENTRY


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    level: Literal["fast", "small"] = option(
        "fast", doc="fast is zstd level 1, small level 3: a twentieth smaller, at two thirds of the speed."
    )


def zstd_frame(level: Level, window: int) -> Codec:
    """One frame with content size and checksum: level 1 or level 3."""
    import zstandard

    number = 1 if level == "fast" else 3
    local = threading.local()  # a compressor must not be used by two threads at once

    def compress(data: memoryview | bytes) -> bytes:
        compressor: zstandard.ZstdCompressor | None = getattr(local, "compressor", None)
        if compressor is None:
            parameters = zstandard.ZstdCompressionParameters.from_level(
                number, source_size=window, write_content_size=1, write_checksum=1, write_dict_id=0
            )
            compressor = local.compressor = zstandard.ZstdCompressor(compression_params=parameters)
        return compressor.compress(data)

    library = ".".join(map(str, zstandard.ZSTD_VERSION))
    return Codec(f"zstd {library} level {number} with checksum", compress)


def seek_table(index: FrameIndex) -> Iterator[bytes]:
    """The skippable frame behind the last frame, in parts."""
    import numpy

    frames = len(index.lengths)
    yield _HEADER.pack(_SKIPPABLE_MAGIC, frames * _ENTRY + _FOOTER.size)
    for start in range(0, frames, _ENTRIES_AT_ONCE):
        lengths = index.lengths[start : start + _ENTRIES_AT_ONCE]
        entries = numpy.empty((len(lengths), 2), "<u4")
        entries[:, 0] = lengths
        entries[:, 1] = index.window
        if start + len(lengths) == frames:
            entries[-1, 1] = index.size - (frames - 1) * index.window
        yield entries.tobytes()
    yield _FOOTER.pack(frames, 0, _SEEKABLE_MAGIC)


def build(options: Options, context: StageContext) -> FrameCompressor:
    """The compressor."""
    return FrameCompressor("zstd", zstd_frame(options.level, context.window), context, table=seek_table)


def wrap(options: Options, layout: Layout, window: int) -> Layout:
    """How long the stream can get."""

    def table_max(frames: int) -> int:
        return _HEADER.size + frames * _ENTRY + _FOOTER.size

    return wrap_layout(layout, window, codec="zstd", table_max=table_max)


SPEC = StageSpec(
    name="compress.zstd",
    summary="Compress the image into independent zstd frames with a seek table, on all cores; `zstd -d` unpacks it.",
    options=Options,
    takes=PIECES_IN_SEQUENCE,
    gives=PIECES_IN_SEQUENCE,
    build=build,
    wrap=wrap,
    provides=(FRAME_INDEX,),
)
