"""Read the text descriptor of a VMDK. What it says is data: names in it are compared, never opened.

Source: VMware, Virtual Disk Format 5.0, "The Descriptor".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.units import MiB
from stages.decode.refusal import corrupt, unsupported

FIRST_LINE = b"# Disk DescriptorFile"
# VMware reserves 10 KiB; QEMU takes up to 2 GiB. An extent line of 80 bytes per 2 GiB fits for every disk.
DESCRIPTOR_MAX = MiB
EXTENTS_MAX = 4096
NO_PARENT = 0xFFFFFFFF
SECTOR = 512

FLAT_KINDS = frozenset({"FLAT", "VMFS"})
_EXTENT = re.compile(
    r'(RW|RDONLY|NOACCESS)[ \t]+(\d{1,19})[ \t]+([A-Z0-9]+)(?:[ \t]+"([^"]*)"(?:[ \t]+(\d{1,19}))?)?.*'
)
_ASSIGNMENT = re.compile(r"([\w.]+)\s*=\s*(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtentLine:
    """One line of the extent description.

    Attributes:
        size: bytes of the guest disk.
        kind: FLAT, VMFS, ZERO, SPARSE or another word.
        name: of the file; only ever compared with what the user named.
        start: byte of the file where a flat extent begins.
    """

    access: str
    size: int
    kind: str
    name: str
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A parsed descriptor."""

    create_type: str
    content_id: str
    parent_id: str
    extents: tuple[ExtentLine, ...]
    values: tuple[tuple[str, str], ...]
    unknown_lines: int

    @property
    def size(self) -> int:
        """Bytes of the guest disk."""
        return sum(one.size for one in self.extents)


def parse_descriptor(raw: bytes, at: int) -> Descriptor:
    """Parse a descriptor; what follows its first zero byte is padding.

    Args:
        at: image offset of the descriptor, for errors.
    Raises:
        FormatError: not a descriptor, or one of a disk that needs a parent.
    """
    text = raw.split(b"\0", 1)[0]
    if not text.lstrip().lower().startswith(FIRST_LINE.lower()):
        raise corrupt("vmdk", "its descriptor does not begin like one", at)
    values: dict[str, str] = {}
    extents: list[ExtentLine] = []
    unknown = 0
    for line in (one.strip() for one in text.decode("latin-1").splitlines()):
        if not line or line.startswith("#"):
            continue
        if extent := _EXTENT.fullmatch(line):
            extents.append(_extent(extent, at))
        elif pair := _ASSIGNMENT.fullmatch(line):
            values.setdefault(pair[1].lower(), pair[2].strip().strip('"'))
        else:
            unknown += 1
    if len(extents) > EXTENTS_MAX:
        raise corrupt("vmdk", f"{len(extents)} extents are more than any disk needs ({EXTENTS_MAX})", at)
    parent = values.get("parentcid", f"{NO_PARENT:x}").lower()
    if parent != f"{NO_PARENT:x}" or "parentfilenamehint" in values:
        raise unsupported(
            "vmdk", "a parent disk (snapshot or linked clone)", at, hint="Consolidate its snapshots first."
        )
    return Descriptor(
        create_type=values.get("createtype", ""),
        content_id=values.get("cid", "").lower(),
        parent_id=parent,
        extents=tuple(extents),
        values=tuple(values.items()),
        unknown_lines=unknown,
    )


def _extent(line: re.Match[str], at: int) -> ExtentLine:
    size, start = int(line[2]) * SECTOR, int(line[5] or 0) * SECTOR
    if not 0 < size < 1 << 63 or start >= 1 << 63:
        raise corrupt("vmdk", f"an extent of {size} bytes is not possible", at)
    if line[1] == "NOACCESS":
        raise unsupported("vmdk", "an extent that may not be read (NOACCESS)", at)
    return ExtentLine(access=line[1], size=size, kind=line[3], name=line[4] or "", start=start)
