"""Open an image so that it can be served, and count what that reads of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from pipeline.flow.items import RangeReader
from stages.decode.image import DecodedImage, HoleAware
from stages.decode.named import NamedImage, OpenedFiles, open_files
from stages.serve.cache import CACHE, CachedImage
from stages.store.file import FileReader

# Formats whose tables name offsets of the file itself; an archive's are those of its member.
_IN_FILE = ("raw", "qcow2", "vhd", "vmdk", "vhdx")


class CountedReader:
    """Passes reads on and counts them.

    Attributes:
        read_bytes, reads: so far.
    """

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self.size = reader.size
        self.read_bytes = 0
        self.reads = 0

    async def read(self, offset: int, length: int) -> bytes:
        """As wrapped."""
        data = await self._reader.read(offset, length)
        self.count(len(data))
        return data

    def count(self, length: int) -> None:
        """So many bytes were read at once."""
        self.reads += 1
        self.read_bytes += length


class _CountedHoles(CountedReader):
    """The same, of a reader that knows its holes."""

    def __init__(self, reader: HoleAware) -> None:
        super().__init__(reader)  # type: ignore[arg-type]  # both: a HoleAware is a RangeReader
        self._holes = reader

    async def next_data(self, offset: int) -> range | None:
        """As wrapped."""
        return await self._holes.next_data(offset)


def counted(reader: RangeReader) -> CountedReader:
    """Wrap a reader; what it knows of holes is kept."""
    return _CountedHoles(reader) if isinstance(reader, HoleAware) else CountedReader(reader)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedDisk:
    """An image that is ready to be served. Borrowed from `open_disk`.

    Attributes:
        files: the image's files; their reader counts.
        counter: of the image file itself.
    """

    files: OpenedFiles
    image: DecodedImage
    disk: CachedImage
    counter: CountedReader


@asynccontextmanager
async def open_disk(named: NamedImage, *, cache: int = CACHE) -> AsyncIterator[OpenedDisk]:
    """Open an image by path or URL, once.

    Args:
        cache: bytes that are kept of what was read.
    Raises:
        FormatError: not such an image, damaged, or using what is not read here.
        StoreError, PlanError: it can't be read.
    """
    async with open_files(named) as opened:
        counter = counted(opened.reader)
        files = replace(opened, reader=counter)
        image = await files.open_image()
        # A local file that is the image itself: its bytes need not come through this process.
        is_plain = files.format in _IN_FILE and not (files.extents or files.backing)
        fd = opened.reader.fileno() if is_plain and isinstance(opened.reader, FileReader) else None
        disk = CachedImage(image, capacity=cache, fd=fd, on_sent=counter.count)
        yield OpenedDisk(files=files, image=image, disk=disk, counter=counter)
