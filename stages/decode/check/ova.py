"""Check an OVA: the archive, its manifest, and the disk inside.

Source: DMTF DSP0243 (Open Virtualization Format), section 5.1 "OVF package" (manifest), section 5.3 "Distribution".
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import MiB
from stages.decode.check.report import ImageInfo, Tally
from stages.decode.check.vmdk import check_vmdk, vmdk_info
from stages.decode.ova import Archive, choose_disk, disk_section, read_archive
from stages.decode.refusal import UnsupportedError
from stages.decode.tar import Member

_MANIFEST_MAX = MiB
_READ = 4 * MiB
_ALGORITHMS = {"SHA1": "sha1", "SHA256": "sha256", "SHA512": "sha512"}
_LINE = re.compile(r"(SHA\d+)\s*\(([^)]+)\)\s*=\s*([0-9A-Fa-f]+)\s*")


async def check_ova(reader: RangeReader, *, deep: bool, strict: bool, member: str = "") -> Tally:
    """Check an archive and its disk. As `checking.check`; digests are compared when deep."""
    tally = Tally("ova")
    try:
        archive = await read_archive(reader)
        disk = choose_disk(archive, member)
        if not archive.members[0].name.lower().endswith(".ovf"):
            tally.warning("the description (.ovf) is not the first member", archive.members[0].at)
        await _check_manifest(reader, archive, tally, deep=deep)
        inner = await check_vmdk(disk_section(reader, disk), deep=deep, strict=strict)
        tally.adopt(inner, base=disk.data)
        if inner.info is not None:
            tally.info = _wrapped(inner.info, archive, reader.size)
    except UnsupportedError:
        raise
    except FormatError as error:
        tally.stop(error)
    return tally


async def ova_info(reader: RangeReader, member: str = "") -> ImageInfo:
    """What the disk inside says, and the members."""
    archive = await read_archive(reader)
    return _wrapped(await vmdk_info(disk_section(reader, choose_disk(archive, member))), archive, reader.size)


def _wrapped(info: ImageInfo, archive: Archive, file_size: int) -> ImageInfo:
    members = ", ".join(f"{one.name} {one.size}" for one in archive.members[:64])
    return replace(
        info,
        format="ova",
        variant=f"vmdk {info.variant}",
        file_size=file_size,
        details=(*info.details, ("members", members)),
    )


async def _check_manifest(reader: RangeReader, archive: Archive, tally: Tally, *, deep: bool) -> None:
    manifest = archive.named(".mf")
    if manifest is None:
        tally.warning("the archive has no manifest (.mf): nothing proves its members")
        return
    if manifest.size > _MANIFEST_MAX:
        tally.corruption(f"a manifest of {manifest.size} bytes is larger than any archive needs", manifest.at)
        return
    members = {one.name: one for one in archive.members}
    text = (await reader.read(manifest.data, manifest.size)).decode("utf-8", "replace")
    proven: set[str] = set()
    for line in text.splitlines():
        if not line.strip():
            continue
        parsed = _LINE.fullmatch(line.strip())
        if parsed is None or parsed[1] not in _ALGORITHMS:
            tally.corruption("a line of the manifest can't be read", manifest.data)
            continue
        one = members.get(parsed[2])
        if one is None:
            tally.corruption(f"the manifest names {parsed[2][:80]!r}, which is not in the archive", manifest.data)
            continue
        if one.name in proven:
            continue
        proven.add(one.name)
        if deep and await _digest(reader, one, _ALGORITHMS[parsed[1]]) != parsed[3].lower():
            tally.corruption(f"{one.name[:80]!r} has another digest than the manifest says", one.data)
    for one in archive.members:
        if one.name not in proven and not one.name.lower().endswith((".mf", ".cert")):
            tally.warning(f"the manifest does not name {one.name[:80]!r}", one.at)


async def _digest(reader: RangeReader, member: Member, algorithm: str) -> str:
    made = hashlib.new(algorithm)
    for start in range(0, member.size, _READ):
        made.update(await reader.read(member.data + start, min(_READ, member.size - start)))
    return made.hexdigest()
