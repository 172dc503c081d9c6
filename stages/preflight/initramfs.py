"""Names of the files in an initramfs, whatever packed it, without unpacking it anywhere.

An initramfs is a row of cpio archives, some plain (processor microcode, and since Ubuntu 23.10 modules too), one or
more compressed. Only names are kept. What is read, what it unpacks to, and how many names it has are bounded.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst; Linux init/initramfs.c; magic numbers in Linux
lib/decompress.c; LZ4 Frame Format Description, "Legacy frame".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pipeline.units import GiB, KiB, MiB

if TYPE_CHECKING:
    from bz2 import BZ2Decompressor
    from collections.abc import Coroutine
    from lzma import LZMADecompressor
    from typing import Any

# An initramfs of a rescue system with firmware has 200 MiB and unpacks to 600 MiB.
PACKED_MAX = 768 * MiB
UNPACKED_MAX = 3 * GiB
_NAMES_MAX = 300_000
_NAME_MAX = 4096
_STEP = MiB
# What a decompressor may give at once.
_OUT_MAX = 4 * MiB

_MODULE = re.compile(r"(?:^|/)(?:lib|usr/lib)/modules/([^/]+)/(?:.*/)?([^/]+)\.ko(?:\.(?:gz|xz|zst|lz4))?$")

Fetch = Callable[[int, int], bytes]


class UnreadableInitramfs(Exception):
    """It can't be told what is in it: an unknown compressor, damage, or more than any real one has."""


@dataclass(slots=True)
class Contents:
    """What was found so far.

    Attributes:
        names: of all files, as packed.
        modules: kernel version -> names of its modules, `-` written as `_`.
        members: how each archive was packed, in order: "cpio", "gzip", "zstd" ...
        is_complete: whether it was read to its end; False where the reader had seen enough.
    """

    names: set[str] = field(default_factory=set)
    modules: dict[str, set[str]] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)
    is_complete: bool = False

    def has_module(self, version: str, name: str) -> bool:
        """Whether it has that module for a kernel; where `version` is empty, for any."""
        if version:
            return name in self.modules.get(version, ())
        return any(name in found for found in self.modules.values())

    def add(self, name: str) -> None:
        """Note a file."""
        self.names.add(name)
        match = _MODULE.search(name)
        if match:
            self.modules.setdefault(match[1], set()).add(module_name(match[2]))


def module_name(text: str) -> str:
    """A module as the kernel calls it: virtio-blk is virtio_blk."""
    return text.replace("-", "_")


def read_contents(
    fetch: Fetch, size: int, *, enough: Callable[[Contents], bool] = lambda _: False, step: int = _STEP
) -> Contents:
    """Walk through an initramfs. Blocks: for a worker thread.

    Args:
        fetch: gives bytes of the file: (offset, length), fewer at its end.
        size: of the file in bytes.
        enough: asked now and then; what follows is not read once it says so.
    Raises:
        UnreadableInitramfs: with the reason.
    """
    contents = Contents()
    if size > PACKED_MAX:
        raise UnreadableInitramfs(f"it has {size} bytes, more than any real one")
    source = _Source(fetch, size, step)
    archive = _Cpio(contents)
    while True:
        head = source.peek(6)
        if not head:
            break
        if head[:1] == b"\0":
            source.skip_zeros()
            continue
        if archive.wants_more or head in (b"070701", b"070702"):
            if not contents.members or not archive.wants_more:
                contents.members.append("cpio")
            for data in source.rest():
                unused = archive.feed(data)
                if enough(contents):
                    return contents
                if unused is not None:
                    source.give_back(unused)
                    break
            else:
                break
            continue
        name, make = codec_of(head)
        contents.members.append(name)
        codec = make()
        if _unpack(codec, source, archive, contents, enough):
            return contents
    if archive.is_inside:
        raise UnreadableInitramfs("it ends in the middle of a file")
    contents.is_complete = True
    return contents


def _unpack(
    codec: Codec, source: _Source, archive: _Cpio, contents: Contents, enough: Callable[[Contents], bool]
) -> bool:
    """Feed what a compressed member unpacks to into the archive; True where the caller has seen enough."""
    made = 0
    for data in source.rest(codec.step):
        for out in codec.unpack(data):
            made += len(out)
            if made > UNPACKED_MAX:
                raise UnreadableInitramfs("it unpacks to more than any real one")
            archive.feed_all(out)
        if enough(contents):
            return True
        if codec.unused is not None:
            source.give_back(codec.unused)
            return False
    if not codec.is_finished:
        raise UnreadableInitramfs("it ends in the middle of a compressed archive")
    return False


class _Source:
    """The file in steps, with bytes that can be given back."""

    def __init__(self, fetch: Fetch, size: int, step: int) -> None:
        self._fetch = fetch
        self._size = size
        self._step = step
        self._at = 0
        self._held = b""

    def _more(self) -> bool:
        if self._at >= self._size:
            return False
        data = self._fetch(self._at, min(self._step, self._size - self._at))
        if not data:
            return False
        self._at += len(data)
        self._held += data
        return True

    def peek(self, length: int) -> bytes:
        """The next bytes, which stay; fewer at the end."""
        while len(self._held) < length and self._more():
            pass
        return self._held[:length]

    def skip_zeros(self) -> None:
        """Go to the next byte that is not zero. Archives are padded with zeros."""
        while True:
            self._held = self._held.lstrip(b"\0")
            if self._held or not self._more():
                return

    def rest(self, step: int = 0) -> Iterator[bytes]:
        """What follows, piece by piece of at most `step` bytes."""
        while self._held or self._more():
            piece = self._held if not step else self._held[:step]
            self._held = self._held[len(piece) :]
            yield piece

    def give_back(self, data: bytes) -> None:
        """Bytes that nobody needed come next again."""
        self._held = data + self._held


class _Cpio:
    """A parser of "newc" archives that is fed in pieces and keeps names.

    Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._held = bytearray()
        self._skip = 0
        self._position = 0
        self._open = False

    @property
    def wants_more(self) -> bool:
        """Whether an archive has begun and its trailer has not come."""
        return self._open

    @property
    def is_inside(self) -> bool:
        """Whether a file's bytes or a header are still to come."""
        return self._skip > 0 or bool(self._held)

    def feed_all(self, data: bytes) -> None:
        """Take bytes in which archive may follow archive."""
        left: bytes | None = data
        while left:
            if not self._open and not self._held:
                left = left.lstrip(b"\0")
                if not left:
                    return
            left = self.feed(left)

    def feed(self, data: bytes) -> bytes | None:
        """Take bytes; those behind the trailer come back, None where it has not come yet."""
        view = memoryview(data)
        while True:
            if self._skip:
                step = min(self._skip, len(view))
                self._skip -= step
                view = view[step:]
                if self._skip:
                    return None
            needed = 110 if len(self._held) < 110 else 110 + self._name_size()
            if len(self._held) < needed:
                step = min(needed - len(self._held), len(view))
                self._held += view[:step]
                view = view[step:]
                if len(self._held) < needed:
                    return None
                if needed == 110:
                    self._open = True
                    if bytes(self._held[:6]) not in (b"070701", b"070702"):
                        raise UnreadableInitramfs("an archive inside of it is damaged")
                    continue
            name_size = self._name_size()
            file_size = self._number(54)
            name = bytes(self._held[110 : 110 + name_size - 1]).decode("utf-8", "backslashreplace")
            self._skip = (-(110 + name_size) % 4) + file_size + (-file_size % 4)
            self._held.clear()
            if name == "TRAILER!!!":
                self._skip = 0
                self._open = False
                return bytes(view)
            if len(self._contents.names) >= _NAMES_MAX:
                raise UnreadableInitramfs("it has more files than any real one")
            self._contents.add(name)

    def _name_size(self) -> int:
        size = self._number(94)
        if not 0 < size <= _NAME_MAX:
            raise UnreadableInitramfs("a name in it is longer than a path may be")
        return size

    def _number(self, at: int) -> int:
        try:
            return int(bytes(self._held[at : at + 8]), 16)
        except ValueError:
            raise UnreadableInitramfs("an archive inside of it is damaged") from None


# -- compressors -----------------------------------------------------------------------------------------------------


class Codec(Protocol):
    """A decompressor of one member.

    Attributes:
        step: how many packed bytes it takes at once, so that what it gives stays bounded.
        unused: bytes behind the member; None while it goes on.
        is_finished: whether the member may end here.
    """

    step: int
    unused: bytes | None

    @property
    def is_finished(self) -> bool: ...

    def unpack(self, data: bytes) -> Iterable[bytes]: ...


class _Gzip:
    step = 64 * KiB

    def __init__(self) -> None:
        import zlib

        self._inflater = zlib.decompressobj(31)
        self._error = zlib.error
        self.unused: bytes | None = None

    @property
    def is_finished(self) -> bool:
        return self._inflater.eof

    def unpack(self, data: bytes) -> Iterator[bytes]:
        try:
            while data:
                yield self._inflater.decompress(data, _OUT_MAX)
                data = self._inflater.unconsumed_tail
        except self._error as error:
            raise UnreadableInitramfs(f"its gzip part is damaged: {error}") from None
        if self._inflater.eof:
            self.unused = self._inflater.unused_data


class _Fed:
    """The standard library's decompressors that keep what they were given until it is asked for: xz, lzma, bzip2."""

    step = 64 * KiB

    def __init__(self, name: str, inflater: LZMADecompressor | BZ2Decompressor, *errors: type[Exception]) -> None:
        self._name = name
        self._inflater = inflater
        self._errors = errors
        self.unused: bytes | None = None

    @property
    def is_finished(self) -> bool:
        return self._inflater.eof

    def unpack(self, data: bytes) -> Iterator[bytes]:
        try:
            while not self._inflater.eof:
                yield self._inflater.decompress(data, _OUT_MAX)
                data = b""
                if self._inflater.needs_input:
                    break
        except self._errors as error:
            raise UnreadableInitramfs(f"its {self._name} part is damaged: {error}") from None
        if self._inflater.eof:
            self.unused = self._inflater.unused_data


def _lzma(*, alone: bool) -> _Fed:
    import lzma

    # Kernels unpack with dictionaries up to 128 MiB; an image that asks for more memory is refused.
    form = lzma.FORMAT_ALONE if alone else lzma.FORMAT_XZ
    return _Fed("xz", lzma.LZMADecompressor(form, memlimit=192 * MiB), lzma.LZMAError)


def _bzip2() -> _Fed:
    import bz2

    return _Fed("bzip2", bz2.BZ2Decompressor(), OSError, ValueError)


class _Zstd:
    # Four bytes may stand for a block of 128 KiB: of this many packed bytes at most 32 MiB come at once.
    step = KiB

    def __init__(self) -> None:
        import zstandard

        self._inflater = zstandard.ZstdDecompressor(max_window_size=128 * MiB).decompressobj()
        self._error = zstandard.ZstdError
        self.unused: bytes | None = None

    @property
    def is_finished(self) -> bool:
        return self._inflater.eof

    def unpack(self, data: bytes) -> Iterator[bytes]:
        try:
            yield self._inflater.decompress(data)
        except self._error as error:
            raise UnreadableInitramfs(f"its zstd part is damaged: {error}") from None
        if self._inflater.eof:
            self.unused = self._inflater.unused_data


class _LegacyLz4:
    """The format of `lz4 -l`: blocks of 8 MiB, each behind its length. It has no end mark: anything else ends it."""

    step = 64 * KiB
    _BLOCK = 8 * MiB
    _PACKED_MAX = _BLOCK + _BLOCK // 255 + 16

    def __init__(self) -> None:
        import lz4.block

        self._decompress = lz4.block.decompress
        self._error = lz4.block.LZ4BlockError
        self._held = bytearray()
        self._begun = False
        self.unused: bytes | None = None

    @property
    def is_finished(self) -> bool:
        return self._begun and not self._held

    def unpack(self, data: bytes) -> Iterator[bytes]:
        self._held += data
        if not self._begun:
            if len(self._held) < 4:
                return
            self._begun = True
            del self._held[:4]
        while len(self._held) >= 4:
            length = struct.unpack_from("<I", self._held)[0]
            if length == 0 or length > self._PACKED_MAX:
                self.unused = bytes(self._held)
                self._held.clear()
                return
            if len(self._held) < 4 + length:
                return
            try:
                yield self._decompress(bytes(self._held[4 : 4 + length]), uncompressed_size=self._BLOCK)
            except (self._error, ValueError) as error:
                raise UnreadableInitramfs(f"its lz4 part is damaged: {error}") from None
            del self._held[: 4 + length]


def codec_of(head: bytes) -> tuple[str, Callable[[], Codec]]:
    """What packed something that begins with these bytes: its name, and how to make a decompressor.

    Raises:
        UnreadableInitramfs: none that is known here.
    """
    for magic, name, make in _CODECS:
        if head.startswith(magic):
            return name, make
    if head.startswith(b"\x89LZO"):
        raise UnreadableInitramfs("it is packed with lzo, which is not read here")
    raise UnreadableInitramfs(f"it is packed in a way that is not known here (it begins with {head.hex()})")


_CODECS: tuple[tuple[bytes, str, Callable[[], Codec]], ...] = (
    (b"\x1f\x8b", "gzip", _Gzip),
    (b"\x1f\x9e", "gzip", _Gzip),
    (b"\x28\xb5\x2f\xfd", "zstd", _Zstd),
    (b"\xfd7zXZ\0", "xz", lambda: _lzma(alone=False)),
    (b"BZh", "bzip2", _bzip2),
    (b"\x02\x21\x4c\x18", "lz4", _LegacyLz4),
    (b"\x5d\0\0", "lzma", lambda: _lzma(alone=True)),
)


async def read_initramfs(
    read_at: Callable[[int, int], Coroutine[Any, Any, bytes]], size: int, *, enough: Callable[[Contents], bool]
) -> Contents:
    """`read_contents` of a file that is read asynchronously; unpacks in a worker thread.

    Raises:
        UnreadableInitramfs: with the reason. OSError, FormatError, StoreError: it can't be read.
    Cancellation: takes effect at the next read.
    """
    import anyio.from_thread
    import anyio.to_thread

    def fetch(offset: int, length: int) -> bytes:
        return anyio.from_thread.run(read_at, offset, length)

    return await anyio.to_thread.run_sync(lambda: read_contents(fetch, size, enough=enough))
