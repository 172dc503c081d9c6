"""What a guest shows: pictures of its screen, and the letters of its text mode.

Source: Netpbm, ppm(5); PNG (ISO/IEC 15948), sections 5.2 and 11.2; IBM VGA text mode: a character and its colours in
two bytes at 0xB8000.
"""

from __future__ import annotations

import re
import struct
import zlib

_PPM = re.compile(rb"P6\s+(\d+)\s+(\d+)\s+255\s", re.DOTALL)
# No guest's screen is larger here; a larger picture is not believed.
_PIXELS_MAX = 4096 * 4096
TEXT_COLUMNS, TEXT_ROWS = 80, 25


def png_of(ppm: bytes) -> bytes:
    """A screen dump of QEMU as PNG; empty where it is none."""
    match = _PPM.match(ppm)
    if match is None:
        return b""
    width, height = int(match[1]), int(match[2])
    pixels = ppm[match.end() :]
    if width * height > _PIXELS_MAX or len(pixels) != 3 * width * height or not pixels:
        return b""
    row = 3 * width
    lines = b"".join(b"\0" + pixels[start : start + row] for start in range(0, len(pixels), row))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(lines, 6)) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def is_text_mode(ppm: bytes) -> bool:
    """Whether a screen dump has the size of VGA's text mode, 80 x 25 letters."""
    match = _PPM.match(ppm)
    return match is not None and (int(match[1]), int(match[2])) in ((720, 400), (640, 400))


def is_blank(ppm: bytes) -> bool:
    """Whether all of a screen dump has one colour."""
    match = _PPM.match(ppm)
    pixels = ppm[match.end() :] if match else b""
    return len(pixels) < 6 or pixels == pixels[:3] * (len(pixels) // 3)


def text_of(dump: str) -> str:
    """The letters of text mode, from the answer to the monitor's `xp /2000hx 0xb8000`."""
    cells = re.findall(r"0x([0-9a-f]{4})\b", re.sub(r"^[0-9a-f]+:", "", dump, flags=re.MULTILINE))
    letters = "".join(chr(code) if 32 <= code < 127 else " " for code in (int(cell, 16) & 0xFF for cell in cells))
    rows = [letters[start : start + TEXT_COLUMNS].rstrip() for start in range(0, len(letters), TEXT_COLUMNS)]
    return "\n".join(rows[:TEXT_ROWS]).strip("\n")
