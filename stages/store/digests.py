"""Checksums of what is sent to a store: computed once, in threads, and combined over parts without reading again.

Source: Amazon S3 User Guide, "Checking object integrity" (full-object and composite checksums); RFC 1864.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, Protocol

from pipeline.units import MiB

Buffer = bytes | bytearray | memoryview

# Zeros are sent, and summed, from this one buffer.
ZEROS = memoryview(bytes(MiB))


class Algorithm(Flag):
    """Which sums a store can use; several may be asked for at once."""

    CRC64NVME = auto()
    CRC32C = auto()
    MD5 = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """The checksums of a range of bytes; None where one was not asked for.

    Attributes:
        length: bytes summed.
    """

    length: int
    crc64nvme: int | None = None
    crc32c: int | None = None
    md5: bytes | None = None

    @property
    def crc64nvme_text(self) -> str:
        """As S3 headers have it; empty where there is none."""
        return "" if self.crc64nvme is None else base64.b64encode(self.crc64nvme.to_bytes(8, "big")).decode()

    @property
    def crc32c_text(self) -> str:
        """As S3 headers have it; empty where there is none."""
        return "" if self.crc32c is None else base64.b64encode(self.crc32c.to_bytes(4, "big")).decode()

    @property
    def md5_text(self) -> str:
        """As the Content-MD5 header has it; empty where there is none."""
        return "" if self.md5 is None else base64.b64encode(self.md5).decode()


class RunningSums:
    """Sums bytes that come one after the other.

    Threads: any, one call at a time; at least 1 MiB a call lets other threads run.
    """

    def __init__(self, algorithms: Algorithm) -> None:
        self._algorithms = algorithms
        self._length = 0
        self._crc64nvme = 0
        self._crc32c = 0
        # Not for secrecy: it is what the protocol calls for, also where a policy forbids MD5.
        self._md5 = hashlib.md5(usedforsecurity=False) if Algorithm.MD5 in algorithms else None

    def update(self, data: Buffer) -> None:
        """Add bytes."""
        self._length += memoryview(data).nbytes
        if Algorithm.CRC64NVME in self._algorithms:
            self._crc64nvme = _crt().crc64nvme(data, self._crc64nvme)
        if Algorithm.CRC32C in self._algorithms:
            self._crc32c = _crt().crc32c(data, self._crc32c)
        if self._md5 is not None:
            self._md5.update(data)

    def update_zeros(self, count: int) -> None:
        """Add `count` zero bytes."""
        while count > 0:
            self.update(ZEROS[:count])
            count -= len(ZEROS)

    def value(self) -> Sums:
        """The sums of everything so far."""
        return Sums(
            length=self._length,
            crc64nvme=self._crc64nvme if Algorithm.CRC64NVME in self._algorithms else None,
            crc32c=self._crc32c if Algorithm.CRC32C in self._algorithms else None,
            md5=self._md5.digest() if self._md5 is not None else None,
        )


def _crt() -> Any:
    """The library, when something is summed: importing it takes a tenth of the time to the first byte of every run."""
    from awscrt import checksums

    return checksums


class Summed(Protocol):
    """Anything with sums."""

    @property
    def sums(self) -> Sums: ...


def combined_crc64nvme(parts: Iterable[Sums]) -> int | None:
    """The CRC64NVME of parts put together, in order; None where a part has none."""
    total = 0
    for part in parts:
        if part.crc64nvme is None:
            return None
        total = _crt().combine_crc64nvme(total, part.crc64nvme, part.length)
    return total


def combined_crc32c(parts: Iterable[Sums]) -> int | None:
    """The CRC32C of parts put together, in order; None where a part has none."""
    total = 0
    for part in parts:
        if part.crc32c is None:
            return None
        total = _crt().combine_crc32c(total, part.crc32c, part.length)
    return total


def composite_crc32c(parts: Iterable[Sums]) -> str | None:
    """The CRC32C of the parts' CRC32Cs, as S3 writes it: base64, a hyphen, how many parts."""
    values = [part.crc32c for part in parts]
    raw = b"".join(value.to_bytes(4, "big") for value in values if value is not None)
    if len(raw) != 4 * len(values):
        return None
    return base64.b64encode(_crt().crc32c(raw).to_bytes(4, "big")).decode() + f"-{len(values)}"


def composite_md5(parts: Iterable[Sums]) -> str | None:
    """The MD5 of the parts' MD5s, as an S3 ETag has it: hex, a hyphen, how many parts."""
    values = [part.md5 for part in parts]
    found = [value for value in values if value is not None]
    if len(found) != len(values):
        return None
    return hashlib.md5(b"".join(found), usedforsecurity=False).hexdigest() + f"-{len(values)}"
