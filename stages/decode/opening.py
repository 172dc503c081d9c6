"""Open an image by the name of its format. A new format is one line here, and its magic in `probing`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pipeline.flow.items import RangeReader
from stages.compress.index import FrameIndex
from stages.decode.framed import CODECS, open_framed
from stages.decode.gce import open_gce
from stages.decode.image import DecodedImage
from stages.decode.ova import open_ova
from stages.decode.overlay import OverlayImage
from stages.decode.qcow2 import open_qcow2
from stages.decode.raw import open_raw
from stages.decode.refusal import UnsupportedError, misnamed
from stages.decode.vhd import open_vhd
from stages.decode.vhdx import open_vhdx
from stages.decode.vmdk import Extents, open_vmdk

# Reads and checks an image's header: `opener(reader, strict=...)`.
Opener = Callable[..., Awaitable[DecodedImage]]

_OPENERS: dict[str, Opener] = {
    "raw": open_raw,
    "qcow2": open_qcow2,
    "vhd": open_vhd,
    "vmdk": open_vmdk,
    "vhdx": open_vhdx,
    "ova": open_ova,
    "gce": open_gce,
}
# The names that other tools have for the same formats.
ALIASES = {"vpc": "vhd"}

FORMATS = tuple(_OPENERS)


async def open_image(
    reader: RangeReader,
    format: str,
    *,
    strict: bool = False,
    extents: Extents | None = None,
    member: str = "",
    index: FrameIndex | None = None,
    backing: DecodedImage | None = None,
) -> DecodedImage:
    """Open an image for reading, also one that a compressor packed: "raw+lz4" is a raw image in lz4 frames.

    Args:
        reader: borrowed; must stay open as long as the image is used.
        format: one of `FORMATS`, or one of them, "+" and a codec. It is never guessed here: a guest could choose what
            a guess finds.
        strict: refuse whatever our own encoders never write. For verification.
        extents: the files of a VMDK that has several, in the order of its descriptor or by the names in it. Borrowed.
        member: the disk inside of an OVA that has several.
        backing: what a qcow2 image that is an overlay lies on. Borrowed; a name inside the image is never looked at.
        index: of the frames, where a codec is named; lz4 and gzip can't be read without.
    Raises:
        FormatError: not that format, damaged, hostile, or using a feature that is not read here.
        StoreError: the image can't be read.
    """
    format, _, codec = format.partition("+")
    if codec:
        reader = await open_framed(reader, codec, index)
    format = ALIASES.get(format, format)
    opener = _OPENERS.get(format)
    if opener is None:
        raise UnsupportedError(
            f"images of the format {format} can't be read", operation="open", hint=f"Known are: {', '.join(FORMATS)}."
        )
    check_named(format, extents=extents, member=member, is_overlay=backing is not None)
    if backing is not None:
        return OverlayImage(await open_qcow2(reader, strict=strict, is_overlay=True), backing)
    more = {"extents": extents} if extents else {"member": member} if member else {}
    return await opener(reader, strict=strict, **more)


def check_named(format: str, *, extents: Extents | None, member: str, is_overlay: bool) -> None:
    """Refuse other files than the format has. Raises UnsupportedError."""
    if extents and format != "vmdk":
        raise misnamed(format, f"a {format} image has no extents", hint="Leave the extents out.")
    if member and format != "ova":
        raise misnamed(format, f"a {format} image has no members", hint="Leave the member out.")
    if is_overlay and format != "qcow2":
        raise misnamed(format, f"a {format} image is not read with a backing image")


def is_known(format: str) -> bool:
    """Whether images of this format, as in `Layout.format`, can be read here."""
    inner, packed, codec = format.partition("+")
    return inner in FORMATS and (not packed or codec in CODECS)
