"""Where each frame of a compressed image begins, so that a reader can start anywhere.

lz4 and gzip have no place for it, so it goes into the manifest. zstd streams end in a seek table that says the same.
"""

from __future__ import annotations

import base64
import binascii
import sys
import zlib
from array import array
from dataclasses import dataclass
from typing import TypeGuard

from pipeline.errors import FormatError
from pipeline.flow.facts import Fact

# Lengths of frames: 2 TiB in windows of 2 MiB are a million.
_FRAMES_MAX = 1 << 27


@dataclass(frozen=True, slots=True)
class FrameIndex:
    """The frames of a compressed image, in order. Bytes.

    Attributes:
        codec: "lz4", "zstd" or "gzip".
        window: what every frame but the last unpacks to.
        size: of the image inside.
        lengths: of each frame in the stream.
    """

    codec: str
    window: int
    size: int
    lengths: array[int]

    def to_json(self) -> dict[str, object]:
        """For a manifest; frames that are alike next to each other cost nothing."""
        return {
            "codec": self.codec,
            "window": self.window,
            "size": self.size,
            "lengths": base64.b64encode(zlib.compress(little_endian(self.lengths), 6)).decode("ascii"),
        }

    @classmethod
    def from_json(cls, value: object) -> FrameIndex:
        """Read what `to_json` wrote. Nothing is believed.

        Raises:
            FormatError: it is damaged, or contradicts itself.
        """
        if not isinstance(value, dict):
            raise _damaged("it is not a table")
        codec, window, size, packed = (value.get(name) for name in ("codec", "window", "size", "lengths"))
        if not isinstance(codec, str) or not _is_count(window) or not _is_count(size) or not window:
            raise _damaged("a size in it is wrong")
        count = -(-size // window)
        if count > _FRAMES_MAX:
            raise _damaged(f"it has {count} frames")
        inflater = zlib.decompressobj()
        try:
            data = inflater.decompress(base64.b64decode(str(packed), validate=True), 4 * count + 1)
        except (binascii.Error, zlib.error, ValueError):
            raise _damaged("its lengths can't be unpacked") from None
        if len(data) != 4 * count or not inflater.eof:
            raise _damaged("it has another number of frames than the image has windows")
        return cls(codec, window, size, from_little_endian(data))


FRAME_INDEX: Fact[FrameIndex] = Fact("frame index", FrameIndex)


def little_endian(numbers: array[int]) -> bytes:
    """4 bytes each."""
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def from_little_endian(data: bytes) -> array[int]:
    """What `little_endian` gave."""
    numbers = array("I", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _damaged(reason: str) -> FormatError:
    return FormatError(
        f"the recorded frame index can't be used: {reason}",
        operation="read index",
        hint="The manifest was damaged or written by a later version; fetch it again, or verify with that version.",
    )
