"""Headers of tar members.

Source: POSIX.1-1988 ("ustar"), and the GNU tar manual, "Basic Tar Format" (oldgnu magic, base-256 numbers).
"""

from __future__ import annotations

from typing import Literal

BLOCK = 512
RECORD = 20 * BLOCK  # an archive is padded to whole ones
_OCTAL_MAX = 8**11

_MAGIC = {"oldgnu": b"ustar  \0", "ustar": b"ustar\x0000"}


def member_header(name: str, size: int, *, dialect: Literal["oldgnu", "ustar"], time: int = 0) -> bytes:
    """The 512 bytes before a regular file.

    Args:
        name: at most 99 ASCII characters.
        size: bytes; from 8 GiB on as a base-256 number, which every reader of today knows.
        time: seconds since 1970.
    """
    encoded = name.encode("ascii")
    assert len(encoded) < 100, "longer names need a header of their own"
    length = b"%011o\0" % size if size < _OCTAL_MAX else b"\x80" + size.to_bytes(11, "big")
    before = (
        encoded.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" + b"0000000\0" + length + b"%011o\0" % time
    )  # mode, owner, group
    after = (b"0" + bytes(100) + _MAGIC[dialect] + b"root".ljust(32, b"\0") * 2).ljust(BLOCK - 156, b"\0")
    checksum = sum(before) + 8 * ord(" ") + sum(after)
    return before + b"%06o\0 " % checksum + after


def archive_end(length: int) -> int:
    """How many zeros end an archive that is `length` bytes long so far: two blocks at least, up to a whole record."""
    return 2 * BLOCK + -(length + 2 * BLOCK) % RECORD
