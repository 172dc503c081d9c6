"""The image digest: a combinable CRC of the file, and a tree over fixed windows of it, whatever order pieces come in.

A window is 8 MiB of the image, cut into chunks of 1 MiB. Its digest is the xxh3-128 over the digests of its chunks, the
root is the xxh3-128 over name, image size and every window's digest. Chunks make it possible to take in a head that
comes last: what waits for it are the bytes of the one chunk that the head ends in, not those of a window.
"""

from __future__ import annotations

import base64
import json
import zlib
from bisect import bisect_left
from functools import cache
from typing import Literal, NamedTuple

import xxhash
from awscrt import checksums

from pipeline.errors import StageError
from pipeline.units import MiB

Crc = Literal["crc64nvme", "crc32c"]

WINDOW = 8 * MiB
CHUNK = MiB  # also in stages/checksum/image.py
_CHUNKS = WINDOW // CHUNK
_WIDTH = 16
_ROOT_TAG = b"image digest, version 1\0"
_CRC_BYTES: dict[Crc, int] = {"crc64nvme": 8, "crc32c": 4}
# Bytes that may wait for those before them. A head that comes last leaves less than a chunk; sinks that take pieces in
# any order get them in order from every encoder but for that.
_WAITING_MAX = 4 * MiB
_ZEROS = bytes(MiB)


class _Span(NamedTuple):
    start: int
    stop: int
    crc: int


class _Chunk:
    """A chunk that is not complete: hashed up to `reached`, and what came too early."""

    __slots__ = ("early", "reached", "state")

    def __init__(self) -> None:
        self.state = xxhash.xxh3_128()
        self.reached = 0
        self.early: dict[int, bytes] = {}


class ImageDigest:
    """Takes an image in, stretch by stretch, in any order, each byte once.

    Threads: `add` and `add_zeros` may run in any thread, one call at a time.
    """

    def __init__(self, crc: Crc) -> None:
        self.crc_name = crc
        self._spans: list[_Span] = []
        self._open: dict[int, _Chunk] = {}
        self._windows = bytearray()
        self._partial: dict[int, dict[int, bytes]] = {}
        self._waiting = 0
        self._taken = 0

    @property
    def size(self) -> int:
        """Image bytes up to the last one that was taken in."""
        return self._spans[-1].stop if self._spans else 0

    @property
    def waiting_bytes(self) -> int:
        """Image bytes that wait for those before them in their chunk."""
        return self._waiting

    def add(self, offset: int, data: memoryview | bytes) -> None:
        """Take in image bytes.

        Raises:
            StageError: they were taken in before.
        """
        view = memoryview(data)
        self._join(_Span(offset, offset + view.nbytes, _crc(self.crc_name)(view, 0)))
        done = 0
        while done < view.nbytes:
            number, start = divmod(offset + done, CHUNK)
            count = min(CHUNK - start, view.nbytes - done)
            part = view[done : done + count]
            if count == CHUNK:
                self._complete(number, xxhash.xxh3_128_digest(part))
            else:
                self._add_part(number, start, part)
            done += count

    def add_zeros(self, offset: int, length: int) -> None:
        """Take in zeros; long ones cost nothing a byte."""
        self._join(_Span(offset, offset + length, _zeros_crc(self.crc_name, length)))
        end = offset + length
        while offset < end:
            number, start = divmod(offset, CHUNK)
            if not start and not number % _CHUNKS and end - offset >= WINDOW:
                windows = (end - offset) // WINDOW
                self._set_windows(number // _CHUNKS, _zero_window() * windows)
                offset += windows * WINDOW
                continue
            count = min(CHUNK - start, end - offset)
            if count == CHUNK:
                self._complete(number, _zero_chunk())
            else:
                self._add_part(number, start, memoryview(_ZEROS)[:count])
            offset += count

    def stretch(self, start: int) -> tuple[int, int]:
        """(end, CRC) of what was taken in from image offset `start` on, without a gap; (start, 0) for nothing."""
        index = bisect_left(self._spans, _Span(start, start, 0))
        found = self._spans[index] if index < len(self._spans) else None
        return (found.stop, found.crc) if found is not None and found.start == start else (start, 0)

    def dump(self, after: int, head: int, end: int, crc: int) -> bytes:
        """What was taken in since image offset `after`, for `load`. Small, but for a head that is waited for.

        Args:
            after, end: chunk boundaries; everything in [head, end) was taken in, and only a part of a chunk more.
            head: image bytes that come last.
            crc: of [head, end).
        """
        first, stop = after // WINDOW, end // WINDOW
        waits = self._open.get(head // CHUNK) if after <= head else None
        note = {
            "end": end,
            "crc": crc,
            "first": first,
            "partial": {
                window: {place: digest.hex() for place, digest in chunks.items()}
                for window, chunks in self._partial.items()
            },
            "early": {
                start: base64.b64encode(data).decode("ascii") for start, data in (waits.early if waits else {}).items()
            },
        }
        windows = bytes(self._windows[first * _WIDTH : stop * _WIDTH])
        return zlib.compress(json.dumps(note).encode() + b"\n" + windows, 1)

    def load(self, dumped: bytes, head: int) -> int:
        """Take in what `dump` gave, of the same image and in the same order; returns its end."""
        told, _, windows = zlib.decompress(dumped).partition(b"\n")
        note = json.loads(told)
        end = int(note["end"])
        self._set_windows(note["first"], windows)
        self._partial = {
            int(window): {int(place): bytes.fromhex(digest) for place, digest in chunks.items()}
            for window, chunks in note["partial"].items()
        }
        if note["early"]:
            chunk = self._open.setdefault(head // CHUNK, _Chunk())
            chunk.early = {int(start): base64.b64decode(data) for start, data in note["early"].items()}
            self._waiting = sum(map(len, chunk.early.values()))
        self._spans = [_Span(head, end, note["crc"])]
        return end

    def finish(self) -> dict[str, object]:
        """For a manifest. What is missing is an error: every byte of an image has to pass.

        Raises:
            StageError: there are gaps.
        """
        size = self.size
        if len(self._spans) > 1 or (self._spans and self._spans[0].start):
            raise StageError("bytes of the image are missing", operation="checksum", spans=len(self._spans))
        for number, chunk in sorted(self._open.items()):
            self._complete(number, chunk.state.digest())
        self._open = {}
        for window, chunks in sorted(self._partial.items()):
            self._set_windows(window, _window_digest(chunks))
        self._partial = {}
        root = xxhash.xxh3_128(_ROOT_TAG + size.to_bytes(8, "little"))
        root.update(bytes(self._windows))
        crc = self._spans[0].crc if self._spans else 0
        return {
            "size": size,
            self.crc_name: crc.to_bytes(_CRC_BYTES[self.crc_name], "big").hex(),
            "tree": "xxh3-128",
            "window": WINDOW,
            "chunk": CHUNK,
            "root": root.hexdigest(),
            "windows": base64.b64encode(zlib.compress(self._windows, 1)).decode("ascii"),
        }

    def _add_part(self, number: int, start: int, part: memoryview) -> None:
        chunk = self._open.setdefault(number, _Chunk())
        if start != chunk.reached:
            self._waiting += part.nbytes
            if self._waiting > _WAITING_MAX:
                raise StageError(
                    "pieces of the image come too far out of order for checksum.image",
                    operation="checksum",
                    offset=number * CHUNK + start,
                    hint="Leave checksum.image out for this format and target.",
                )
            chunk.early[start] = bytes(part)
            return
        chunk.state.update(part)
        chunk.reached += part.nbytes
        while (early := chunk.early.pop(chunk.reached, None)) is not None:
            chunk.state.update(early)
            chunk.reached += len(early)
            self._waiting -= len(early)
        if chunk.reached == CHUNK:
            del self._open[number]
            self._complete(number, chunk.state.digest())

    def _complete(self, number: int, digest: bytes) -> None:
        window, place = divmod(number, _CHUNKS)
        chunks = self._partial.setdefault(window, {})
        chunks[place] = digest
        if len(chunks) == _CHUNKS:
            del self._partial[window]
            self._set_windows(window, _window_digest(chunks))

    def _set_windows(self, first: int, digests: bytes) -> None:
        start = first * _WIDTH
        missing = start + len(digests) - len(self._windows)
        if missing > 0:
            self._windows += bytes(missing)
        self._windows[start : start + len(digests)] = digests

    def _join(self, span: _Span) -> None:
        """Add a span, and join it with the neighbours that it touches."""
        if span.start == span.stop:
            return
        index = bisect_left(self._spans, span)
        before = self._spans[index - 1] if index else None
        after = self._spans[index] if index < len(self._spans) else None
        if (before and before.stop > span.start) or (after and after.start < span.stop):
            raise StageError("image bytes came twice", operation="checksum", offset=span.start)
        combine = _combine(self.crc_name)
        low = high = index
        if before and before.stop == span.start:
            span = _Span(before.start, span.stop, combine(before.crc, span.crc, span.stop - span.start))
            low -= 1
        if after and after.start == span.stop:
            span = _Span(span.start, after.stop, combine(span.crc, after.crc, after.stop - after.start))
            high += 1
        self._spans[low:high] = [span]


def _crc(name: Crc):  # type: ignore[no-untyped-def]  # awscrt has no types
    return checksums.crc64nvme if name == "crc64nvme" else checksums.crc32c


def _combine(name: Crc):  # type: ignore[no-untyped-def]  # awscrt has no types
    return checksums.combine_crc64nvme if name == "crc64nvme" else checksums.combine_crc32c


def _zeros_crc(name: Crc, length: int) -> int:
    """The CRC of zeros, in as many steps as the length has binary digits."""
    whole, rest = divmod(length, len(_ZEROS))
    total = int(_crc(name)(memoryview(_ZEROS)[:rest], 0)) if rest else 0
    power, size = int(_crc(name)(_ZEROS, 0)), len(_ZEROS)
    while whole:
        if whole & 1:
            total = int(_combine(name)(total, power, size))
        power = int(_combine(name)(power, power, size))
        size *= 2
        whole >>= 1
    return total


@cache
def _zero_chunk() -> bytes:
    return xxhash.xxh3_128_digest(_ZEROS)


@cache
def _zero_window() -> bytes:
    return xxhash.xxh3_128_digest(_zero_chunk() * _CHUNKS)


def _window_digest(chunks: dict[int, bytes]) -> bytes:
    return xxhash.xxh3_128_digest(b"".join(chunks[place] for place in sorted(chunks)))
