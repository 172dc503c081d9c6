"""Unified kernel images: kernel, initramfs and command line as sections of one EFI program.

Source: Microsoft PE Format, "COFF File Header" and "Section Table"; UAPI Group, "UAPI.5 Unified Kernel Image".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from stages.disk.tree import View

_SECTIONS_MAX = 96  # what the PE loaders of Windows and systemd take
_TEXT_MAX = 64 << 10


@dataclass(frozen=True, slots=True)
class PeSection:
    """Where a section lies in the file. Bytes."""

    offset: int
    length: int


async def read_sections(view: View, path: str) -> dict[str, PeSection]:
    """The sections of an EFI program by name; none where it is no such program.

    Raises:
        OSError: it can't be read.
    """
    head = await view.read_at(path, 0, 64)
    if len(head) < 64 or head[:2] != b"MZ":
        return {}
    at = struct.unpack_from("<I", head, 60)[0]
    coff = await view.read_at(path, at, 24)
    if len(coff) < 24 or coff[:4] != b"PE\0\0":
        return {}
    count, optional = struct.unpack_from("<H", coff, 6)[0], struct.unpack_from("<H", coff, 20)[0]
    table = await view.read_at(path, at + 24 + optional, 40 * min(count, _SECTIONS_MAX))
    found: dict[str, PeSection] = {}
    for start in range(0, len(table) - 39, 40):
        name = table[start : start + 8].rstrip(b"\0").decode("ascii", "replace")
        virtual, _, raw, offset = struct.unpack_from("<IIII", table, start + 8)
        # What is behind the virtual size only fills the file up.
        found.setdefault(name, PeSection(offset, min(virtual, raw) if virtual else raw))
    return found


async def section_text(view: View, path: str, section: PeSection) -> str:
    """A section that holds text (.cmdline, .uname, .osrel). Raises OSError."""
    raw = await view.read_at(path, section.offset, min(section.length, _TEXT_MAX))
    return raw.partition(b"\0")[0].decode("utf-8", "backslashreplace").strip()
