"""The guest digest: one hash per MiB of the exported disk, and one root over them.

It depends on the disk alone: not on window, cluster, format or threads. A leaf covers 1 MiB of guest bytes, the last
one what is left. The root covers algorithm, disk size and every leaf digest in guest order, so a leaf can't be moved,
dropped or added unnoticed.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, Literal, TypeGuard, cast, get_args

from pipeline.errors import FormatError, StageError
from pipeline.flow.facts import Fact
from pipeline.units import MiB

Algorithm = Literal["xxh3-128", "blake3"]

LEAF = MiB
DIGEST_BYTES: dict[Algorithm, int] = {"xxh3-128": 16, "blake3": 32}

# Root input begins with a name and a version, so that no leaf or file can pass for a root.
_ROOT_TAG = b"guest digest, version 1\0"
# Leaves hashed into the root at once: larger gains nothing, smaller costs a call per leaf of a hole.
_ROOT_BATCH = 65536
_STRETCH = struct.Struct("<QQ")


@cache
def leaf_hash(algorithm: Algorithm) -> Callable[[bytes | memoryview], bytes]:
    """The function that hashes one leaf. Threads: any; both kinds let other threads run while they hash a MiB."""
    if algorithm == "xxh3-128":
        import xxhash

        return xxhash.xxh3_128_digest
    import blake3

    return lambda data: bytes(blake3.blake3(data).digest())


@cache
def zero_leaf(algorithm: Algorithm, length: int = LEAF) -> bytes:
    """The digest of a leaf of `length` zero bytes."""
    return leaf_hash(algorithm)(bytes(length))


def _root_hash(algorithm: Algorithm) -> Any:
    if algorithm == "xxh3-128":
        import xxhash

        return xxhash.xxh3_128()
    import blake3

    return blake3.blake3()


class LeafDigests:
    """The leaf digests of a disk, added in guest order. Runs of whole zero leaves cost nothing, in memory and JSON.

    Args:
        size: of the exported disk, in guest bytes.
    """

    __slots__ = ("_data", "_firsts", "_positions", "_zero", "algorithm", "count", "size", "total")

    def __init__(self, algorithm: Algorithm, size: int) -> None:
        self.algorithm = algorithm
        self.size = size
        self.total = -(-size // LEAF)
        self.count = 0
        self._zero = zero_leaf(algorithm)
        self._data = bytearray()
        # Segment k: leaves from _firsts[k] on have the digests from number _positions[k] on, up to the next
        # segment's position; every leaf between two segments is zero.
        self._firsts: list[int] = []
        self._positions: list[int] = []

    def __len__(self) -> int:
        return self.count

    @property
    def is_complete(self) -> bool:
        """Whether every leaf of the disk was added."""
        return self.count == self.total

    @property
    def width(self) -> int:
        """Bytes of one digest."""
        return DIGEST_BYTES[self.algorithm]

    def add(self, digests: bytes) -> None:
        """Append the digests of the next leaves, concatenated. A digest of a whole zero leaf becomes a counted one.

        Raises:
            StageError: more leaves than the disk has.
        """
        width = self.width
        count = len(digests) // width
        self._claim(count)
        if self._zero not in digests:
            self._append(digests)
            return
        for start in range(0, len(digests), width):
            one = digests[start : start + width]
            if one == self._zero:
                self.count += 1
            else:
                self._append(one)

    def add_zeros(self, count: int) -> None:
        """Append `count` whole leaves of zeros.

        Raises:
            StageError: more leaves than the disk has.
        """
        self._claim(count)
        self.count += count

    def dump(self, first: int) -> bytes:
        """The leaves from number `first` on: for each stretch a count of zero leaves, a count of others, those."""
        parts = []
        reached = first
        for found in self.nonzero(first, self.count):
            digests = b"".join(self.leaf(index) for index in found)
            parts += [_STRETCH.pack(found.start - reached, len(found)), digests]
            reached = found.stop
        if reached < self.count:
            parts.append(_STRETCH.pack(self.count - reached, 0))
        return b"".join(parts)

    def load(self, dumped: bytes) -> None:
        """Append what `dump` gave. Raises StageError when it is more than the disk has."""
        position = 0
        while position < len(dumped):
            zeros, count = _STRETCH.unpack_from(dumped, position)
            position += _STRETCH.size
            self.add_zeros(zeros)
            self.add(dumped[position : position + count * self.width])
            position += count * self.width

    def leaf(self, index: int) -> bytes:
        """The digest of the leaf at guest offset `index * LEAF`."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        segment = bisect_right(self._firsts, index) - 1
        if segment >= 0:
            position = self._positions[segment] + index - self._firsts[segment]
            if position < self._end_position(segment):
                return bytes(self._data[position * self.width : (position + 1) * self.width])
        return self._zero

    def nonzero(self, first: int, last: int) -> Iterator[range]:
        """The stretches of leaves in [first, last) that are not whole zero leaves, ascending."""
        for segment in range(max(0, bisect_right(self._firsts, first) - 1), len(self._firsts)):
            begin = self._firsts[segment]
            if begin >= last:
                return
            end = begin + self._end_position(segment) - self._positions[segment]
            if max(begin, first) < min(end, last):
                yield range(max(begin, first), min(end, last))

    def root(self) -> str:
        """The digest over algorithm, size and every leaf, in hex.

        Raises:
            StageError: leaves are missing.
        """
        if not self.is_complete:
            raise StageError("the guest digest is not complete", leaves=self.count, expected=self.total)
        state = _root_hash(self.algorithm)
        state.update(_ROOT_TAG + self.algorithm.encode() + b"\0" + self.size.to_bytes(8, "little"))
        for kind, start, count in self._stretches():
            if kind == "data":
                state.update(bytes(self._data[start * self.width : (start + count) * self.width]))
            else:
                batch = self._zero * min(count, _ROOT_BATCH)
                for _ in range(count // _ROOT_BATCH):
                    state.update(batch)
                state.update(batch[: count % _ROOT_BATCH * self.width])
        return str(state.hexdigest())

    def to_json(self) -> dict[str, object]:
        """Everything but the root, for a manifest: `runs` alternates counts of other leaves and of zero leaves."""
        runs: list[int] = []
        for kind, _, count in self._stretches():
            if len(runs) % 2 != (kind == "zero"):
                runs.append(0)
            runs.append(count)
        return {
            "algorithm": self.algorithm,
            "size": self.size,
            "leaf_size": LEAF,
            "runs": runs,
            "leaves": base64.b64encode(zlib.compress(self._data, 1)).decode("ascii"),
        }

    @classmethod
    def from_json(cls, value: object) -> LeafDigests:
        """Read what `to_json` wrote. Nothing is believed: every count is checked before it is used.

        Raises:
            FormatError: it is damaged, incomplete, or of a later version.
        """
        if not isinstance(value, dict):
            raise _damaged("it is not a table")
        algorithm, size, runs, packed = (value.get(name) for name in ("algorithm", "size", "runs", "leaves"))
        if algorithm not in get_args(Algorithm):
            raise _damaged(f"the algorithm {algorithm!r} is not known")
        if value.get("leaf_size") != LEAF:
            raise _damaged(f"leaves of {value.get('leaf_size')!r} bytes are not known")
        if not _is_count(size) or not isinstance(runs, list) or not all(map(_is_count, runs)):
            raise _damaged("a size or count in it is wrong")
        made = cls(cast(Algorithm, algorithm), size)
        if sum(runs) != made.total:
            raise _damaged(f"it has {sum(runs)} leaves, a disk of {size} bytes has {made.total}")
        digests = _unpack(packed, sum(runs[::2]) * made.width)
        position = 0
        for number, count in enumerate(runs):
            if number % 2:
                made.add_zeros(count)
            else:
                made.add(digests[position : position + count * made.width])
                position += count * made.width
        return made

    def _claim(self, count: int) -> None:
        if self.count + count > self.total:
            raise StageError("more leaves than the disk has", leaves=self.count + count, expected=self.total)

    def _append(self, digests: bytes) -> None:
        if not digests:
            return
        held = len(self._data) // self.width
        if not self._firsts or self._firsts[-1] + held - self._positions[-1] != self.count:
            self._firsts.append(self.count)
            self._positions.append(held)
        self._data += digests
        self.count += len(digests) // self.width

    def _end_position(self, segment: int) -> int:
        if segment + 1 < len(self._positions):
            return self._positions[segment + 1]
        return len(self._data) // self.width

    def _stretches(self) -> Iterator[tuple[Literal["data", "zero"], int, int]]:
        """Kind, first digest (of data), and count of every stretch of leaves, in guest order."""
        reached = 0
        for segment, first in enumerate(self._firsts):
            if first > reached:
                yield "zero", 0, first - reached
            count = self._end_position(segment) - self._positions[segment]
            yield "data", self._positions[segment], count
            reached = first + count
        if self.count > reached:
            yield "zero", 0, self.count - reached


class GuestDigest:
    """The complete digest of an exported disk.

    Attributes:
        leaves: every leaf digest.
        root: hex; two disks with the same root are the same disk.
    """

    __slots__ = ("leaves", "root")

    def __init__(self, leaves: LeafDigests) -> None:
        """Close `leaves`, which must not change any more. Raises StageError when leaves are missing."""
        self.leaves = leaves
        self.root = leaves.root()

    def __repr__(self) -> str:
        return f"GuestDigest({self.algorithm}, {self.size} bytes, {self.root})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GuestDigest):
            return NotImplemented
        return (self.algorithm, self.size, self.root) == (other.algorithm, other.size, other.root)

    def __hash__(self) -> int:
        return hash(self.root)

    @property
    def algorithm(self) -> Algorithm:
        """How leaves and root are hashed."""
        return self.leaves.algorithm

    @property
    def size(self) -> int:
        """Of the exported disk, in guest bytes."""
        return self.leaves.size

    def to_json(self) -> dict[str, object]:
        """For a manifest."""
        return {**self.leaves.to_json(), "root": self.root}

    @classmethod
    def from_json(cls, value: object) -> GuestDigest:
        """Read what `to_json` wrote. Raises FormatError when it is damaged, or root and leaves don't agree."""
        made = cls(LeafDigests.from_json(value))
        if not isinstance(value, dict) or value.get("root") != made.root:
            raise _damaged("its leaves do not give its root")
        return made

    def differing(self, offset: int, found: Iterable[bytes]) -> Iterator[range]:
        """Guest ranges whose digest is not the recorded one; `found` are the leaves from guest `offset` on."""
        for index, one in enumerate(found, offset // LEAF):
            if one != self.leaves.leaf(index):
                yield range(index * LEAF, min((index + 1) * LEAF, self.size))


GUEST_DIGEST: Fact[GuestDigest] = Fact("guest digest", GuestDigest, hint="Add checksum.guest after the source.")


def hash_leaves(algorithm: Algorithm, data: memoryview) -> Iterator[bytes]:
    """The digests of `data`, leaf by leaf; the last one may be short. Threads: any."""
    take = leaf_hash(algorithm)
    for start in range(0, data.nbytes, LEAF):
        yield take(data[start : start + LEAF])


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _unpack(packed: object, expected: int) -> bytes:
    inflate = zlib.decompressobj()
    try:
        digests = inflate.decompress(base64.b64decode(str(packed), validate=True), expected + 1)
    except (binascii.Error, zlib.error, ValueError):
        raise _damaged("its leaves can't be unpacked") from None
    if len(digests) != expected or not inflate.eof:
        raise _damaged("it has another number of leaves than it says")
    return digests


def _damaged(reason: str) -> FormatError:
    return FormatError(
        f"the recorded guest digest can't be used: {reason}",
        operation="read digest",
        hint="The manifest was damaged or written by a later version; fetch it again, or verify with that version.",
    )
