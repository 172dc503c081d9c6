"""Compress the image into independent gzip members.

Source: RFC 1952, section 2.2 (members follow each other without a gap).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.flow.stage import PIECES_IN_SEQUENCE, Layout, StageContext, StageSpec, option
from stages.compress.frames import FrameCompressor, wrap_layout
from stages.compress.index import FRAME_INDEX
from stages.encode.codecs import gzip_member


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    level: Literal["fast", "small"] = option(
        "fast", doc="small takes three to four times as long for a stream that is a twelfth smaller."
    )


def build(options: Options, context: StageContext) -> FrameCompressor:
    """The compressor."""
    return FrameCompressor("gzip", gzip_member(options.level), context)


def wrap(options: Options, layout: Layout, window: int) -> Layout:
    """How long the stream can get."""
    return wrap_layout(layout, window, codec="gzip")


SPEC = StageSpec(
    name="compress.gzip",
    summary="Compress the image into independent gzip members, on all cores; `gzip -d` unpacks the stream.",
    options=Options,
    takes=PIECES_IN_SEQUENCE,
    gives=PIECES_IN_SEQUENCE,
    build=build,
    wrap=wrap,
    provides=(FRAME_INDEX,),
)
