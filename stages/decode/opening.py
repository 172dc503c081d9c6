"""Open an image by the name of its format. A new format is one line here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from stages.decode.image import DecodedImage
from stages.decode.qcow2 import open_qcow2
from stages.decode.raw import open_raw


class Opener(Protocol):
    """Reads and checks an image's header."""

    def __call__(self, reader: RangeReader, *, strict: bool = False) -> Awaitable[DecodedImage]: ...


_OPENERS: dict[str, Callable[..., Awaitable[DecodedImage]]] = {
    "raw": open_raw,
    "qcow2": open_qcow2,
}

FORMATS = tuple(_OPENERS)


async def open_image(reader: RangeReader, format: str, *, strict: bool = False) -> DecodedImage:
    """Open an image for reading.

    Args:
        reader: borrowed; must stay open as long as the image is used.
        format: one of `FORMATS`. It is never guessed: a guest could choose what a guess finds.
        strict: refuse whatever our own encoders never write. For verification.
    Raises:
        FormatError: not that format, damaged, hostile, or using a feature that is not read here.
        StoreError: the image can't be read.
    """
    opener: Opener | None = _OPENERS.get(format)
    if opener is None:
        raise FormatError(
            f"images of the format {format} can't be read", operation="open", hint=f"Known are: {', '.join(FORMATS)}."
        )
    return await opener(reader, strict=strict)
