"""Read the stored image back, decode it, and compare it with the disk that was read, byte for byte.

The proof rests on the guest digest, which was taken before any zero was skipped, and on a decoder that shares no code
with the encoder. A fault of the source's own map (a hole that is none) would mislead both; so a sample of what was
never read is read after all.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import anyio.to_thread

from pipeline.flow.items import Block, StoredImage, Verdict
from pipeline.flow.mapping import SKIPPED_RANGES
from pipeline.flow.stage import STORED_IMAGE, VERDICT, StageContext, StageSpec, option
from stages.checksum.leaves import GUEST_DIGEST, LEAF, Algorithm, hash_leaves, zero_leaf
from stages.compress.index import FRAME_INDEX
from stages.verify.comparison import TOLD_MAX, WINDOW, ProgressReport, verify_image

# Windows of never read ranges that are read after all: 32 MiB, a blink beside the image. More would find a map that is
# wrong in few places a little sooner.
SAMPLE_WINDOWS = 16
_DRAWS_MAX = 8 * SAMPLE_WINDOWS


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    parallel: int = option(
        4, doc="Windows of 2 MiB in flight; each holds up to 6 MiB. More helps far away stores.", minimum=1
    )


class Readback:
    """Compare every byte of the stored image with the guest digest."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._parallel = options.parallel
        self._context = context

    async def verify(self, image: StoredImage) -> Verdict:
        """Read all of it. A damaged image is the verdict "differs", with the reason.

        Raises:
            StoreError: the image can't be read.
            SourceError: the sample of skipped ranges can't be read.
        """
        context = self._context
        digest = context.facts.get(GUEST_DIGEST)
        if context.layout is None:
            return Verdict("readback", "unproven", 0.0, detail="the format of the image is not known")
        async with image.open_reader() as reader:
            verdict = await verify_image(
                reader,
                context.layout.format,
                digest,
                virtual_size=context.layout.virtual_size,
                image_size=image.size,
                parallel=self._parallel,
                threads=context.threads,
                ledger=context.ledger,
                progress=ProgressReport(context.name, context.emit, context.clock),
                index=context.facts.find(FRAME_INDEX),
            )
        skipped = context.facts.find(SKIPPED_RANGES)
        if verdict.state != "identical" or context.reload is None or not skipped:
            return verdict
        return await self._sample_skipped(verdict, skipped, context.reload, digest.algorithm, digest.root)

    async def _sample_skipped(
        self,
        verdict: Verdict,
        skipped: Sequence[range],
        reload: Callable[[int, int], AsyncIterator[Block]],
        algorithm: Algorithm,
        seed: str,
    ) -> Verdict:
        """Read a few of the ranges that were skipped; they must be zero in the source."""
        window = self._context.window or WINDOW
        sample = sampled_windows(skipped, window, seed)
        found: list[range] = []
        reread = 0
        for start in sample:
            async for block in reload(start, min(window, self._context.disk_size - start)):
                parts = tuple(overlaps(skipped, block.offset, block.end))
                try:
                    if block.data is not None:
                        found += await anyio.to_thread.run_sync(
                            _not_zero, algorithm, block.offset, block.data.view, parts, limiter=self._context.threads
                        )
                        reread += sum(map(len, parts))
                finally:
                    block.release()
        evidence = {**verdict.evidence, "skipped_reread": f"{len(sample)} windows, {reread} bytes"}
        if not found:
            return replace(verdict, evidence=evidence)
        return replace(
            verdict,
            state="differs",
            differing=tuple(found[:TOLD_MAX]),
            detail=f"the source holds data at {found[0].start}, where its map said that nothing is stored",
            evidence=evidence,
        )


def sampled_windows(skipped: Sequence[range], window: int, seed: str) -> list[int]:
    """Guest offsets of up to `SAMPLE_WINDOWS` different windows that touch skipped ranges, the same for a seed.

    Large ranges are drawn more often: every skipped byte has the same chance.
    """
    ends = list(accumulate(map(len, skipped)))
    draw = random.Random(seed)
    chosen: set[int] = set()
    for _ in range(_DRAWS_MAX):
        place = draw.randrange(ends[-1])
        number = bisect_right(ends, place)
        offset = skipped[number].stop - (ends[number] - place)
        chosen.add(offset - offset % window)
        if len(chosen) == SAMPLE_WINDOWS:
            break
    return sorted(chosen)


def overlaps(ranges: Sequence[range], start: int, stop: int) -> list[range]:
    """The parts of ascending ranges that lie inside [start, stop)."""
    made = []
    for number in range(max(0, bisect_right(ranges, start, key=lambda one: one.start) - 1), len(ranges)):
        one = ranges[number]
        if one.start >= stop:
            break
        if max(start, one.start) < min(stop, one.stop):
            made.append(range(max(start, one.start), min(stop, one.stop)))
    return made


def _not_zero(algorithm: Algorithm, offset: int, data: memoryview, parts: Sequence[range]) -> list[range]:
    """The parts (guest ranges) of a block at guest `offset` that are not zero. Runs in a worker thread."""
    made = []
    for part in parts:
        view = data[part.start - offset : part.stop - offset]
        whole = zero_leaf(algorithm, min(LEAF, view.nbytes))
        tail = zero_leaf(algorithm, view.nbytes % LEAF or min(LEAF, view.nbytes))
        *most, last = hash_leaves(algorithm, view)
        if last != tail or any(one != whole for one in most):
            made.append(part)
    return made


SPEC = StageSpec(
    name="verify.readback",
    summary="Read the whole stored image back, decode it, and compare it with the disk that was read.",
    options=Options,
    takes=STORED_IMAGE,
    gives=VERDICT,
    build=Readback,
    needs=(GUEST_DIGEST,),
)
