"""One damaged or hostile image for every invariant of every format, with the verdict that is expected of the checker.

The numbers in `rule` are those of the checker's page (docs/checker.md), which `agreement` writes from this table.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from awscrt.checksums import crc32c

from pipeline.units import GiB, KiB, MiB
from tests.decode.images import Patched, mixed_disk, qemu_convert
from tests.decode.made import Fields, made_by_qemu, made_gce, made_ova, made_stream, made_tar

Expected = Literal["corrupt", "leaks", "warning", "refused"]
DISK = mixed_disk(3 * MiB + 5 * 512, seed=3)
COPIED, COMPRESSED = 1 << 63, 1 << 62


@dataclass(frozen=True, slots=True)
class Mutation:
    """A change of a good image.

    Attributes:
        base: which good image, as in `good_images`; begins with the format.
        change: applied to the bytes in place.
        expected: `refused` where the image uses what is not read here, else the checker's verdict; a `warning`
            leaves the verdict clean.
        finding: part of the message.
        reads: a reader takes the image all the same, by accident or on purpose.
        mode: what the checker must look at to find it.
    """

    rule: str
    base: str
    name: str
    change: Callable[[bytearray], None]
    expected: Expected
    finding: str
    reads: bool = False
    mode: Literal["quick", "deep", "strict"] = "quick"

    @property
    def format(self) -> str:
        """Of the image."""
        return self.base.split()[0]


def good_images(folder: Path) -> dict[str, bytes]:
    """The images that are damaged, by name."""

    def of_qemu(format: str, options: str = "") -> bytes:
        return made_by_qemu(folder / "made", DISK, format, options)[0]

    stream = made_stream(DISK)
    return {
        "qcow2": qemu_convert(folder, DISK),
        "qcow2 packed": qemu_convert(folder, DISK, "-c"),
        "vhd": of_qemu("vhd", "force_size=on"),
        "vhd fixed": of_qemu("vhd", "subformat=fixed,force_size=on"),
        "vmdk": of_qemu("vmdk"),
        "vmdk stream": stream,
        "vhdx": of_qemu("vhdx", "block_size=1M"),
        "ova": made_ova(stream),
        "gce": made_gce(DISK),
        "raw": DISK,
    }


def put(order: str, code: str, at: int, value: int) -> Callable[[bytearray], None]:
    """Overwrite a number."""
    return lambda image: struct.pack_into(order + code, image, at, value)


def be32(at: int, value: int) -> Callable[[bytearray], None]:
    return put(">", "I", at, value)


def be64(at: int, value: int) -> Callable[[bytearray], None]:
    return put(">", "Q", at, value)


def le32(at: int, value: int) -> Callable[[bytearray], None]:
    return put("<", "I", at, value)


def le64(at: int, value: int) -> Callable[[bytearray], None]:
    return put("<", "Q", at, value)


def cut(length: int) -> Callable[[bytearray], None]:
    """Cut so many bytes off the end."""

    def change(image: bytearray) -> None:
        del image[-length:]

    return change


def grow(data: bytes) -> Callable[[bytearray], None]:
    return lambda image: image.extend(data)


# qcow2


def q(change: Callable[[Patched], None]) -> Callable[[bytearray], None]:
    """A change of a qcow2 image by the names of its fields."""

    def apply(image: bytearray) -> None:
        patched = Patched(bytes(image))
        change(patched)
        image[:] = patched.bytes

    return apply


def set_l2(number: int, value: Callable[[Patched, int], int], *, packed: bool = False) -> Callable[[bytearray], None]:
    def change(image: Patched) -> None:
        at = (image.compressed if packed else image.plain)[number]
        image.put64(at, value(image, image.u64(at)))

    return q(change)


def set_refcount(cluster: Callable[[Patched], int], value: int) -> Callable[[bytearray], None]:
    def change(image: Patched) -> None:
        block = image.u64(image.u64(48))
        struct.pack_into(">H", image.bytes, block + 2 * cluster(image), value)

    return q(change)


def first_data(image: Patched) -> int:
    return (image.u64(image.plain[0]) & 0xFFFFFFFFFFFE00) // image.cluster


def _add_extension(image: Patched) -> None:
    struct.pack_into(">II", image.bytes, image.u32(100), 0x12345678, 0x7FFFFFF0)


def _name_backing(at: int, length: int) -> Callable[[bytearray], None]:
    return lambda image: struct.pack_into(">QI", image, 8, at, length)


def _repack(image: Patched) -> None:
    """A deflate stream with distances up to 32 KiB in place of the first compressed cluster."""
    letters = bytes(byte & 63 for byte in DISK[: 64 * KiB])
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    noise = mixed_disk(200 * KiB, seed=5)
    random = next(noise[at : at + 20000] for at in range(0, 130 * KiB, 4096) if len(set(noise[at : at + 20000])) == 256)
    letters = bytes(byte & 63 for byte in random)
    packed = stream.compress((letters * 4)[: 64 * KiB]) + stream.flush()
    at = len(image.bytes)
    image.bytes += packed + bytes(-len(packed) % image.cluster)
    entry = image.compressed[0]
    image.put64(entry, COMPRESSED | (len(packed) - 1) // 512 << 54 | at)


QCOW2 = [
    Mutation("header", "qcow2", "magic", be32(0, 0x51464900), "corrupt", "begin like a qcow2"),
    Mutation("header", "qcow2", "version 4", be32(4, 4), "refused", "version 4"),
    Mutation("header", "qcow2", "clusters of 256 bytes", be32(20, 8), "corrupt", "2^8"),
    Mutation("header", "qcow2", "clusters of 4 MiB", be32(20, 22), "corrupt", "2^22"),
    Mutation("header", "qcow2", "header length", be32(100, 105), "corrupt", "header of 105"),
    Mutation("header", "qcow2", "refcount order 7", be32(96, 7), "corrupt", "2^7 bits", reads=True),
    Mutation("header", "qcow2", "unknown incompatible bit", be64(72, 1 << 5), "refused", "bits 5"),
    Mutation("header", "qcow2", "data file", be64(72, 4), "refused", "external data file"),
    Mutation("header", "qcow2", "backing file", be64(8, 512), "warning", "backing file"),
    Mutation("header", "qcow2", "long name of a backing file", _name_backing(512, 1024), "corrupt", "1024 bytes"),
    Mutation("header", "qcow2", "backing file behind the header's cluster", be64(8, 1 << 20), "corrupt", "can't be at"),
    Mutation("header", "qcow2", "raw data without a data file", be64(88, 2), "corrupt", "no data file", reads=True),
    Mutation("header", "qcow2", "encryption", be32(32, 2), "refused", "encryption"),
    Mutation("header", "qcow2", "compression type without its bit", be32(104, 1 << 24), "corrupt", "contradict"),
    Mutation("header", "qcow2", "extension behind the cluster", q(_add_extension), "corrupt", "extension", reads=True),
    Mutation("tables", "qcow2", "L1 too small", be32(36, 0), "corrupt", "too small"),
    Mutation("tables", "qcow2", "L1 too large", be32(36, 0xFFFFFFFF), "corrupt", "larger than any"),
    Mutation("tables", "qcow2", "L1 between clusters", be64(40, 0x30200), "corrupt", "can't be at"),
    Mutation("tables", "qcow2", "L1 behind the end", be64(40, 1 << 40), "corrupt", "behind the end"),
    Mutation("tables", "qcow2", "no refcount table", be32(56, 0), "corrupt", "refcount table of 0", reads=True),
    Mutation("tables", "qcow2", "huge refcount table", be32(56, 1 << 31), "corrupt", "refcount table", reads=True),
    Mutation("tables", "qcow2", "refcount table unaligned", be64(48, 512), "corrupt", "can't be at", reads=True),
    Mutation("tables", "qcow2", "refcount table behind the end", be64(48, 1 << 40), "corrupt", "can't be", reads=True),
    Mutation("tables", "qcow2", "snapshots behind the end", be32(60, 60000), "corrupt", "snapshot table", reads=True),
    Mutation("tables", "qcow2", "too many snapshots", be32(60, 1 << 31), "corrupt", "snapshots are more", reads=True),
    Mutation(
        "pointers",
        "qcow2",
        "L1 reserved bits",
        q(lambda image: image.put64(image.l1, image.u64(image.l1) | 1)),
        "corrupt",
        "reserved bits are set in an L1",
    ),
    Mutation(
        "pointers",
        "qcow2",
        "L2 table between clusters",
        q(lambda image: image.put64(image.l1, image.u64(image.l1) + 512)),
        "corrupt",
        "no L2 table can be",
    ),
    Mutation("pointers", "qcow2", "L2 reserved bits", set_l2(0, lambda _, old: old | 2), "corrupt", "in an L2 entry"),
    Mutation("pointers", "qcow2", "cluster unaligned", set_l2(0, lambda _, old: old + 512), "corrupt", "between two"),
    Mutation(
        "pointers",
        "qcow2",
        "cluster behind the end",
        set_l2(0, lambda *_: COPIED | 1 << 50),
        "corrupt",
        "behind the end",
    ),
    Mutation(
        "pointers",
        "qcow2",
        "refcount table reserved bits",
        q(lambda image: image.put64(image.u64(48), image.u64(image.u64(48)) | 1)),
        "corrupt",
        "refcount table entry",
        reads=True,
    ),
    Mutation(
        "pointers",
        "qcow2",
        "refcount block behind the end",
        q(lambda image: image.put64(image.u64(48), 1 << 50)),
        "corrupt",
        "no refcount block can be",
        reads=True,
    ),
    Mutation(
        "pointers",
        "qcow2 packed",
        "compressed cluster in the header",
        set_l2(0, lambda *_: COMPRESSED | 8, packed=True),
        "corrupt",
        "outside",
    ),
    Mutation(
        "refcounts", "qcow2", "data not counted", set_refcount(first_data, 0), "corrupt", "more often", reads=True
    ),
    Mutation(
        "refcounts",
        "qcow2",
        "L1 not counted",
        set_refcount(lambda i: i.l1 // i.cluster, 0),
        "corrupt",
        "more often",
        reads=True,
    ),
    Mutation(
        "refcounts", "qcow2", "header not counted", set_refcount(lambda _: 0, 0), "corrupt", "more often", reads=True
    ),
    Mutation(
        "refcounts", "qcow2", "data counted twice", set_refcount(first_data, 2), "corrupt", "used once", reads=True
    ),
    Mutation(
        "refcounts", "qcow2", "a cluster that nothing uses", set_l2(0, lambda *_: 0), "leaks", "less often", reads=True
    ),
    Mutation(
        "refcounts",
        "qcow2",
        "two entries for one cluster",
        set_l2(0, lambda image, _: image.u64(image.plain[1])),
        "corrupt",
        "more often",
        reads=True,
    ),
    Mutation(
        "refcounts",
        "qcow2",
        "L1 entry for the L1 table",
        q(lambda image: image.put64(image.l1, COPIED | image.l1)),
        "corrupt",
        "used for something else",
        reads=True,
    ),
    Mutation(
        "refcounts",
        "qcow2",
        "guest data in the refcount block",
        set_l2(0, lambda image, _: COPIED | image.u64(image.u64(48))),
        "corrupt",
        "used for something else",
        reads=True,
    ),
    Mutation(
        "refcounts",
        "qcow2",
        "guest data in an L2 table",
        set_l2(0, lambda image, _: COPIED | image.l2),
        "corrupt",
        "an L2 table is used for something else",
        reads=True,
    ),
    Mutation(
        "refcounts",
        "qcow2 packed",
        "compressed cluster counted too rarely",
        set_refcount(lambda image: (image.u64(image.compressed[3]) & (1 << 54) - 1) // image.cluster, 1),
        "corrupt",
        "more often",
        reads=True,
    ),
    Mutation(
        "used once",
        "qcow2",
        "missing on data",
        set_l2(0, lambda _, old: old & ~COPIED),
        "corrupt",
        "used once",
        reads=True,
    ),
    Mutation(
        "used once",
        "qcow2",
        "missing on an L2 table",
        q(lambda image: image.put64(image.l1, image.l2)),
        "corrupt",
        "of an L2 table differ",
        reads=True,
    ),
    Mutation(
        "used once",
        "qcow2 packed",
        "set on a compressed cluster",
        set_l2(0, lambda _, old: old | COPIED, packed=True),
        "corrupt",
        "compressed cluster is marked",
        reads=True,
    ),
    Mutation(
        "refcount blocks",
        "qcow2",
        "not counted",
        set_refcount(lambda image: image.u64(image.u64(48)) // image.cluster, 0),
        "corrupt",
        "refcount block has not the refcount 1",
        reads=True,
    ),
    Mutation(
        "refcount blocks",
        "qcow2",
        "used for two ranges",
        q(lambda image: image.put64(image.u64(48) + 8, image.u64(image.u64(48)))),
        "corrupt",
        "used for something else",
        reads=True,
    ),
    Mutation("marks", "qcow2", "dirty bit", be64(72, 1), "warning", "not closed properly", reads=True),
    Mutation("marks", "qcow2", "corrupt bit", be64(72, 2), "corrupt", "marked as corrupt"),
    Mutation(
        "own output",
        "qcow2",
        "bytes behind the last cluster",
        grow(b"x"),
        "corrupt",
        "whole clusters",
        reads=True,
        mode="strict",
    ),
    Mutation(
        "own output",
        "qcow2",
        "clusters out of order",
        q(lambda image: _swap(image, image.plain[0], image.plain[1])),
        "corrupt",
        "in the order of the disk",
        reads=True,
        mode="strict",
    ),
    Mutation(
        "own output",
        "qcow2 packed",
        "damaged compressed data",
        q(lambda image: _damage(image, image.u64(image.compressed[0]) & (1 << 54) - 1)),
        "corrupt",
        "can't be unpacked",
        mode="deep",
    ),
    Mutation("truncated", "qcow2", "last cluster missing", cut(64 * KiB), "corrupt", "behind the end"),
]


def _swap(image: Patched, one: int, other: int) -> None:
    left, right = image.u64(one), image.u64(other)
    image.put64(one, right)
    image.put64(other, left)


def _damage(image: Patched, at: int) -> None:
    image.bytes[at : at + 40] = b"\xff" * 40


# VHD


def signed(*changes: Callable[[bytearray], None], tail: bool = True, copy: bool = True) -> Callable[[bytearray], None]:
    """Apply changes at footer offsets, to the footers that are named, and make their checksums right again."""

    def apply(image: bytearray) -> None:
        places = [len(image) - 512] * tail + [0] * (copy and image[:8] == b"conectix")
        for at in places:
            footer = image[at : at + 512]
            for change in changes:
                change(footer)
            _sign(footer, 64)
            image[at : at + 512] = footer

    return apply


def signed_header(*changes: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    def apply(image: bytearray) -> None:
        header = image[512:1536]
        for change in changes:
            change(header)
        _sign(header, 36)
        image[512:1536] = header

    return apply


def _sign(raw: bytearray, field: int) -> None:
    struct.pack_into(">I", raw, field, 0)
    struct.pack_into(">I", raw, field, ~sum(raw) & 0xFFFFFFFF)


def _equal_blocks(image: bytearray) -> None:
    image[1540:1544] = image[1536:1540]


def _unused_bitmap(image: bytearray) -> None:
    at = struct.unpack_from(">I", image, 1536)[0] * 512
    image[at : at + 512] = bytes(512)


VHD = [
    Mutation("footer", "vhd", "copy damaged", be32(8, 77), "corrupt", "copy of the footer", reads=True),
    Mutation(
        "footer",
        "vhd",
        "end damaged",
        lambda i: be32(len(i) - 400, 77)(i),
        "corrupt",
        "at the end is damaged",
        reads=True,
    ),
    Mutation("footer", "vhd", "end missing", cut(512), "corrupt", "at the end is damaged", reads=True),
    Mutation("footer", "vhd", "both differ", signed(be32(24, 7), copy=False), "corrupt", "differ", reads=True),
    Mutation("footer", "vhd", "differencing", signed(be32(60, 4)), "refused", "differencing"),
    Mutation("footer", "vhd", "type 7", signed(be32(60, 7)), "refused", "disk type 7"),
    Mutation("footer", "vhd", "saved state", signed(put(">", "B", 84, 1)), "warning", "suspended", reads=True),
    Mutation("footer", "vhd", "geometry", signed(put(">", "H", 56, 7)), "warning", "geometry", reads=True),
    Mutation("footer", "vhd", "size beyond 2040 GiB", signed(be64(48, 2041 * GiB)), "corrupt", "too few for the disk"),
    Mutation("footer", "vhd fixed", "size unlike the file", signed(be64(48, 4 * MiB)), "corrupt", "lie in front of it"),
    Mutation("footer", "vhd fixed", "cut short", cut(MiB), "corrupt", "no VHD footer"),
    Mutation("footer", "vhd fixed", "checksum", lambda i: be32(len(i) - 400, 77)(i), "corrupt", "checksum"),
    Mutation("header", "vhd", "place", signed(be64(16, 1 << 40)), "corrupt", "can't be at"),
    Mutation("header", "vhd", "cookie", signed_header(be32(0, 1)), "corrupt", "cxsparse"),
    Mutation("header", "vhd", "checksum", be32(600, 77), "corrupt", "dynamic header is wrong"),
    Mutation("header", "vhd", "version", signed_header(be32(24, 2)), "refused", "version"),
    Mutation("header", "vhd", "blocks of 3 MiB", signed_header(be32(32, 3 * MiB)), "corrupt", "not possible"),
    Mutation("header", "vhd", "blocks of 0 bytes", signed_header(be32(32, 0)), "corrupt", "not possible"),
    Mutation("header", "vhd", "too few entries", signed_header(be32(28, 1)), "corrupt", "too few"),
    Mutation("header", "vhd", "huge table", signed_header(be32(28, 0xFFFFFFFF)), "corrupt", "block table can't be"),
    Mutation(
        "header", "vhd", "table behind the end", signed_header(be64(16, 1 << 40)), "corrupt", "block table can't be"
    ),
    Mutation("header", "vhd", "table over the header", signed_header(be64(16, 1024)), "corrupt", "overlaps the header"),
    Mutation("blocks", "vhd", "inside the table", be32(1536, 3), "corrupt", "inside header or block table", reads=True),
    Mutation("blocks", "vhd", "behind the end", be32(1536, 0xFFFFFFF0), "corrupt", "behind the footer"),
    Mutation("blocks", "vhd", "two at one place", _equal_blocks, "corrupt", "overlap", reads=True),
    Mutation(
        "blocks", "vhd", "one that nothing uses", be32(1540, 0xFFFFFFFF), "leaks", "belong to no block", reads=True
    ),
    Mutation(
        "blocks",
        "vhd",
        "sectors called unused",
        _unused_bitmap,
        "warning",
        "calls sectors unused",
        reads=True,
        mode="deep",
    ),
]

# VMDK


def gd(image: bytearray) -> int:
    """Image offset of the grain directory."""
    at = 0 if image[56:64] != b"\xff" * 8 else len(image) - 1024
    return int(struct.unpack_from("<Q", image, at + 56)[0]) * 512


def gt(image: bytearray) -> int:
    """Image offset of the first grain table."""
    return int(struct.unpack_from("<I", image, gd(image))[0]) * 512


def grains(image: bytearray) -> list[int]:
    """Image offsets of the entries of the first grain table that are not 0."""
    return [at for at in range(gt(image), gt(image) + 2048, 4) if image[at : at + 4] != bytes(4)]


def set_grain(number: int, value: Callable[[bytearray], int]) -> Callable[[bytearray], None]:
    def apply(image: bytearray) -> None:
        struct.pack_into("<I", image, grains(image)[number], value(image))

    return apply


def both_tables(change: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    """A change of the first grain table, repeated in its redundant copy."""

    def apply(image: bytearray) -> None:
        change(image)
        second = int(struct.unpack_from("<Q", image, 48)[0]) * 512
        copy = int(struct.unpack_from("<I", image, second)[0]) * 512
        image[copy : copy + 2048] = image[gt(image) : gt(image) + 2048]

    return apply


def entry(image: bytearray, number: int) -> int:
    return int(struct.unpack_from("<I", image, grains(image)[number])[0])


def text(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    """Replace a part of the descriptor, padded to the same length."""

    def apply(image: bytearray) -> None:
        end = image.index(b"\0", 512)
        changed = bytes(image[512:end]).replace(old, new)
        assert changed != image[512:end]
        image[512 : 512 + 20 * 512] = changed.ljust(20 * 512, b"\0")

    return apply


def in_grain(number: int, change: Callable[[bytearray, int], None]) -> Callable[[bytearray], None]:
    return lambda image: change(image, entry(image, number) * 512)


def _swap_grains(image: bytearray) -> None:
    """Two grains of equal room change places in the file."""
    one, two = entry(image, 0), entry(image, 1)
    at = [one * 512, two * 512]
    after = entry(image, 2) * 512
    first, second = bytes(image[at[0] : at[1]]), bytes(image[at[1] : after])
    image[at[0] : after] = second + first
    struct.pack_into("<I", image, grains(image)[0], one + len(second) // 512)
    struct.pack_into("<I", image, grains(image)[1], one)


VMDK = [
    Mutation("header", "vmdk", "magic", le32(0, 1), "corrupt", "begin like a VMDK"),
    Mutation("header", "vmdk", "COWD", lambda i: i.__setitem__(slice(0, 4), b"COWD"), "refused", "COWD"),
    Mutation("header", "vmdk", "SEsparse", le64(0, 0xCAFEBABE), "refused", "SEsparse"),
    Mutation("header", "vmdk", "version 4", le32(4, 4), "refused", "version 4"),
    Mutation("header", "vmdk", "unknown flags", le32(8, 1 << 20 | 3), "refused", "flags"),
    Mutation("header", "vmdk", "line ends", le32(73, 0x0A0A0A0A), "corrupt", "line ends"),
    Mutation("header", "vmdk", "no capacity", le64(12, 0), "corrupt", "0 bytes"),
    Mutation("header", "vmdk", "huge capacity", le64(12, 1 << 54), "corrupt", "not possible"),
    Mutation("header", "vmdk", "capacity unlike the descriptor", le64(12, 128), "corrupt", "contradict"),
    Mutation("header", "vmdk", "grains of 3 sectors", le64(20, 3), "corrupt", "grains of 3"),
    Mutation("header", "vmdk", "huge grains", le64(20, 1 << 40), "corrupt", "not possible"),
    Mutation("header", "vmdk", "tables of 2^31 entries", le32(44, 1 << 31), "corrupt", "grain tables of"),
    Mutation("header", "vmdk", "unclean shutdown", put("<", "B", 72, 1), "warning", "not closed properly", reads=True),
    Mutation("header", "vmdk stream", "compression 2", put("<", "H", 77, 2), "refused", "algorithm 2"),
    Mutation("header", "vmdk stream", "footer unlike the header", le64(20, 256), "corrupt", "contradict"),
    Mutation("header", "vmdk stream", "no footer", cut(1536), "corrupt", "no footer"),
    Mutation(
        "header", "vmdk stream", "no end of stream", lambda i: le32(len(i) - 504, 9)(i), "corrupt", "end of its stream"
    ),
    Mutation(
        "descriptor", "vmdk", "first line", lambda i: le32(512, 0x41414141)(i), "corrupt", "does not begin like one"
    ),
    Mutation("descriptor", "vmdk", "behind the end", le64(28, 1 << 40), "corrupt", "behind the end"),
    Mutation("descriptor", "vmdk", "huge", le64(36, 1 << 40), "corrupt", "larger than any"),
    Mutation("descriptor", "vmdk", "parent", text(b"parentCID=ffffffff", b"parentCID=12345678"), "refused", "parent"),
    Mutation(
        "descriptor",
        "vmdk",
        "another subformat",
        text(b"monolithicSparse", b"monolithicFlat"),
        "refused",
        "monolithicFlat",
    ),
    Mutation(
        "descriptor",
        "vmdk",
        "flat extent with a path",
        text(b'SPARSE "image"', b'FLAT "/etc/shadow" 0'),
        "corrupt",
        "other files",
    ),
    Mutation(
        "descriptor",
        "vmdk",
        "second extent",
        text(b"\n# The Disk", b'\nRW 8 SPARSE "more"\n# The Disk'),
        "corrupt",
        "other files",
    ),
    Mutation("descriptor", "vmdk", "folder in the name", text(b'"image"', b'"/x/im"'), "warning", "folder", reads=True),
    Mutation(
        "descriptor", "vmdk", "a line of no kind", text(b"#DDB", b"what?"), "warning", "importers refuse", reads=True
    ),
    Mutation("directory", "vmdk", "behind the end", le64(56, 1 << 40), "corrupt", "directory lies behind"),
    Mutation(
        "directory", "vmdk", "table behind the end", lambda i: le32(gd(i), 0xFFFFFF)(i), "corrupt", "no grain table"
    ),
    Mutation(
        "directory",
        "vmdk",
        "an entry missing",
        lambda i: le32(gd(i), 0)(i),
        "corrupt",
        "redundant directory differs",
        reads=True,
    ),
    Mutation(
        "directory",
        "vmdk",
        "table in the descriptor",
        lambda i: le32(gd(i), 2)(i),
        "corrupt",
        "inside the descriptor",
        reads=True,
    ),
    Mutation(
        "directory", "vmdk", "redundant directory", lambda i: le32(21 * 512, 0)(i), "corrupt", "redundant", reads=True
    ),
    Mutation(
        "directory", "vmdk", "redundant table", set_grain(0, lambda _: 0), "corrupt", "redundant copy", reads=True
    ),
    Mutation(
        "directory",
        "vmdk stream",
        "marker of a table",
        lambda i: le32(gt(i) - 500, 7)(i),
        "corrupt",
        "marker",
        reads=True,
    ),
    Mutation(
        "grains", "vmdk", "behind the end", both_tables(set_grain(0, lambda _: 0xFFFFFF)), "corrupt", "behind the end"
    ),
    Mutation(
        "grains",
        "vmdk",
        "in front of the data",
        both_tables(set_grain(0, lambda _: 2)),
        "corrupt",
        "in front of",
        reads=True,
    ),
    Mutation(
        "grains",
        "vmdk",
        "two at one place",
        both_tables(set_grain(0, lambda i: entry(i, 1))),
        "corrupt",
        "overlap",
        reads=True,
    ),
    Mutation("grains", "vmdk", "space behind the last", grow(bytes(64 * KiB)), "leaks", "belong to none", reads=True),
    Mutation(
        "grains",
        "vmdk stream",
        "another sector",
        in_grain(0, lambda i, at: le64(at, 128 * 7)(i)),
        "corrupt",
        "belongs to sector",
        mode="deep",
    ),
    Mutation(
        "grains",
        "vmdk stream",
        "longer than its room",
        in_grain(0, lambda i, at: le32(at + 8, 1 << 30)(i)),
        "corrupt",
        "does not fit",
        mode="deep",
    ),
    Mutation(
        "grains",
        "vmdk stream",
        "no bytes",
        in_grain(0, lambda i, at: le32(at + 8, 0)(i)),
        "corrupt",
        "does not fit",
        mode="deep",
    ),
    Mutation(
        "grains",
        "vmdk stream",
        "damaged",
        in_grain(0, lambda i, at: le64(at + 40, 77)(i)),
        "corrupt",
        "unpacked",
        mode="deep",
    ),
    Mutation("grains", "vmdk stream", "two at one place", set_grain(0, lambda i: entry(i, 1)), "corrupt", "overlap"),
    Mutation(
        "grains",
        "vmdk stream",
        "inside a table",
        lambda i: set_grain(0, lambda j: gt(j) // 512)(i),
        "corrupt",
        "inside a grain table",
    ),
    Mutation("grains", "vmdk stream", "out of order", _swap_grains, "warning", "order of the disk", reads=True),
]

# VHDX


def x_header(
    change: Callable[[bytearray], None], *, which: tuple[int, ...] = (64 * KiB, 128 * KiB)
) -> Callable[[bytearray], None]:
    """A change at header offsets, with the checksum made right."""
    return lambda image: _resign(image, change, which, 4096)


def x_region(change: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    return lambda image: _resign(image, change, (192 * KiB, 256 * KiB), 64 * KiB)


def _resign(image: bytearray, change: Callable[[bytearray], None], places: tuple[int, ...], length: int) -> None:
    for at in places:
        raw = image[at : at + length]
        change(raw)
        raw[4:8] = bytes(4)
        struct.pack_into("<I", raw, 4, crc32c(bytes(raw)))
        image[at : at + length] = raw


def x_place(image: bytearray, guid: str) -> int:
    """Image offset of a region or of a metadata item, by the begin of its GUID in hexadecimal."""
    for table, first, base in ((192 * KiB, 16, 0), (x_metadata(image), 32, x_metadata(image))):
        for at in range(table + first, table + first + 32 * 8, 32):
            if image[at : at + 16].hex().startswith(guid):
                code = "<Q" if not base else "<I"
                return base + int(struct.unpack_from(code, image, at + 16)[0])
    raise AssertionError(guid)


def x_metadata(image: bytearray) -> int:
    for at in range(192 * KiB + 16, 192 * KiB + 16 + 64, 32):
        if image[at : at + 4].hex() == "06a27c8b":
            return int(struct.unpack_from("<Q", image, at + 16)[0])
    raise AssertionError("no metadata")


BAT, PARAMETERS, DISK_SIZE, SECTORS = "6677c22d", "3767a1ca", "2442a52f", "1dbf4181"


def x_bat(number: int, value: Callable[[int], int]) -> Callable[[bytearray], None]:
    def apply(image: bytearray) -> None:
        at = x_place(image, BAT) + number * 8
        le64(at, value(int(struct.unpack_from("<Q", image, at)[0])))(image)

    return apply


def x_item(guid: str, change: Callable[[bytearray, int], None]) -> Callable[[bytearray], None]:
    return lambda image: change(image, x_place(image, guid))


def _one_log(image: bytearray) -> None:
    x_header(lambda raw: raw.__setitem__(slice(48, 64), b"l" * 16))(image)


def _one_age(image: bytearray) -> None:
    x_header(le64(8, 9))(image)
    x_header(le64(32, 7), which=(64 * KiB,))(image)


def _same_place(image: bytearray) -> None:
    at = x_place(image, BAT)
    image[at : at + 8] = image[at + 8 : at + 16]


VHDX = [
    Mutation("headers", "vhdx", "identifier", le32(0, 1), "corrupt", "begin like a VHDX"),
    Mutation("headers", "vhdx", "one damaged", le32(64 * KiB + 100, 1), "corrupt", "header 1", reads=True),
    Mutation(
        "headers",
        "vhdx",
        "both damaged",
        lambda i: (le32(65636, 1)(i), le32(131172, 1)(i), None)[2],
        "corrupt",
        "both of its headers",
    ),
    Mutation("headers", "vhdx", "version 2", x_header(put("<", "H", 66, 2)), "refused", "version 2"),
    Mutation("headers", "vhdx", "a log to replay", _one_log, "refused", "log replay needed"),
    Mutation("headers", "vhdx", "log behind the end", x_header(le64(72, 1 << 40)), "corrupt", "log of"),
    Mutation("headers", "vhdx", "of one age that differ", _one_age, "corrupt", "none is newer"),
    Mutation(
        "regions", "vhdx", "one table damaged", le32(192 * KiB + 1000, 1), "corrupt", "region table 1", reads=True
    ),
    Mutation(
        "regions",
        "vhdx",
        "both tables damaged",
        lambda i: (le32(197608, 1)(i), le32(263144, 1)(i), None)[2],
        "corrupt",
        "both of its region",
    ),
    Mutation("regions", "vhdx", "too many entries", x_region(le32(8, 5000)), "corrupt", "5000 entries"),
    Mutation(
        "regions",
        "vhdx",
        "an unknown one that is required",
        x_region(lambda r: (le32(16, 1)(r), le32(44, 1)(r), None)[2]),
        "refused",
        "unknown region",
    ),
    Mutation("regions", "vhdx", "unaligned", x_region(le64(32, 3 * MiB + 512)), "corrupt", "can't be at"),
    Mutation("regions", "vhdx", "behind the end", x_region(le64(32, 1 << 50)), "corrupt", "can't be at"),
    Mutation(
        "regions",
        "vhdx",
        "two that overlap",
        x_region(lambda r: r.__setitem__(slice(32, 40), r[64:72])),
        "corrupt",
        "overlap",
    ),
    Mutation(
        "regions",
        "vhdx",
        "log over metadata",
        lambda i: x_header(le64(72, x_metadata(i)))(i),
        "corrupt",
        "overlap",
        reads=True,
    ),
    Mutation("metadata", "vhdx", "signature", lambda i: le32(x_metadata(i), 1)(i), "corrupt", "metadata table"),
    Mutation(
        "metadata",
        "vhdx",
        "too many items",
        lambda i: put("<", "H", x_metadata(i) + 10, 3000)(i),
        "corrupt",
        "3000 entries",
    ),
    Mutation(
        "metadata",
        "vhdx",
        "item outside",
        lambda i: le32(x_metadata(i) + 32 + 16, 1 << 31)(i),
        "corrupt",
        "metadata item",
    ),
    Mutation(
        "metadata",
        "vhdx",
        "unknown item that is required",
        lambda i: le32(x_metadata(i) + 32, 1)(i),
        "refused",
        "unknown metadata",
    ),
    Mutation(
        "metadata",
        "vhdx",
        "blocks of 3 MiB",
        x_item(PARAMETERS, lambda i, at: le32(at, 3 * MiB)(i)),
        "corrupt",
        "not possible",
    ),
    Mutation(
        "metadata",
        "vhdx",
        "blocks of 0 bytes",
        x_item(PARAMETERS, lambda i, at: le32(at, 0)(i)),
        "corrupt",
        "not possible",
    ),
    Mutation("metadata", "vhdx", "parent", x_item(PARAMETERS, lambda i, at: le32(at + 4, 2)(i)), "refused", "parent"),
    Mutation(
        "metadata",
        "vhdx",
        "disk of 65 TiB",
        x_item(DISK_SIZE, lambda i, at: le64(at, 65 << 40)(i)),
        "corrupt",
        "not possible",
    ),
    Mutation(
        "metadata",
        "vhdx",
        "sectors of 520 bytes",
        x_item(SECTORS, lambda i, at: le32(at, 520)(i)),
        "corrupt",
        "not possible",
    ),
    Mutation(
        "metadata",
        "vhdx",
        "table too small for the disk",
        x_item(DISK_SIZE, lambda i, at: le64(at, 1 << 42)(i)),
        "corrupt",
        "too small",
    ),
    Mutation("blocks", "vhdx", "state 5", x_bat(0, lambda old: old & ~7 | 5), "corrupt", "state"),
    Mutation("blocks", "vhdx", "partly in a parent", x_bat(0, lambda old: old | 7), "corrupt", "partly in a parent"),
    Mutation("blocks", "vhdx", "reserved bits", x_bat(0, lambda old: old | 1 << 8), "corrupt", "reserved"),
    Mutation("blocks", "vhdx", "behind the end", x_bat(0, lambda old: 1 << 40 | 6), "corrupt", "behind the end"),
    Mutation("blocks", "vhdx", "beyond 2^63", x_bat(0, lambda old: 1 << 63 | 6), "corrupt", "behind the end"),
    Mutation(
        "blocks",
        "vhdx",
        "inside the metadata",
        lambda i: x_bat(0, lambda _: x_metadata(i) | 6)(i),
        "corrupt",
        "inside the metadata",
        reads=True,
    ),
    Mutation("blocks", "vhdx", "two at one place", _same_place, "corrupt", "overlap", reads=True),
    Mutation(
        "blocks", "vhdx", "one that nothing uses", x_bat(1, lambda _: 0), "leaks", "belong to no block", reads=True
    ),
    Mutation("blocks", "vhdx", "image cut short", cut(2 * MiB), "corrupt", "behind the end"),
]

# Archives and raw


def tar_header(at: int, change: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    """A change of the tar header at `at`, with its checksum made right."""

    def apply(image: bytearray) -> None:
        header = image[at : at + 512]
        change(header)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        image[at : at + 512] = header

    return apply


def named(name: bytes) -> Callable[[bytearray], None]:
    return lambda header: header.__setitem__(slice(0, 100), name.ljust(100, b"\0"))


def _replace(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def apply(image: bytearray) -> None:
        assert old in image
        image[:] = image.replace(old, new)

    return apply


def _gce(member: dict[str, bytes]) -> Callable[[bytearray], None]:
    import gzip

    return lambda image: image.__setitem__(slice(0, None), gzip.compress(made_tar(member)))


ARCHIVES = [
    Mutation("archive", "ova", "checksum of a header", be32(10, 1), "corrupt", "checksum of a tar header"),
    Mutation("archive", "ova", "name with ..", tar_header(0, named(b"../../x.ovf")), "corrupt", "leads out"),
    Mutation("archive", "ova", "absolute name", tar_header(0, named(b"/etc/x.ovf")), "corrupt", "leads out"),
    Mutation(
        "archive",
        "ova",
        "symbolic link",
        tar_header(0, lambda h: h.__setitem__(156, ord("2"))),
        "refused",
        "symbolic link",
    ),
    Mutation("archive", "ova", "device", tar_header(0, lambda h: h.__setitem__(156, ord("4"))), "refused", "device"),
    Mutation(
        "archive",
        "ova",
        "member behind the end",
        tar_header(0, lambda h: h.__setitem__(slice(124, 136), b"77777777777\0")),
        "corrupt",
        "behind the end",
    ),
    Mutation(
        "archive",
        "ova",
        "size of 2^90",
        tar_header(0, lambda h: h.__setitem__(slice(124, 136), b"\x80" + b"\x01" * 11)),
        "corrupt",
        "absurdly large",
    ),
    Mutation(
        "archive",
        "ova",
        "negative size",
        tar_header(0, lambda h: h.__setitem__(slice(124, 136), b"\xff" * 12)),
        "corrupt",
        "absurdly large",
    ),
    Mutation("archive", "ova", "no description", tar_header(0, named(b"web.txt")), "corrupt", "no description"),
    Mutation(
        "archive", "ova", "two members of one name", tar_header(0, named(b"web-disk1.vmdk")), "corrupt", "two members"
    ),
    Mutation(
        "manifest",
        "ova",
        "digest",
        _replace(b"SHA256(web.ovf)= ", b"SHA256(web.ovf)=0"),
        "corrupt",
        "another digest",
        reads=True,
        mode="deep",
    ),
    Mutation(
        "manifest",
        "ova",
        "names what is not there",
        _replace(b"(web.ovf)", b"(wab.ovf)"),
        "corrupt",
        "not in the archive",
        reads=True,
    ),
    Mutation(
        "manifest",
        "ova",
        "rubbish",
        _replace(b"SHA256(web.ovf)", b"SHA999(web.ovf)"),
        "corrupt",
        "can't be read",
        reads=True,
    ),
    Mutation(
        "manifest",
        "ova",
        "missing",
        lambda i: tar_header(i.index(b"web.mf"), named(b"web.xx"))(i),
        "warning",
        "no manifest",
        reads=True,
    ),
    Mutation("archive", "gce", "another member", _gce({"disk.img": DISK}), "corrupt", "first member is not"),
    Mutation("archive", "gce", "name with ..", _gce({"../disk.raw": DISK}), "corrupt", "leads out"),
    Mutation("archive", "gce", "not whole sectors", _gce({"disk.raw": DISK[:-1]}), "corrupt", "whole sectors"),
    Mutation("archive", "gce", "flipped bit", lambda i: be32(len(i) // 2, 0)(i), "corrupt", "", mode="deep"),
    Mutation("archive", "gce", "cut short", lambda i: cut(len(i) // 3)(i), "corrupt", "cut short", mode="deep"),
    Mutation(
        "archive", "gce", "last checksum", lambda i: put(">", "B", len(i) - 6, 0)(i), "corrupt", "damaged", mode="deep"
    ),
    Mutation("archive", "gce", "something behind the stream", grow(b"junk" * 10), "corrupt", "", mode="deep"),
    Mutation("length", "raw", "not whole sectors", cut(100), "warning", "whole sectors", reads=True),
]

MUTATIONS = [*QCOW2, *VHD, *VMDK, *VHDX, *ARCHIVES]

__all__ = ["MUTATIONS", "Fields", "Mutation", "good_images"]
