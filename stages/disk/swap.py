"""The used part of a swap area: its header page.

Source: Linux include/linux/swap.h, "union swap_header".
"""

from __future__ import annotations

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader, Why
from stages.disk.signatures import SWAP_MAGICS, SWAP_PAGES
from stages.disk.usage import RangeSet, Refusal, UsedMap, take_witness


async def map_swap(reader: RangeReader, kind: str, *, frozen: bool = False) -> UsedMap | Refusal:
    """Keep the page that carries label and UUID; what was swapped out means nothing to another machine.

    Raises:
        FormatError: it has no header.
    """
    head = await reader.read(0, min(SWAP_PAGES[-1], reader.size))
    page = next((page for page in SWAP_PAGES if head[page - 10 : page] in SWAP_MAGICS), None)
    if page is None:
        raise FormatError("there is no swap header")
    ranges = RangeSet(reader.size)
    ranges.add(0, page)
    starts, lengths = ranges.finish()
    return UsedMap(
        filesystem=kind,
        size=reader.size,
        starts=starts,
        lengths=lengths,
        unit=page,
        units_used=1,
        free=Why.SWAP,
        witness=await take_witness(reader, [(0, page)]),
    )
