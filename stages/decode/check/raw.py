"""Check what can be checked of a raw disk (its length, and whether its partition tables fit), and of a GCE archive.

Source: UEFI Specification 2.10, section 5.2 (MBR) and 5.3 (GPT header); Google Cloud, "Import virtual disks manually".
"""

from __future__ import annotations

import struct
import zlib

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import GiB, MiB
from stages.decode.check.blocks import WINDOW, read_everything
from stages.decode.check.report import ImageInfo, Tally
from stages.decode.gce import GceImage, open_gce
from stages.decode.image import DecodedImage
from stages.decode.raw import open_raw
from stages.decode.refusal import UnsupportedError

_SECTOR = 512
_GPT = b"EFI PART"
_PROTECTIVE = 0xEE


async def check_raw(reader: RangeReader, *, deep: bool, strict: bool) -> Tally:
    """Check a raw image. As `checking.check`."""
    tally = Tally("raw", info=await raw_info(reader))
    tally.blocks = tally.data_blocks = -(-reader.size // _SECTOR)
    if reader.size % _SECTOR:
        tally.warning("the length is not whole sectors: the image may be cut short", reader.size)
    image = await open_raw(reader)
    await _check_partitions(image, tally)
    if deep:
        await read_everything(image, MiB, tally)
    return tally


async def check_gce(reader: RangeReader, *, deep: bool, strict: bool) -> Tally:
    """Check a GCE archive. As `checking.check`; unpacked to the end when deep."""
    tally = Tally("gce")
    try:
        image = await open_gce(reader)
        tally.info = _gce_info(image, reader.size)
        tally.blocks = tally.packed_blocks = image.size // _SECTOR
        if image.size % GiB:
            tally.warning(f"the disk has {image.size} bytes; the import wants whole GiB", 124)
        if deep:
            # The partition tables need both ends of the disk; what is between is unpacked on the way.
            for start in range(0, image.size, WINDOW):
                await image.read(start, min(WINDOW, image.size - start))
            await image.check_end()
            await _check_partitions(image, tally)
    except UnsupportedError:
        raise
    except FormatError as error:
        tally.stop(error)
    return tally


async def raw_info(reader: RangeReader) -> ImageInfo:
    """Its length."""
    return ImageInfo(format="raw", variant="raw", virtual_size=reader.size, file_size=reader.size)


async def gce_info(reader: RangeReader) -> ImageInfo:
    """What the archive's first header says."""
    return _gce_info(await open_gce(reader), reader.size)


def _gce_info(image: GceImage, file_size: int) -> ImageInfo:
    return ImageInfo(
        format="gce", variant="disk.raw in tar", virtual_size=image.size, file_size=file_size, compression="gzip"
    )


async def _check_partitions(image: DecodedImage, tally: Tally) -> None:
    """Whether MBR and GPT, where there are any, speak of a disk of this size."""
    if image.size < 2 * _SECTOR:
        return
    head = await image.read(0, 2 * _SECTOR)
    sectors = image.size // _SECTOR
    if head[510:512] != b"\x55\xaa":
        return
    kinds = []
    for at in range(446, 510, 16):
        kind, first, count = head[at + 4], *struct.unpack_from("<II", head, at + 8)
        kinds.append(kind)
        if kind and kind != _PROTECTIVE and first + count > sectors:
            tally.warning("a partition ends behind the end of the disk: the image may be cut short", at)
    if _PROTECTIVE in kinds:
        await _check_gpt(image, head[_SECTOR:], sectors, tally)


async def _check_gpt(image: DecodedImage, header: bytes, sectors: int, tally: Tally) -> None:
    if not _is_gpt(header):
        tally.warning("the GPT header is damaged, or the disk has sectors of 4096 bytes", _SECTOR)
        return
    (alternate,) = struct.unpack_from("<Q", header, 32)
    if alternate >= sectors:
        tally.warning("the second GPT lies behind the end of the disk: the image is cut short", _SECTOR + 32)
    elif not _is_gpt(await image.read(alternate * _SECTOR, _SECTOR)):
        tally.warning("the second GPT is damaged", alternate * _SECTOR)


def _is_gpt(header: bytes) -> bool:
    length, checksum = struct.unpack_from("<II", header, 12)
    if header[:8] != _GPT or not 92 <= length <= _SECTOR:
        return False
    return bool(zlib.crc32(header[:16] + bytes(4) + header[20:length]) == checksum)
