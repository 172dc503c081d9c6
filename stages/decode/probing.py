"""Tell the format of an image by the magic numbers at its fixed places.

What a guess finds may have been chosen by a guest: the first bytes of a raw disk are the guest's. So a probe is made
once, never of a block device, its result is recorded, and a format that was declared is never probed. Probing reads
the first 1 KiB, the last 512 bytes and, of a packed stream, its begin; it opens nothing that an image names.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import KiB
from stages.decode import vhd, vhdx, vmdk
from stages.decode.gce import DISK
from stages.decode.refusal import UnsupportedError
from stages.decode.tar import RECORD, has_checksum, walk
from stages.decode.unpacked import GZIP_MAGIC, UnpackedStream
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
    (0, b"\x02\x21\x4c\x18", "LZ4 stream of the old kind"),
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
_CODECS = ((GZIP_MAGIC, "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\x04\x22\x4d\x18", "lz4"))
_SKIPPABLE_FIRST = tuple(bytes([0x50 + number]) for number in range(16))
_PACKED_SUFFIXES = (".gz", ".zst", ".zstd", ".lz4")
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
        UnsupportedError: an image of a kind that is not read here, or one that its name and its bytes disagree about.
        FormatError: an archive or a packed stream is damaged at its begin.
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
    for magic, codec in _CODECS:
        if head.startswith(magic) or (codec == "zstd" and _is_skippable(head)):
            return await _probe_packed(reader, codec, name_hint.lower())
    if head[257:262] == b"ustar" and has_checksum(head[:512]):
        return await _probe_tar(reader)
    name = name_hint.lower()
    footer = await _probe_vhd(reader, head)
    if footer is not None and not (footer.note and name.endswith(_RAW_SUFFIXES)):
        return footer
    expected = next((format for suffix, format in _SUFFIXES.items() if name.endswith(suffix)), None)
    if expected is None and name.endswith(_PACKED_SUFFIXES):
        expected = "packed"
    if expected is not None:
        raise _unclear(f"it is named like a {expected} image, but does not look like one: it may be cut short")
    note = "its last sector looks like the footer of a fixed VHD" if footer else "no other format's magic was found"
    return Probe(format="raw", note=note)


def _is_skippable(head: bytes) -> bool:
    """Whether it begins with a frame that readers pass over, as parallel compressors write. RFC 8878, section 3.1.2."""
    return head[:1] in _SKIPPABLE_FIRST and head[1:4] == b"\x2a\x4d\x18"


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


async def _probe_packed(reader: RangeReader, codec: str, name: str) -> Probe:
    """What the begin of a packed stream unpacks to: a GCE archive, or an image by its magic, or by its name a disk."""
    stream = UnpackedStream(reader, codec, codec)
    try:
        # Shorter ones than a record are no disk.
        head = await stream.read(0, RECORD)
    except FormatError as error:
        raise FormatError(
            f"this looks like a {codec} stream, but does not unpack: {error.message}",
            operation="probe",
            hint="It is damaged or incomplete: fetch or export it again. If it is a disk as it is, declare raw.",
            **error.context,
        ) from None
    if codec == "gzip" and has_checksum(head):
        async with aclosing(walk(stream, "gce")) as members:
            member = await anext(members, None)
        if member is not None and member.name.removeprefix("./") == DISK:
            return Probe(format="gce")
    note = f"packed with {codec}"
    for magic, format in _AT_THE_BEGIN:
        if head.startswith(magic):
            return Probe(format=f"{format}+{codec}", note=note)
    if head.startswith(vhd.COOKIE):
        return Probe(format=f"vhd+{codec}", note=note)
    inner = next((name.removesuffix(one) for one in _PACKED_SUFFIXES if name.endswith(one)), "")
    if inner.endswith(_RAW_SUFFIXES):
        return Probe(format=f"raw+{codec}", note=f"{note}, and no format's magic was found inside")
    raise _unclear(
        f"this is a {codec} stream, but neither its begin nor its name says of what",
        hint=f"If it is a disk as it is, declare raw+{codec}.",
    )


async def _probe_tar(reader: RangeReader) -> Probe:
    async with aclosing(walk(reader, "ova")) as members:
        async for member in members:
            if member.name.lower().endswith(".ovf"):
                return Probe(format="ova")
    raise _unclear("this is a tar archive without the description (.ovf) of an OVA")


def _unclear(reason: str, *, hint: str = "") -> UnsupportedError:
    usual = "If you know better, declare the format; raw takes the bytes as they are."
    return UnsupportedError(reason, operation="probe", hint=hint or usual)
