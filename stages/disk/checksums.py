"""CRC-32C, which three filesystems guard their structures with."""

from __future__ import annotations


def crc32c(data: bytes | memoryview, previous: int = 0) -> int:
    """The CRC-32C of `data` behind what gave `previous`."""
    # Here: a run that meets no such filesystem does without the library.
    import google_crc32c

    made: int = google_crc32c.extend(previous, bytes(data))
    return made
