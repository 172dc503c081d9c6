"""Compress the image into independent LZ4 frames.

Source: LZ4 Frame Format Description, "General Structure of LZ4 Frame format", "Frame Concatenation".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.flow.stage import PIECES_IN_SEQUENCE, Layout, StageContext, StageSpec, option
from stages.compress.frames import FrameCompressor, wrap_layout
from stages.compress.index import FRAME_INDEX
from stages.encode.codecs import Codec, Level


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    level: Literal["fast", "small"] = option(
        "fast", doc="small is LZ4 HC: a tenth to a fifth smaller, at an eighth of the speed; compress.zstd beats it."
    )


def lz4_frame(level: Level) -> Codec:
    """One frame with content size and checksum, its block as long as the window: level 1, or HC level 3."""
    from lz4 import frame, library_version_string

    number = 0 if level == "fast" else 3

    def compress(window: memoryview | bytes) -> bytes:
        made: bytes = frame.compress(
            window,
            compression_level=number,
            block_size=frame.BLOCKSIZE_MAX4MB,
            block_linked=False,
            content_checksum=True,
            store_size=True,
        )
        return made

    return Codec(f"lz4 {library_version_string()} level {number}", compress)


def build(options: Options, context: StageContext) -> FrameCompressor:
    """The compressor."""
    return FrameCompressor("lz4", lz4_frame(options.level), context)


def wrap(options: Options, layout: Layout, window: int) -> Layout:
    """How long the stream can get."""
    return wrap_layout(layout, window, codec="lz4")


SPEC = StageSpec(
    name="compress.lz4",
    summary="Compress the image into independent LZ4 frames, on all cores; `lz4 -d` unpacks the stream.",
    options=Options,
    takes=PIECES_IN_SEQUENCE,
    gives=PIECES_IN_SEQUENCE,
    build=build,
    wrap=wrap,
    provides=(FRAME_INDEX,),
)
