"""An image as a user names it: by path or URL, with a format or without, with the other files that it needs.

Only what the user names is opened. A name inside an image (backing file, extent, data file) is data.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import FormatError, PlanError, StoreError
from pipeline.flow.items import RangeReader
from pipeline.flow.pacing import RateLimit
from stages.compress.index import FRAME_INDEX, FrameIndex
from stages.decode.framed import has_seek_table, open_framed
from stages.decode.image import DecodedImage
from stages.decode.opening import ALIASES, FORMATS, is_known, open_image
from stages.decode.probing import probe
from stages.decode.refusal import misnamed
from stages.decode.slowed import slowed
from stages.decode.unpacked import UnpackedStream
from stages.store.file import local_path
from stages.store.stored import open_stored, read_manifest, scheme_of

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedImage:
    """What a user says about an image.

    Attributes:
        place: path or URL.
        format: `auto`, one of `opening.FORMATS`, or one of them, "+" and a codec.
        extents: paths or URLs of a VMDK's other files, in the order of its descriptor.
        member: the disk inside of an OVA that has several.
        backing: what a qcow2 overlay lies on, the next below it first.
        backing_format: of all of those.
        endpoint: for S3 URLs.
        ca_file: PEM certificates to trust instead of the system's.
        limit: of what is read from all of the files together; None for none.
    """

    place: str
    format: str = AUTO
    extents: tuple[str, ...] = ()
    member: str = ""
    backing: tuple[str, ...] = ()
    backing_format: str = AUTO
    endpoint: str = ""
    ca_file: Path | None = None
    limit: RateLimit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedFiles:
    """The files of an image, open for reading. Borrowed from `open_files`.

    Attributes:
        format: as declared, else as found.
        note: how the format was found; empty where it was declared.
        index: of a compressed stream that has none of its own.
    """

    named: NamedImage
    reader: RangeReader
    format: str
    note: str
    extents: tuple[RangeReader, ...]
    index: FrameIndex | None
    backing: OpenedFiles | None

    async def open_packed(self) -> tuple[RangeReader, str]:
        """The image and its format without the compressor around it. Raises FormatError, StoreError.

        A stream without an index of its frames, as the usual tools make it, is unpacked once to find its size.
        """
        inner, _, codec = self.format.partition("+")
        if not codec:
            return self.reader, inner
        if self.index is not None or (codec == "zstd" and await has_seek_table(self.reader)):
            return await open_framed(self.reader, codec, self.index), inner
        stream = UnpackedStream(self.reader, codec, codec)
        await stream.measure()
        return stream, inner

    async def open_image(self) -> DecodedImage:
        """Read and check the header. Raises as `opening.open_image`."""
        backing = await self.backing.open_image() if self.backing else None
        reader, format = await self.open_packed()
        return await open_image(
            reader,
            format,
            extents=self.extents or None,
            member=self.named.member,
            backing=backing,
        )

    async def refuse_another_format(self) -> None:
        """Say so where the image could not be read as what it was declared to be, but plainly is something else.

        Only a better message for what failed: a probe never overrules what was declared. Not for an image that we
        stored: there another format is damage.

        Raises:
            UnsupportedError: as another format it would be taken. StoreError: it can't be read.
        """
        if self.note:
            return
        try:
            found = await probe(self.reader)
        except FormatError:
            return
        if found.format != self.format and not found.note:
            raise misnamed(
                self.format,
                f"the image was declared as {self.format}, and begins like {found.format}",
                hint=f"Declare it as {found.format}, or leave the format out.",
            )


@asynccontextmanager
async def open_files(named: NamedImage) -> AsyncIterator[OpenedFiles]:
    """Open every file that the user named, and find out the format where none was declared: once, never of a device.

    Raises:
        FormatError: the format can't be told.
        StoreError, PlanError: a file can't be opened.
    """
    async with AsyncExitStack() as stack:
        reader, *extents = [
            await stack.enter_async_context(open_stored(one, named.endpoint, ca_file=named.ca_file))
            for one in (named.place, *named.extents)
        ]
        if named.limit is not None:
            reader, *extents = [slowed(one, named.limit) for one in (reader, *extents)]
        format, note = ALIASES.get(named.format, named.format), ""
        if format != AUTO and not is_known(format):
            raise PlanError(
                f'"{named.format}" is no format that is read here',
                operation="open",
                hint=f"{', '.join(FORMATS)}, or auto.",
            )
        if format == AUTO:
            name = named.place.partition("?")[0] if scheme_of(named.place) != "file" else named.place
            found = await probe(reader, name_hint=name, is_block_device=is_block_device(named.place))
            format, note = found.format, found.note or "told by its magic number"
        codec = format.partition("+")[2]
        backing = None
        if named.backing:
            lower = replace(
                named,
                place=named.backing[0],
                format=named.backing_format,
                backing=named.backing[1:],
                extents=(),
                member="",
            )
            backing = await stack.enter_async_context(open_files(lower))
        yield OpenedFiles(
            named=named,
            reader=reader,
            format=format,
            note=note,
            extents=tuple(extents),
            index=await _index(named) if codec not in ("", "zstd") else None,
            backing=backing,
        )


def is_block_device(place: str) -> bool:
    """Whether a path names one. Never for a URL."""
    if scheme_of(place) != "file":
        return False
    try:
        return stat.S_ISBLK(os.stat(local_path(place)).st_mode)
    except OSError:
        return False


async def _index(named: NamedImage) -> FrameIndex | None:
    """Where the frames of a stream lie; only its manifest knows. None without one: others make such streams too."""
    try:
        manifest = await read_manifest(named.place, named.endpoint, ca_file=named.ca_file)
    except StoreError:
        return None
    told = manifest.facts.get(FRAME_INDEX.name)
    return FrameIndex.from_json(told) if told is not None else None
