"""Check an image of any format, and tell what it says about itself. By ranges; nothing is written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pipeline.flow.items import RangeReader
from stages.decode.check.report import CheckReport, ImageInfo, Tally
from stages.decode.opening import ALIASES, FORMATS, check_named
from stages.decode.refusal import UnsupportedError
from stages.decode.vmdk import Extents


async def check(
    reader: RangeReader,
    format: str,
    *,
    deep: bool = False,
    strict: bool = False,
    extents: Extents | None = None,
    member: str = "",
    is_overlay: bool = False,
) -> CheckReport:
    """Check every invariant of an image's format.

    Reads headers and tables only; memory is bounded whatever the image claims (about 100 MiB for the largest).

    Args:
        format: one of `opening.FORMATS`.
        deep: also read and unpack every stored block, and compare digests where the image has them.
        strict: also what only our own encoders promise: order, no leftovers. Not for images of others.
        extents, member: as in `opening.open_image`.
        is_overlay: the caller has what a qcow2 image lies on. Only the image itself is checked either way.
    Returns:
        The findings. Damage is a finding, never an error.
    Raises:
        UnsupportedError: the image uses what is not read here, so that it can't be checked.
        StoreError: it can't be read.
    Cancellation: at once, but for a read or the unpacking of a window that is under way.
    """
    format = ALIASES.get(format, format)
    more: dict[str, object] = {}
    check_named(format, extents=extents, member=member, is_overlay=is_overlay)
    if extents:
        more["extents"] = extents
    if member:
        more["member"] = member
    if is_overlay:
        more["is_overlay"] = True
    tally = await _checker(format)(reader, deep=deep, strict=strict, **more)
    return tally.report(deep=deep)


async def image_info(
    reader: RangeReader, format: str, *, extents: Extents | None = None, member: str = ""
) -> ImageInfo:
    """What an image says about itself: a few small reads.

    Raises:
        FormatError: not that format, damaged, hostile, or using a feature that is not read here.
        StoreError: it can't be read.
    """
    from stages.decode.check import ova, qcow2, raw, vhd, vhdx, vmdk

    format = ALIASES.get(format, format)
    _checker(format)
    if format == "vmdk":
        return await vmdk.vmdk_info(reader, extents)
    if format == "ova":
        return await ova.ova_info(reader, member)
    tellers: dict[str, Callable[[RangeReader], Awaitable[ImageInfo]]] = {
        "raw": raw.raw_info,
        "qcow2": qcow2.qcow2_info,
        "vhd": vhd.vhd_info,
        "vhdx": vhdx.vhdx_info,
        "gce": raw.gce_info,
    }
    return await tellers[format](reader)


def _checker(format: str) -> Callable[..., Awaitable[Tally]]:
    # Here, so that numpy is only loaded by who checks.
    from stages.decode.check import ova, qcow2, raw, vhd, vhdx, vmdk

    checkers: dict[str, Callable[..., Awaitable[Tally]]] = {
        "raw": raw.check_raw,
        "qcow2": qcow2.check_qcow2,
        "vhd": vhd.check_vhd,
        "vmdk": vmdk.check_vmdk,
        "vhdx": vhdx.check_vhdx,
        "ova": ova.check_ova,
        "gce": raw.check_gce,
    }
    if format not in checkers:
        raise UnsupportedError(
            f"images of the format {format} can't be checked",
            operation="check",
            hint=f"Known are: {', '.join(FORMATS)}.",
        )
    return checkers[format]
