"""Virtual sizes that a format or an importer wants rounded up."""

from __future__ import annotations

from pipeline.units import format_exact, format_size, round_up


def round_disk(disk_size: int, multiple: int, reason: str) -> tuple[int, tuple[str, ...]]:
    """The virtual size, and a note for the user where it is not the disk's own.

    Args:
        reason: who wants whole multiples; completes "because ...".
    """
    size = round_up(disk_size, multiple)
    if size == disk_size:
        return size, ()
    note = (
        f"the virtual disk is rounded up from {format_exact(disk_size)} to {format_exact(size)}, "
        f"a multiple of {format_size(multiple)}, because {reason}; the added bytes are zero"
    )
    return size, (note,)
