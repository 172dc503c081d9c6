"""Reading a range of an object that a store gives out in requests of limited length."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pipeline.errors import FormatError


async def read_ranged(
    fetch: Callable[[int, int], Awaitable[bytes]],
    offset: int,
    length: int,
    *,
    size: int,
    range_max: int,
    what: str = "object",
) -> bytes:
    """Exactly these bytes, by as many requests as it takes, one after the other.

    Args:
        fetch: gives exactly `length` bytes at an `offset`, for lengths up to `range_max`.
        size: of the object, in bytes.
        what: the store's word for it.
    Raises:
        FormatError: the range ends behind the object. Whatever `fetch` raises.
    """
    if offset < 0 or length < 0 or offset + length > size:
        raise FormatError(
            f"the {what} ends before this range", operation="read", offset=offset, length=length, size=size
        )
    pieces = [
        await fetch(start, min(range_max, offset + length - start))
        for start in range(offset, offset + length, range_max)
    ]
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
