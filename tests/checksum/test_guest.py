"""checksum.guest over blocks of any window, and blocks that are read again."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from pipeline.errors import SourceError, StageError
from pipeline.flow.buffers import loose_slice
from pipeline.flow.items import Block, Content, Run, Why
from pipeline.units import MiB
from stages.checksum.guest import SPEC, GuestChecksum, Options
from stages.checksum.leaves import GUEST_DIGEST, Algorithm, GuestDigest
from tests.verify.context import make_context

SIZE = 11 * MiB + 512


def disk() -> bytearray:
    draw = random.Random(4)
    return bytearray(draw.randbytes(3 * MiB) + bytes(5 * MiB) + draw.randbytes(MiB) + bytes(2 * MiB + 512))


def blocks(content: bytes | bytearray, window: int, *, skip: bool) -> Iterator[Block]:
    """The disk as blocks; with `skip`, neighbouring windows of zeros are one block without data."""
    start = 0
    while start < len(content):
        end = min(start + window, len(content))
        while skip and end < len(content) and not any(content[start : end + window]):
            end = min(end + window, len(content))
        part = content[start:end]
        if skip and not any(part):
            yield Block(start, len(part), None, (Run(start, len(part), Content.ZERO, Why.HOLE),))
        else:
            yield Block(start, len(part), loose_slice(part), (Run(start, len(part), Content.DATA, Why.READ),))
        start = end


def observed(content: bytes | bytearray, window: int, *, skip: bool, algorithm: Algorithm) -> GuestChecksum:
    context = make_context(SPEC.name, disk_size=len(content))
    stage = GuestChecksum(Options(algorithm=algorithm), context)
    for block in blocks(content, window, skip=skip):
        same, note = stage.apply(block)
        assert same is block
        stage.observe(note)
    return stage


def digest(stage: GuestChecksum) -> GuestDigest:
    stage.finish()
    return stage._context.facts.get(GUEST_DIGEST)


@pytest.mark.parametrize("algorithm", ["xxh3-128", "blake3"])
def test_the_digest_depends_on_neither_window_nor_skipping(algorithm: Algorithm) -> None:
    content = disk()
    found = {
        digest(observed(content, window, skip=skip, algorithm=algorithm)).root
        for window in (2 * MiB, 4 * MiB)
        for skip in (True, False)
    }
    assert len(found) == 1
    content[-1] ^= 1
    assert digest(observed(content, 2 * MiB, skip=True, algorithm=algorithm)).root not in found


def test_the_two_algorithms_give_other_roots() -> None:
    content = disk()
    one, other = (digest(observed(content, 4 * MiB, skip=True, algorithm=a)) for a in ("xxh3-128", "blake3"))
    assert one.root != other.root
    assert len(bytes.fromhex(other.root)) == 32


def test_a_disk_that_ends_early_leaves_no_digest() -> None:
    context = make_context(SPEC.name, disk_size=SIZE)
    stage = GuestChecksum(Options(), context)
    first, *_ = blocks(disk(), 2 * MiB, skip=False)
    stage.observe(stage.apply(first)[1])
    with pytest.raises(StageError, match="not complete"):
        stage.finish()
    assert context.facts.find(GUEST_DIGEST) is None


@pytest.mark.parametrize("window", [2 * MiB, 4 * MiB])
def test_blocks_that_are_read_again_unchanged_are_confirmed(window: int) -> None:
    content = disk()
    stage = observed(content, window, skip=True, algorithm="xxh3-128")
    for skip in (True, False):
        for block in blocks(content, window, skip=skip):
            stage.confirm(stage.apply(block)[1], block.offset)


def confirm_all(stage: GuestChecksum, content: bytearray) -> None:
    for block in blocks(content, 2 * MiB, skip=True):
        stage.confirm(stage.apply(block)[1], block.offset)


@pytest.mark.parametrize("place", [0, 2 * MiB + 7, 4 * MiB, SIZE - 1])
def test_a_change_between_two_reads_is_told_with_its_place(place: int) -> None:
    content = disk()
    stage = observed(content, 2 * MiB, skip=True, algorithm="xxh3-128")
    content[place] ^= 0x80
    with pytest.raises(SourceError, match="changed while it was being read") as caught:
        confirm_all(stage, content)
    assert caught.value.context["offset"] == place - place % MiB
    assert "snapshot" in caught.value.hint


def test_data_that_became_zeros_is_a_change_too() -> None:
    content = disk()
    stage = observed(content, 2 * MiB, skip=True, algorithm="xxh3-128")
    gone = Block(0, 4 * MiB, None, (Run(0, 4 * MiB, Content.ZERO, Why.HOLE),))
    with pytest.raises(SourceError) as caught:
        stage.confirm(stage.apply(gone)[1], 0)
    assert caught.value.context["offset"] == 0
