"""Tell the format of an image by the magic numbers at its fixed places.

What a guess finds may have been chosen by a guest: the first bytes of a raw disk are the guest's. So a probe is made
once, never of a block device, its result is recorded, and a format that was declared is never probed. Probing reads
the first 1 KiB, the last 512 bytes and, for gzip, the begin of the stream; it opens nothing that an image names.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import KiB
from stages.decode import vhd, vhdx, vmdk
from stages.decode.gce import DISK
from stages.decode.inflated import GZIP_MAGIC, InflatedStream
from stages.decode.tar import has_checksum, walk
from stages.decode.vmdk_descriptor import FIRST_LINE

_HEAD = KiB
_AT_THE_BEGIN = (
    (b"QFI\xfb", "qcow2"),
    (vmdk.MAGIC, "vmdk"),
    (vmdk.COWD_MAGIC, "vmdk"),
    (FIRST_LINE, "vmdk"),
    (vhdx.IDENTIFIER, "vhdx"),
)
# Known to be images, and not read here: never to be taken for a raw disk.
_FOREIGN = (
    (0, b"QED\0", "QED"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", "SEsparse VMDK"),
    (0, b"OOOM\0\0\0\0", "UML copy-on-write"),
    (0, b"\x28\xb5\x2f\xfd", "zstd stream"),
    (0, b"\x04\x22\x4d\x18", "LZ4 stream"),
    (0, b"\xfd7zXZ\0", "xz stream"),
    (0, b"BZh", "bzip2 stream"),
    (0, b"PK\x03\x04", "zip archive"),
)
_SUFFIXES = {
    ".qcow2": "qcow2",
    ".vhd": "vhd",
    ".vpc": "vhd",
    ".vmdk": "vmdk",
    ".vhdx": "vhdx",
    ".ova": "ova",
    ".tar.gz": "gce",
    ".tgz": "gce",
}
_RAW_SUFFIXES = (".raw", ".img", ".bin", ".dd", ".iso")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a probe found.

    Attributes:
        format: one of `opening.FORMATS`.
        note: why it is less than certain, for the user; empty where the magic is plain.
    """

    format: str
    note: str = ""


async def probe_format(reader: RangeReader, *, name_hint: str = "", is_block_device: bool = False) -> str:
    """The format's name; as `probe`."""
    return (await probe(reader, name_hint=name_hint, is_block_device=is_block_device)).format


async def probe(reader: RangeReader, *, name_hint: str = "", is_block_device: bool = False) -> Probe:
    """Tell the format of an image that nobody declared.

    Args:
        name_hint: of the file or object. Only settles what the bytes leave open; it never makes a format.
        is_block_device: the reader is one: the answer is raw, and nothing is read.
    Raises:
        FormatError: an image of a kind that is not read here, or one that its name and its bytes disagree about.
        StoreError: it can't be read.
    """
    if is_block_device:
        return Probe(format="raw", note="block devices are raw, whatever their guest wrote")
    head = await reader.read(0, min(_HEAD, reader.size))
    for magic, format in _AT_THE_BEGIN:
        if head.startswith(magic):
            return Probe(format=format)
    for at, magic, name in _FOREIGN:
        if head[at:].startswith(magic):
            raise _unclear(f"this looks like a {name}, which is not read here")
    if head.startswith(GZIP_MAGIC):
        return await _probe_gzip(reader)
    if head[257:262] == b"ustar" and has_checksum(head[:512]):
        return await _probe_tar(reader)
    name = name_hint.lower()
    footer = await _probe_vhd(reader, head)
    if footer is not None and not (footer.note and name.endswith(_RAW_SUFFIXES)):
        return footer
    expected = next((format for suffix, format in _SUFFIXES.items() if name.endswith(suffix)), None)
    if expected is not None:
        raise _unclear(f"it is named like a {expected} image, but does not look like one: it may be cut short")
    note = "its last sector looks like the footer of a fixed VHD" if footer else "no other format's magic was found"
    return Probe(format="raw", note=note)


async def _probe_vhd(reader: RangeReader, head: bytes) -> Probe | None:
    """A dynamic VHD begins with its footer; a fixed one only ends with it, and so may a raw disk."""
    if reader.size < vhd.OLD_FOOTER:
        return None
    try:
        layout = await vhd.read_layout(reader)
    except FormatError:
        # Damaged, or a kind that is refused: opening it says which. At the begin the magic is plain.
        return Probe(format="vhd") if head.startswith(vhd.COOKIE) else None
    if layout.header is not None and head.startswith(vhd.COOKIE):
        return Probe(format="vhd")
    return Probe(
        format="vhd", note="a raw disk whose last sector holds a VHD footer would look the same; declare its format"
    )


async def _probe_gzip(reader: RangeReader) -> Probe:
    try:
        async with aclosing(walk(InflatedStream(reader, "gce"), "gce")) as members:
            member = await anext(members, None)
    except FormatError:
        member = None
    if member is None or member.name.removeprefix("./") != DISK:
        raise _unclear(f"this is a gzip stream, but no archive that begins with {DISK}")
    return Probe(format="gce")


async def _probe_tar(reader: RangeReader) -> Probe:
    async with aclosing(walk(reader, "ova")) as members:
        async for member in members:
            if member.name.lower().endswith(".ovf"):
                return Probe(format="ova")
    raise _unclear("this is a tar archive without the description (.ovf) of an OVA")


def _unclear(reason: str) -> FormatError:
    return FormatError(
        reason, operation="probe", hint="If you know better, declare the format; raw takes the bytes as they are."
    )
