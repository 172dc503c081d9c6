"""Read a disk out of an image, from a file, an S3-compatible store, a web or an NBD server, by ranges.

What the image does not store is not fetched. A name inside the image is never opened.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from pipeline.config.options import without_secrets
from pipeline.errors import FormatError, SourceError
from pipeline.events import ImageOpened
from pipeline.flow.items import Block, Content, Run, Why
from pipeline.flow.pacing import RATE_MIN, RateLimit
from pipeline.flow.stage import BLOCKS, DISK_SIZE, NOTHING, SourceInfo, StageContext, StageSpec, option
from pipeline.units import MiB, Size

if TYPE_CHECKING:
    from stages.decode.image import DecodedImage, Fetched
    from stages.decode.named import NamedImage, OpenedFiles

# The window. Larger ones hold more fetched bytes beside the run's buffers, smaller ones cost more round trips.
_WINDOW = 2 * MiB
# Fetches at once; each holds at most twice a window and 1 MiB (`DecodedImage.fetch`).
_FETCHES = 4
# What a reader keeps of tables.
_TABLES = 8 * MiB
# What unpacking a stream without an index holds: the bytes behind the reading place, the window, what is read ahead.
_UNPACKING = 24 * MiB
# How long planning may look at the tables to tell how much there is to read; the rest counts as data.
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of read.image."""

    path: Path | None = option(None, doc="The image file. Either this or url.")
    url: str | None = option(
        None,
        doc="Where the image is: s3://, az://, gs://, sftp://, nbd://, http(s):// or dav(s)://, read by ranges.",
    )
    format: str = option(
        "auto",
        doc="raw, qcow2, vhd, vmdk, vhdx, ova or gce; raw+zstd and the like inside gzip, zstd or lz4. auto looks "
        "once, and never at a block device; declare the disk of a guest that you do not trust.",
    )
    extents: tuple[str, ...] = option(
        (), doc="The other files of a VMDK, as paths or URLs in the order of its descriptor; no other file is opened."
    )
    member: str = option("", doc="The disk inside of an OVA that has several.")
    backing: tuple[str, ...] = option(
        (), doc="What a qcow2 overlay lies on, the next below it first; the name inside the image is never opened."
    )
    backing_format: str = option("auto", doc="The format of the backing images.")
    endpoint: str = option("", doc="Of an S3-compatible store; else as for write.s3.")
    ca_file: Path | None = option(None, doc="PEM certificates to trust instead of the system's.", may_change=True)
    rate_limit: Size | None = option(
        None,
        doc='Read at most this much a second, as in "40 MiB", of what the image stores.',
        may_change=True,
        minimum=RATE_MIN,
    )

    def __post_init__(self) -> None:
        if (self.path is None) == (self.url is None):
            raise ValueError('read.image takes either path = "..." or url = "..."')
        for name in ("format", "backing_format"):
            _check_format(name, getattr(self, name))

    @property
    def named(self) -> NamedImage:
        """The image as the readers take it."""
        from stages.decode.named import NamedImage

        return NamedImage(
            place=self.url or str(self.path),
            format=self.format,
            extents=self.extents,
            member=self.member,
            backing=self.backing,
            backing_format=self.backing_format,
            endpoint=self.endpoint,
            ca_file=self.ca_file,
        )


def _check_format(name: str, format: str) -> None:
    from stages.decode.opening import ALIASES, FORMATS, is_known

    if format not in ("auto", *ALIASES) and not is_known(format):
        raise ValueError(f'{name}: "{format}" is not one of auto, {", ".join(FORMATS)}')


class ImageReader:
    """An image's map, and its windows: fetched on the event loop, decoded in threads."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._options = options
        self._context = context
        self._stack = AsyncExitStack()
        self._image: DecodedImage | None = None
        self._room = anyio.Semaphore(_FETCHES)

    async def open(self) -> SourceInfo:
        """Open the files, find the format, check the header.

        Raises:
            FormatError: not such an image, damaged, or using what is not read here.
            StoreError, PlanError: it can't be read.
        """
        from stages.decode.named import open_files
        from stages.decode.refusal import UnsupportedError

        limit = RateLimit(self._context.clock, self._options.rate_limit)
        named = replace(self._options.named, limit=limit)
        files = await self._stack.enter_async_context(open_files(named))
        try:
            self._image = image = await files.open_image()
        except UnsupportedError:
            raise
        except FormatError:
            await files.refuse_another_format()
            raise
        self._context.emit(
            ImageOpened(
                stage=self._context.name,
                uri=without_secrets(files.named.place),
                format=files.format,
                how=files.note or "declared",
                size_bytes=image.size,
                warnings=image.warnings,
            )
        )
        return SourceInfo(
            size=image.size,
            mapped_bytes=await self._mapped(image),
            path=str(self._options.path) if self._options.path is not None else None,
            block_size=_WINDOW,
            own_bytes=_FETCHES * (2 * _WINDOW + MiB) + _TABLES + (_UNPACKING if "+" in files.format else 0),
            identity=_identity(files, image),
        )

    async def _mapped(self, image: DecodedImage) -> int:
        zeros = 0
        with anyio.move_on_after(_LOOK_S):
            async for extent in image.extents(0, image.size):
                zeros += extent.length if extent.is_zero else 0
        return image.size - zeros

    async def windows(self, window: int, start: int = 0) -> AsyncIterator[Block]:
        """The disk from `start` as whole aligned windows and long skips. Raises FormatError, StoreError."""
        image = self._opened
        pending: list[Run] = []
        begin = start
        async for run in self._runs(start):
            while run.length:
                if not pending and not run.is_data and run.end - begin >= window:
                    stop = run.end if run.end == image.size else run.end - run.end % window
                    yield Block(begin, stop - begin, None, (Run(begin, stop - begin, run.content, run.why),))
                else:
                    stop = min(run.end, begin - begin % window + window)
                    pending.append(Run(run.offset, stop - run.offset, run.content, run.why))
                    if stop % window and stop != image.size:
                        break
                    yield Block(begin, stop - begin, None, tuple(pending))
                    pending = []
                begin = stop
                run = Run(stop, run.end - stop, run.content, run.why)

    async def _runs(self, start: int) -> AsyncIterator[Run]:
        """Data and zeros from `start` on; neighbours of one kind are one run."""
        image = self._opened
        last: Run | None = None
        async for extent in image.extents(start, image.size - start):
            kind = (Content.ZERO, Why.HOLE) if extent.is_zero else (Content.DATA, Why.READ)
            if last is not None and last.content is kind[0] and extent.is_zero:
                last = Run(last.offset, extent.end - last.offset, *kind)
                continue
            if last is not None:
                yield last
            last = Run(extent.offset, extent.length, *kind)
        if last is not None:
            yield last

    async def fetch(self, block: Block) -> Callable[[memoryview], None]:
        """Read what the image stores of the block."""
        async with self._room:
            fetched = await self._opened.fetch(block.offset, block.length)
        return partial(self._decode, fetched)

    def _decode(self, fetched: Fetched, buffer: memoryview) -> None:
        self._opened.decode(fetched, buffer[: fetched.length])

    @property
    def _opened(self) -> DecodedImage:
        if self._image is None:
            raise SourceError("the image is not open", operation="read")
        return self._image

    async def close(self) -> None:
        """Close every file and connection; idempotent."""
        self._image = None
        await self._stack.aclose()


def _identity(files: OpenedFiles, image: DecodedImage) -> dict[str, str]:
    """What tells this image from another, for manifest and resume."""
    named = files.named
    found = {
        "image": without_secrets(named.place),
        "kind": "image",
        "format": files.format,
        "size": str(image.size),
        "file_size": str(files.reader.size),
    }
    if named.extents:
        found["extents"] = ", ".join(without_secrets(one) for one in named.extents)
    if named.backing:
        found["backing"] = ", ".join(without_secrets(one) for one in named.backing)
    state = getattr(files.reader, "state", None)
    for name in ("etag", "modified"):
        if value := getattr(state, name, ""):
            found[name] = value
    return found


SPEC = StageSpec(
    name="read.image",
    summary="Read a disk out of an image of any format, from a file or a URL by ranges; zeros are not fetched.",
    options=Options,
    takes=NOTHING,
    gives=BLOCKS,
    build=ImageReader,
    provides=(DISK_SIZE,),
)
