"""What a partition holds, told by its magic numbers: filesystems, swap, volumes, encryption.

Every signature is looked for, not only the first: a stretch that bears two is `ambiguous`, and nobody should skip a
byte of it. A kind that can only be recognised is recognised, so that a report can say why all of it is copied.

Source: the on-disk structures of each kind; Linux include/uapi/linux/magic.h and the documents named in the modules of
this folder that map them; Linux md(4) for the places of RAID superblocks.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import KiB
from stages.disk.reading import Window

State = Literal["clean", "dirty", "unknown"]

SWAP_PAGES = (4096, 8192, 16384, 32768, 65536)
SWAP_MAGICS = (b"SWAPSPACE2", b"SWAP-SPACE")
HIBERNATED = (b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001")
_HEAD = 64 * KiB
_BTRFS_AT = 64 * KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What was recognised.

    Attributes:
        kind: `ext4`, `xfs`, `lvm2` ...; `unknown`, or `ambiguous` with the candidates in `others`.
        size: bytes that it says it has; None where it does not say.
        used, free: bytes as it says; None where that takes more than a look at its superblock.
        state: what its flags say about the last unmount.
        version: what tells variants apart (`1.2` of an md member, `2` of LUKS).
    """

    kind: str
    label: str = ""
    uuid: str = ""
    size: int | None = None
    used: int | None = None
    free: int | None = None
    state: State = "unknown"
    version: str = ""
    others: tuple[str, ...] = ()


# Filesystems whose blocks and files are read here, by kind: what tells which module reads them.
FAMILIES = {
    "btrfs": "btrfs",
    "ext2": "ext",
    "ext3": "ext",
    "ext4": "ext",
    "fat12": "fat",
    "fat16": "fat",
    "fat32": "fat",
    "xfs": "xfs",
}


async def identify(reader: RangeReader, offset: int, length: int) -> Signature:
    """Recognise what [offset, offset + length) of a disk holds. Reads about 200 KiB.

    Raises:
        StoreError: it can't be read.
    """
    window = Window(reader, offset, max(0, min(length, reader.size - offset)))
    head = await window.read(0, min(_HEAD, window.size))
    found = [made for probe in _PROBES if (made := _probe(probe, head, window.size)) is not None]
    for later in (_btrfs, _iso9660, _zfs, _md_at_end):
        try:
            made = await later(window)
        except FormatError:
            continue  # too short for it
        if made is not None:
            found.append(made)
    if not found:
        return Signature(kind="unknown")
    if len(found) > 1:
        return Signature(kind="ambiguous", others=tuple(one.kind for one in found))
    return found[0]


def _probe(probe: Callable[[bytes, int], Signature | None], head: bytes, size: int) -> Signature | None:
    try:
        return probe(head, size)
    except (struct.error, IndexError):
        return None  # the stretch is too short for it


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace").strip()


def _uuid(raw: bytes) -> str:
    return str(uuid.UUID(bytes=raw)) if any(raw) else ""


def _u16(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<H", data, at)[0])


def _u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def _u64(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<Q", data, at)[0])


def _ext(head: bytes, size: int) -> Signature | None:
    sb = head[1024:2048]
    if _u16(sb, 56) != 0xEF53 or _u32(sb, 24) > 6:
        return None
    compat, incompat, ro_compat = _u32(sb, 92), _u32(sb, 96), _u32(sb, 100)
    block = KiB << _u32(sb, 24)
    wide = 1 if incompat & 0x80 else 0
    blocks = _u32(sb, 4) | wide * _u32(sb, 0x150) << 32
    free = _u32(sb, 12) | wide * _u32(sb, 0x158) << 32
    # Older features than these make it ext3 or ext2, which is how blkid tells them apart too.
    kind = "ext4" if incompat & ~0x16 or ro_compat & ~0x7 else "ext3" if compat & 0x4 else "ext2"
    if incompat & 0x8:
        kind = "jbd"
    clean = _u16(sb, 58) & 3 == 1 and not incompat & 4
    return Signature(
        kind=kind,
        label=_text(sb[120:136]),
        uuid=_uuid(sb[104:120]),
        size=blocks * block,
        used=(blocks - free) * block,
        free=free * block,
        state="clean" if clean else "dirty",
    )


def _xfs(head: bytes, size: int) -> Signature | None:
    if head[:4] != b"XFSB":
        return None
    block, blocks = struct.unpack_from(">IQ", head, 4)
    free = struct.unpack_from(">Q", head, 144)[0]
    version = struct.unpack_from(">H", head, 100)[0] & 0xF
    return Signature(
        kind="xfs",
        label=_text(head[108:120]),
        uuid=_uuid(head[32:48]),
        size=block * blocks,
        used=block * max(0, blocks - free),
        free=block * free,
        version=str(version),
    )


def fat_kind(head: bytes) -> str | None:
    """Which FAT a boot sector belongs to, None for none. Raises struct.error where it is too short."""
    sector, cluster = _u16(head, 11), head[13]
    fats, root, reserved = head[16], _u16(head, 17), _u16(head, 14)
    if head[510:512] != b"\x55\xaa" or head[0] not in (0xEB, 0xE9) or sector not in (512, 1024, 2048, 4096):
        return None
    if cluster == 0 or cluster & (cluster - 1) or fats not in (1, 2) or not reserved or head[21] not in _FAT_MEDIA:
        return None
    total = _u16(head, 19) or _u32(head, 32)
    fat_size = _u16(head, 22) or _u32(head, 36)
    begin = reserved + fats * fat_size + -(-root * 32 // sector)
    if not total or not fat_size or begin >= total:
        return None
    clusters = (total - begin) // cluster
    if not _u16(head, 22):
        return "fat32" if clusters < 0x0FFFFFF5 else None
    return "fat12" if clusters < 4085 else "fat16" if clusters < 65525 else None


_FAT_MEDIA = (0xF0, *range(0xF8, 0x100))


def _fat(head: bytes, size: int) -> Signature | None:
    kind = fat_kind(head)
    if kind is None:
        return None
    at = 64 if kind == "fat32" else 36
    dirty = head[at + 1] & 3
    has_more = head[at + 2] == 0x29
    serial = _u32(head, at + 3)
    label = _text(head[at + 7 : at + 18]) if has_more else ""
    return Signature(
        kind=kind,
        label="" if label == "NO NAME" else label,
        uuid=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}" if has_more else "",
        size=(_u16(head, 19) or _u32(head, 32)) * _u16(head, 11),
        state="dirty" if dirty else "clean",
    )


def _exfat(head: bytes, size: int) -> Signature | None:
    if head[3:11] != b"EXFAT   ":
        return None
    serial = _u32(head, 100)
    return Signature(
        kind="exfat",
        uuid=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}",
        size=_u64(head, 72) << min(head[108], 12),
        state="dirty" if _u16(head, 106) & 2 else "clean",
    )


def _ntfs(head: bytes, size: int) -> Signature | None:
    if head[3:11] != b"NTFS    " or not _u16(head, 11):
        return None
    return Signature(kind="ntfs", uuid=f"{_u64(head, 72):016X}", size=_u64(head, 40) * _u16(head, 11))


def _bitlocker(head: bytes, size: int) -> Signature | None:
    return Signature(kind="bitlocker") if head[3:11] == b"-FVE-FS-" else None


def _swap(head: bytes, size: int) -> Signature | None:
    for page in SWAP_PAGES:
        magic = head[page - 10 : page]
        if magic in SWAP_MAGICS or magic in HIBERNATED:
            pages = _u32(head, 1028) + 1
            return Signature(
                kind="swap" if magic in SWAP_MAGICS else "hibernation",
                uuid=_uuid(head[1036:1052]),
                label=_text(head[1052:1068]),
                size=pages * page,
                state="clean" if magic in SWAP_MAGICS else "dirty",
                version="0" if magic == b"SWAP-SPACE" else "1",
            )
    return None


def _lvm(head: bytes, size: int) -> Signature | None:
    for sector in range(4):
        at = sector * 512
        if head[at : at + 8] == b"LABELONE" and head[at + 24 : at + 32] == b"LVM2 001":
            start = at + _u32(head, at + 20)
            name = head[start : start + 32].decode("ascii", "replace")
            parts = [name[:6], *(name[i : i + 4] for i in range(6, 26, 4)), name[26:32]]
            return Signature(kind="lvm2", uuid="-".join(parts), size=_u64(head, start + 32), version="2")
    return None


_MD_MAGIC = 0xA92B4EFC


def _md(head: bytes, size: int) -> Signature | None:
    for at, version in ((0, "1.1"), (4096, "1.2")):
        if len(head) >= at + 256 and _u32(head, at) == _MD_MAGIC and _u32(head, at + 4) == 1:
            return _md_member(head[at : at + 256], version)
    return None


def _md_member(sb: bytes, version: str) -> Signature:
    return Signature(kind="md", label=_text(sb[32:64]), uuid=_uuid(sb[16:32]), size=_u64(sb, 80) * 512, version=version)


async def _md_at_end(window: Window) -> Signature | None:
    """RAID superblocks of versions 0.90 and 1.0 are near the end, behind what looks like a plain filesystem."""
    at = window.size // (64 * KiB) * (64 * KiB) - 64 * KiB
    if at >= 0:
        sb = await window.read(at, 256)
        if struct.unpack_from("<I", sb)[0] == _MD_MAGIC or struct.unpack_from(">I", sb)[0] == _MD_MAGIC:
            return Signature(kind="md", version="0.90")
    at = (window.size // 512 - 16) & ~7
    if at > 0:
        sb = await window.read(at * 512, 256)
        if struct.unpack_from("<II", sb) == (_MD_MAGIC, 1):
            return _md_member(sb, "1.0")
    return None


def _luks(head: bytes, size: int) -> Signature | None:
    if head[:6] != b"LUKS\xba\xbe":
        return None
    version = struct.unpack_from(">H", head, 6)[0]
    label = _text(head[24:72]) if version == 2 else ""
    return Signature(kind="luks", uuid=_text(head[168:208]), label=label, version=str(version))


def _squashfs(head: bytes, size: int) -> Signature | None:
    return Signature(kind="squashfs", size=_u64(head, 40), state="clean") if head[:4] == b"hsqs" else None


def _erofs(head: bytes, size: int) -> Signature | None:
    return Signature(kind="erofs", state="clean") if head[1024:1028] == b"\xe2\xe1\xf5\xe0" else None


def _f2fs(head: bytes, size: int) -> Signature | None:
    return Signature(kind="f2fs") if head[1024:1028] == b"\x10\x20\xf5\xf2" else None


def _jfs(head: bytes, size: int) -> Signature | None:
    return Signature(kind="jfs") if head[32768:32772] == b"JFS1" else None


def _bcache(head: bytes, size: int) -> Signature | None:
    magic = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
    return Signature(kind="bcache") if head[4096 + 24 : 4096 + 40] == magic else None


async def _btrfs(window: Window) -> Signature | None:
    sb = await window.read(_BTRFS_AT, 4096)
    if sb[64:72] != b"_BHRfS_M":
        return None
    total, used = struct.unpack_from("<QQ", sb, 112)
    return Signature(
        kind="btrfs",
        label=_text(sb[299:555]),
        uuid=_uuid(sb[32:48]),
        size=_u64(sb, 209),
        used=used,
        free=max(0, total - used),
        state="dirty" if _u64(sb, 96) else "clean",
    )


async def _iso9660(window: Window) -> Signature | None:
    descriptor = await window.read(32768, 2048)
    if descriptor[1:6] != b"CD001":
        return None
    return Signature(kind="iso9660", label=descriptor[40:72].decode("ascii", "replace").strip(), state="clean")


async def _zfs(window: Window) -> Signature | None:
    ring = await window.read(128 * KiB, 128 * KiB)
    if any(ring[at : at + 8] in _UBERBLOCKS for at in range(0, len(ring), KiB)):
        return Signature(kind="zfs_member")
    return None


_UBERBLOCKS = (struct.pack("<Q", 0x00BAB10C), struct.pack(">Q", 0x00BAB10C))


_PROBES = (
    _ext,
    _xfs,
    _fat,
    _exfat,
    _ntfs,
    _bitlocker,
    _swap,
    _lvm,
    _md,
    _luks,
    _squashfs,
    _erofs,
    _f2fs,
    _jfs,
    _bcache,
)
