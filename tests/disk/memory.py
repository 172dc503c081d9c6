"""Disks in memory, where most is zero."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import FormatError
from pipeline.units import KiB

_BLOCK = 4 * KiB


class Memory:
    """A RangeReader over bytes in memory; what was not written is zero. Counts what is read."""

    def __init__(self, size: int, parts: dict[int, bytes] | None = None) -> None:
        self.size = size
        self.bytes_read = 0
        self._blocks: dict[int, bytearray] = {}
        for offset, data in (parts or {}).items():
            self.write(offset, data)

    @classmethod
    def of(cls, image: Path) -> Memory:
        """A copy of a file, without its zeros."""
        made = cls(image.stat().st_size)
        with image.open("rb") as file:
            for number in range(-(-made.size // _BLOCK)):
                data = file.read(_BLOCK)
                if data.count(0) != len(data):
                    made._blocks[number] = bytearray(data.ljust(_BLOCK, b"\0"))
        return made

    def clone(self) -> Memory:
        """A copy that shares nothing that is written later."""
        made = Memory(self.size)
        made._blocks = dict(self._blocks)
        return made

    def write(self, offset: int, data: bytes) -> None:
        """Replace bytes."""
        while data:
            number, inside = divmod(offset, _BLOCK)
            step = min(len(data), _BLOCK - inside)
            block = bytearray(self._blocks.get(number, bytes(_BLOCK)))
            block[inside : inside + step] = data[:step]
            self._blocks[number] = block
            offset, data = offset + step, data[step:]

    def peek(self, offset: int, length: int) -> bytes:
        """Look without counting."""
        made = bytearray()
        while len(made) < length:
            number, inside = divmod(offset + len(made), _BLOCK)
            block = self._blocks.get(number, bytes(_BLOCK))
            made += block[inside : inside + length - len(made)]
        return bytes(made)

    def filled(self) -> list[int]:
        """Offsets of the blocks of 4 KiB that hold anything."""
        return [number * _BLOCK for number in sorted(self._blocks)]

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError("outside", offset=offset, length=length)
        self.bytes_read += length
        return self.peek(offset, length)
