"""What the checkers share: finding blocks that overlap in bounded memory, and reading every stored block."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import anyio.to_thread

from pipeline.errors import FormatError
from pipeline.units import MiB
from stages.decode.check.report import Tally
from stages.decode.image import DecodedImage, Fetched

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Blocks whose places are held and sorted at once: 64 MiB with their guest offsets and the copy that sorting makes.
ITEMS_MAX = 2 * MiB
WINDOW = 2 * MiB

# Batches of (image offsets, guest offsets) of stored blocks.
Places = Callable[[], "AsyncIterator[tuple[NDArray[np.int64], NDArray[np.int64]]]"]


async def find_overlaps(places: Places, length: int, image_size: int, tally: Tally, *, items: int = ITEMS_MAX) -> None:
    """Note blocks of `length` bytes that share bytes of the image.

    Args:
        places: called once for every window of the image that is looked at; offsets must be checked before.
        items: blocks held at once; with more of them the image is looked at in several windows.
    """
    import numpy as np

    total = 0
    async for at, _ in places():
        total += at.size
    if not total:
        return
    step = image_size if total <= items else items * length
    for low in range(0, image_size, step):
        high = low + step
        held: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        count = 0
        async for at, guest in places():
            inside = (at >= low - length) & (at < high)
            held.append((at[inside], guest[inside]))
            count += int(np.count_nonzero(inside))
            if count > 2 * items + 2:
                tally.corruption("blocks overlap: more of them begin here than have room", low)
                return
        starts = np.concatenate([at for at, _ in held])
        guests = np.concatenate([guest for _, guest in held])
        order = np.argsort(starts, kind="stable")
        starts, guests = starts[order], guests[order]
        close = np.flatnonzero((np.diff(starts) < length) & (starts[1:] >= low)) + 1
        if close.size:
            for index in close[:16]:
                tally.corruption(
                    f"two blocks overlap: the one at guest offset {guests[index - 1]} and this one",
                    int(starts[index]),
                    int(guests[index]),
                )
            tally.count_more_corruptions(int(close.size) - min(16, int(close.size)))


async def read_everything(image: DecodedImage, block: int, tally: Tally, *, base: int = 0) -> None:
    """Read and unpack every stored block; what fails is noted block by block.

    Args:
        block: bytes of a block of the format, to tell which one fails.
        base: added to the image offset of what is noted.
    """
    try:
        async for extent in image.extents(0, image.size):
            if extent.is_zero:
                continue
            for start in range(extent.offset, extent.end, WINDOW):
                length = min(WINDOW, extent.end - start)
                if await _read(image, start, length) is None:
                    continue
                for offset in range(start, start + length, block):
                    error = await _read(image, offset, min(block, start + length - offset))
                    if error is not None:
                        tally.error(error, base=base)
    except FormatError as error:
        tally.error(error, base=base)


async def _read(image: DecodedImage, offset: int, length: int) -> FormatError | None:
    try:
        fetched = await image.fetch(offset, length)
        await anyio.to_thread.run_sync(_decode, image, fetched)
    except FormatError as error:
        return error
    return None


def _decode(image: DecodedImage, fetched: Fetched) -> None:
    image.decode(fetched, memoryview(bytearray(fetched.length)))
