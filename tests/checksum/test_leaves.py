"""The leaf digests: order, compactness, JSON, and what damaged JSON does."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import FormatError, StageError
from pipeline.units import MiB, TiB
from stages.checksum.leaves import LEAF, Algorithm, GuestDigest, LeafDigests, hash_leaves, zero_leaf

WIDTH: dict[Algorithm, int] = {"xxh3-128": 16, "blake3": 32}
ALGORITHMS: list[Algorithm] = ["xxh3-128", "blake3"]


def digest_of(algorithm: Algorithm, disk: str, *, tail: int = 0) -> LeafDigests:
    """Digests of a disk of one letter a leaf; "0" is added as data of zeros, "-" as a skip."""
    made = LeafDigests(algorithm, len(disk) * LEAF + tail)
    for letter in disk:
        if letter == "-":
            made.add_zeros(1)
        elif letter == "0":
            made.add(zero_leaf(algorithm))
        else:
            made.add(letter.encode() * WIDTH[algorithm])
    if tail:
        made.add(zero_leaf(algorithm, tail))
    return made


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_skip_counts_as_the_zeros_that_it_is(algorithm: Algorithm) -> None:
    skipped, read = digest_of(algorithm, "A--B-", tail=512), digest_of(algorithm, "A00B0", tail=512)
    assert skipped.root() == read.root()
    assert skipped.to_json() == read.to_json()


def test_the_root_depends_on_algorithm_size_order_and_every_leaf() -> None:
    roots = {
        digest_of("xxh3-128", "AB-").root(),
        digest_of("xxh3-128", "BA-").root(),
        digest_of("xxh3-128", "A-B").root(),
        digest_of("xxh3-128", "AB--").root(),
        digest_of("xxh3-128", "AB").root(),
        digest_of("xxh3-128", "AB", tail=512).root(),
        digest_of("xxh3-128", "AB", tail=1024).root(),
        digest_of("xxh3-128", "").root(),
        digest_of("blake3", "").root(),
    }
    assert len(roots) == 9


def test_the_root_is_the_documented_one() -> None:
    """A stored manifest must stay verifiable: this input never changes."""
    made = digest_of("xxh3-128", "A-")
    text = b"guest digest, version 1\0xxh3-128\0" + (2 * MiB).to_bytes(8, "little")
    assert made.root() == xxhash.xxh3_128_hexdigest(text + b"A" * 16 + xxhash.xxh3_128_digest(bytes(MiB)))


@settings(max_examples=100)
@given(st.text("ABC0-", max_size=40), st.integers(0, 1000))
def test_leaves_come_back_by_index_and_from_json(disk: str, tail: int) -> None:
    made = digest_of("xxh3-128", disk, tail=tail)
    zero = zero_leaf("xxh3-128")
    expected = [zero if letter in "0-" else letter.encode() * 16 for letter in disk]
    expected += [zero_leaf("xxh3-128", tail)] if tail else []
    again = LeafDigests.from_json(json.loads(json.dumps(made.to_json())))
    for one in (made, again):
        assert [one.leaf(index) for index in range(len(one))] == expected
        assert [index for part in one.nonzero(0, len(one)) for index in part] == [
            index for index, leaf in enumerate(expected) if leaf != zero
        ]
        assert one.root() == made.root()
    for first in range(0, len(expected), 3):
        inside = [index for part in made.nonzero(first, first + 4) for index in part]
        assert inside == [i for i in range(first, min(first + 4, len(expected))) if expected[i] != zero]
    with pytest.raises(IndexError):
        made.leaf(len(expected))


def test_two_tebibytes_of_holes_cost_nothing() -> None:
    tracemalloc.start()
    begun = time.process_time()
    made = LeafDigests("xxh3-128", 2 * TiB)
    made.add_zeros(MiB)
    made.add(b"x" * 16)
    made.add_zeros(MiB - 1)
    digest = GuestDigest(made)
    assert len(json.dumps(digest.to_json())) < 400
    assert digest.leaves.leaf(MiB) == b"x" * 16
    assert GuestDigest.from_json(digest.to_json()) == digest
    assert time.process_time() - begun < 1
    assert tracemalloc.get_traced_memory()[1] < 8 * MiB
    tracemalloc.stop()


def test_leaves_beyond_the_disk_and_missing_leaves_are_defects() -> None:
    made = LeafDigests("xxh3-128", 2 * LEAF)
    made.add(b"A" * 16)
    with pytest.raises(StageError, match="not complete"):
        GuestDigest(made)
    with pytest.raises(StageError, match="more leaves"):
        made.add_zeros(2)
    with pytest.raises(StageError, match="more leaves"):
        made.add(b"B" * 32)


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": "md5"},
        {"algorithm": ["xxh3-128"]},
        {"leaf_size": 4096},
        {"size": -1},
        {"size": "4 MiB"},
        {"size": True},
        {"size": 1 << 80},
        {"size": 5 * MiB},
        {"runs": None},
        {"runs": [1, -1, 4]},
        {"runs": [1 << 62, 1 << 62]},
        {"runs": [4]},
        {"leaves": None},
        {"leaves": "?"},
        {"leaves": "eJwDAAAAAAE="},
        {"root": "0" * 32},
        {"root": None},
    ],
    ids=str,
)
def test_damaged_json_is_refused(change: dict[str, Any]) -> None:
    value = GuestDigest(digest_of("xxh3-128", "A-BC")).to_json()
    GuestDigest.from_json(value)
    with pytest.raises(FormatError, match="digest can't be used"):
        GuestDigest.from_json({**value, **change})
    with pytest.raises(FormatError):
        GuestDigest.from_json([value])


def test_json_that_unpacks_to_more_than_it_says_is_refused() -> None:
    """A bomb in a manifest is not unpacked."""
    import base64
    import zlib

    value = GuestDigest(digest_of("xxh3-128", "AB")).to_json()
    bomb = base64.b64encode(zlib.compress(bytes(64 * MiB))).decode()
    tracemalloc.start()
    with pytest.raises(FormatError):
        GuestDigest.from_json({**value, "leaves": bomb})
    assert tracemalloc.get_traced_memory()[1] < MiB
    tracemalloc.stop()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_differing_leaves_are_named_by_guest_range(algorithm: Algorithm) -> None:
    disk = bytearray(b"A" * LEAF + b"B" * LEAF + bytes(LEAF) + b"C" * 512)
    made = LeafDigests(algorithm, len(disk))
    made.add(b"".join(hash_leaves(algorithm, memoryview(disk))))
    digest = GuestDigest(made)
    disk[LEAF + 5] ^= 1
    disk[-1] ^= 1
    found = list(digest.differing(0, hash_leaves(algorithm, memoryview(disk))))
    assert found == [range(LEAF, 2 * LEAF), range(3 * LEAF, 3 * LEAF + 512)]
