"""CRC-32C, which three filesystems guard their structures with."""

from __future__ import annotations


def crc32c(data: bytes | memoryview, previous: int = 0) -> int:
    """The CRC-32C of `data` behind what gave `previous`."""
    # Here: a run that meets no such filesystem does without the library.
    from awscrt import checksums

    made: int = checksums.crc32c(bytes(data), previous)
    return made
