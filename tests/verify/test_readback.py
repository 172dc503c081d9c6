"""verify.readback as a stage: facts, events, and the sample of ranges that were never read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from pipeline.errors import SourceError, StageError
from pipeline.events import Event, VerifyProgressed
from pipeline.flow.buffers import Slice, loose_slice
from pipeline.flow.items import Block, Content, RangeReader, Run, StoredImage, Why
from pipeline.flow.mapping import SKIPPED_RANGES
from pipeline.flow.stage import Layout, StageContext
from pipeline.units import KiB, MiB
from stages.checksum.leaves import GUEST_DIGEST, GuestDigest, LeafDigests, hash_leaves
from stages.verify.readback import SAMPLE_WINDOWS, SPEC, Options, Readback, overlaps, sampled_windows
from tests.decode.images import BytesReader, mixed_disk
from tests.verify.context import StillClock, make_context

WINDOW = 2 * MiB
DISK = mixed_disk(9 * MiB + 512, seed=21)


def stored(image: bytes) -> StoredImage:
    @asynccontextmanager
    async def open_reader() -> AsyncIterator[RangeReader]:
        yield BytesReader(image)

    return StoredImage("memory:image", len(image), open_reader)


def context_for(disk: bytes, *, events: list[Event] | None = None, **more: object) -> StageContext:
    layout = Layout(format="raw", virtual_size=len(disk), head_length=0, image_bytes_max=len(disk))
    context = make_context(SPEC.name, disk_size=len(disk), events=events, layout=layout)
    digests = LeafDigests("blake3", len(disk))
    digests.add(b"".join(hash_leaves("blake3", memoryview(disk))))
    context.facts.put(GUEST_DIGEST, GuestDigest(digests))
    return replace(context, **more)  # type: ignore[arg-type]  # field names are checked by the dataclass


class Source:
    """The disk as it is now, read in whole windows; counts slices that were not released."""

    def __init__(self, disk: bytes) -> None:
        self.disk = disk
        self.loaded: list[int] = []
        self.slices: list[Slice] = []

    async def reload(self, offset: int, length: int) -> AsyncIterator[Block]:
        for start in range(offset - offset % WINDOW, offset + length, WINDOW):
            data = self.disk[start : start + WINDOW]
            self.loaded.append(start)
            # One buffer: the one before must be back.
            assert all(len(one) == 0 for one in self.slices)
            self.slices.append(loose_slice(data))
            yield Block(start, len(data), self.slices[-1], (Run(start, len(data), Content.DATA, Why.READ),))


async def test_the_stage_says_identical_and_what_it_compared() -> None:
    verdict = await Readback(Options(), context_for(DISK)).verify(stored(DISK))
    assert (verdict.level, verdict.state, verdict.coverage) == ("readback", "identical", 1.0)
    assert verdict.evidence["algorithm"] == "blake3"


async def test_the_stage_says_differs_with_the_guest_range() -> None:
    image = bytearray(DISK)
    image[5 * MiB + 3] ^= 1
    verdict = await Readback(Options(), context_for(DISK)).verify(stored(bytes(image)))
    assert verdict.state == "differs"
    assert verdict.differing == (range(5 * MiB, 6 * MiB),)


async def test_without_a_guest_digest_the_missing_stage_is_named() -> None:
    context = make_context(SPEC.name, disk_size=512)
    with pytest.raises(StageError) as caught:
        await Readback(Options(), context).verify(stored(bytes(512)))
    assert "checksum.guest" in caught.value.hint


async def test_progress_is_told_at_most_four_times_a_second() -> None:
    events: list[Event] = []
    context = context_for(DISK, events=events)
    await Readback(Options(), context).verify(stored(DISK))
    told = [event for event in events if isinstance(event, VerifyProgressed)]
    assert [event.done_bytes for event in told][-1] == len(DISK)
    assert len(told) == 2  # the clock stands still: the first and the last
    assert {event.total_bytes for event in told} == {len(DISK)}
    assert isinstance(context.clock, StillClock)


async def test_a_sample_of_what_was_skipped_is_read_after_all() -> None:
    disk = bytearray(DISK + bytes(100 * MiB))
    source = Source(bytes(disk))
    context = context_for(bytes(disk), reload=source.reload)
    context.facts.put(SKIPPED_RANGES, (range(10 * MiB, len(disk)),))
    verdict = await Readback(Options(), context).verify(stored(bytes(disk)))
    assert verdict.state == "identical"
    assert len(source.loaded) == SAMPLE_WINDOWS
    assert verdict.evidence["skipped_reread"].startswith(f"{SAMPLE_WINDOWS} windows, ")
    assert all(len(one) == 0 for one in source.slices)


async def test_data_where_the_map_says_hole_is_found() -> None:
    """The image agrees with the digest, both came from the same wrong map: only the source knows better."""
    disk = DISK + bytes(32 * MiB)
    actual = bytearray(disk)
    actual[10 * MiB :] = b"lost" * (len(actual[10 * MiB :]) // 4)
    source = Source(bytes(actual))
    context = context_for(disk, reload=source.reload)
    context.facts.put(SKIPPED_RANGES, (range(10 * MiB, len(disk)),))
    verdict = await Readback(Options(), context).verify(stored(disk))
    assert verdict.state == "differs"
    assert "its map said" in verdict.detail
    assert verdict.differing[0].start >= 10 * MiB
    assert all(len(one) == 0 for one in source.slices)


async def test_only_the_skipped_part_of_a_window_has_to_be_zero() -> None:
    """A hole of 4 KiB amid data: its neighbours are not zero, and a byte inside it is found."""
    disk = bytearray(b"data" * (WINDOW // 4))
    disk[64 * KiB : 68 * KiB] = bytes(4 * KiB)
    for changed, state in ((None, "identical"), (64 * KiB, "differs"), (68 * KiB - 1, "differs")):
        actual = bytearray(disk)
        if changed is not None:
            actual[changed] = 1
        context = context_for(bytes(disk), reload=Source(bytes(actual)).reload)
        context.facts.put(SKIPPED_RANGES, (range(64 * KiB, 68 * KiB),))
        assert (await Readback(Options(), context).verify(stored(bytes(disk)))).state == state


async def test_a_source_that_fails_in_the_sample_is_no_verdict() -> None:
    async def reload(offset: int, length: int) -> AsyncIterator[Block]:
        raise SourceError("the cable was pulled", offset=offset)
        yield  # type: ignore[unreachable]  # makes it a generator

    context = context_for(DISK, reload=reload)
    context.facts.put(SKIPPED_RANGES, (range(MiB, 2 * MiB),))
    with pytest.raises(SourceError, match="cable"):
        await Readback(Options(), context).verify(stored(DISK))


@pytest.mark.parametrize("skipped", [None, ()])
async def test_nothing_skipped_means_nothing_to_sample(skipped: tuple[range, ...] | None) -> None:
    source = Source(DISK)
    context = context_for(DISK, reload=source.reload)
    if skipped is not None:
        context.facts.put(SKIPPED_RANGES, skipped)
    verdict = await Readback(Options(), context).verify(stored(DISK))
    assert verdict.state == "identical"
    assert source.loaded == []


def test_the_sample_is_the_same_for_a_seed_and_touches_only_skipped_windows() -> None:
    skipped = [range(start, start + 300 * KiB) for start in range(MiB, 4000 * MiB, 40 * MiB)]
    first = sampled_windows(skipped, WINDOW, "seed")
    assert first == sampled_windows(skipped, WINDOW, "seed")
    assert first != sampled_windows(skipped, WINDOW, "another seed")
    assert len(first) == SAMPLE_WINDOWS
    assert all(overlaps(skipped, start, start + WINDOW) for start in first)
    assert sampled_windows([range(5 * MiB, 5 * MiB + 1)], WINDOW, "seed") == [4 * MiB]


def test_overlaps_are_cut_to_the_window() -> None:
    ranges = [range(10), range(20, 30), range(40, 50)]
    assert overlaps(ranges, 5, 45) == [range(5, 10), range(20, 30), range(40, 45)]
    assert overlaps(ranges, 10, 20) == []
    assert overlaps(ranges, 25, 26) == [range(25, 26)]
    assert overlaps([], 0, 9) == []
