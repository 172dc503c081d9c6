"""IMAGE:PARTITION/PATH, as `ls` and `cat` take it: the image that is named, one of its volumes, or the whole system."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.commands.console import ca_file_option
from pipeline.errors import FormatError, PipelineError
from pipeline.units import format_size

if TYPE_CHECKING:
    from stages.decode.named import NamedImage
    from stages.disk.tree import View
    from stages.disk.volumes import DiskVolumes, Volume

C = TypeVar("C", bound=Callable[..., Any])

# A colon, the name of a volume (or nothing), and a path from there (or nothing).
_INSIDE = re.compile(r":([\w.+-]*)(/.*)?", re.S)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://[^/?]*", re.I)


@dataclass(frozen=True, slots=True)
class Inside:
    """What a person asked for.

    Attributes:
        image: path or URL.
        volume: a partition's number, or a logical volume as below /dev/mapper; empty for the system by its own paths.
        path: from the root of that; None where only the image was named.
    """

    image: str
    volume: str
    path: str | None


class NotThere(PipelineError):
    """The image can be read, and what was asked for is not in it."""


def parse_place(text: str) -> Inside:
    """Cut IMAGE, IMAGE:/PATH or IMAGE:PARTITION/PATH.

    The first colon with something sensible behind it parts them: one in a name on the disk does no harm. A local file
    that really has that name is taken for what it is.
    """
    scheme = _SCHEME.match(text)
    begin = scheme.end() if scheme else 0
    if not scheme and Path(text).exists():
        return Inside(text, "", None)
    cuts = [at for at in range(begin, len(text)) if text[at] == ":" and _INSIDE.fullmatch(text, at)]
    cuts = [at for at in cuts if text[begin:at] or not scheme]
    if not cuts:
        return Inside(text, "", None)
    at = next((one for one in cuts if not scheme and Path(text[:one]).exists()), cuts[-1 if "?" in text else 0])
    found = _INSIDE.fullmatch(text, at)
    assert found is not None
    return Inside(text[:at], found[1], found[2] or "/")


def takes_place(body: C) -> C:
    """Give a click command its IMAGE:PARTITION/PATH and what says how to open the image."""
    for decorate in (
        ca_file_option,
        click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store."),
        click.option("--member", default="", metavar="NAME", help="The disk inside of an OVA that has several."),
        click.option("--extent", "extents", multiple=True, metavar="FILE", help="A VMDK's other file, in order."),
        click.option(
            "-f", "--format", default="auto", metavar="FMT", help="Of the image; else told once by its first bytes."
        ),
        click.argument("place", metavar="IMAGE[:PARTITION][/PATH]"),
    ):
        body = decorate(body)
    return body


@asynccontextmanager
async def open_place(inside: Inside, wanted: NamedImage) -> AsyncIterator[DiskVolumes]:
    """The volumes of the image.

    Raises:
        PipelineError: it can't be opened or read.
    """
    from stages.decode.named import open_files
    from stages.disk.volumes import open_volumes

    async with open_files(replace(wanted, place=inside.image)) as files:
        yield await open_volumes(await files.open_image())


async def view_of(disk: DiskVolumes, inside: Inside) -> View:
    """What paths are looked up in: one volume by itself, or the system with everything mounted.

    Raises:
        NotThere: no such volume, or its files can't be read; the hint lists what there is.
    """
    from stages.disk.view import DiskView, open_system

    there = "there is:\n" + "\n".join(f"    {line}" for line in volume_lines(disk))
    if not inside.volume:
        try:
            return await open_system(disk)
        except FormatError as error:
            raise NotThere(error.message, hint=f"Name a partition, as in IMAGE:1/; {there}") from None
    volume = disk.get(inside.volume)
    if volume is None:
        raise NotThere(f'the image has no volume "{inside.volume}"', hint=there[0].upper() + there[1:])
    if volume.tree is None:
        raise NotThere(f"{volume.title} can't be looked into: {volume.problem}", hint=there[0].upper() + there[1:])
    return DiskView(volume.tree)


def volume_lines(disk: DiskVolumes) -> list[str]:
    """The volumes of a disk, one a line, in columns."""
    rows = [("volume", "size", "kind", "label", "uuid", "")]
    rows += [_volume_row(one) for one in disk.volumes]
    if len(rows) == 1:
        return ["no volume at all"]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:5], widths, strict=True)), row[5]]).rstrip()
        for row in rows
    ]


def _volume_row(volume: Volume) -> tuple[str, str, str, str, str, str]:
    kind, label, uuid = volume.signature.kind, volume.signature.label, volume.signature.uuid
    note = volume.problem
    if volume.tree is not None:
        kind, label, uuid = volume.tree.kind, volume.tree.label, volume.tree.uuid
        note = volume.tree.dirty or ""
    return (volume.name, format_size(volume.length), kind, printable(label), uuid, note)


def printable(text: str) -> str:
    """What an image says is shown, but never acts on a terminal. Bytes that are no text are shown as \\xNN."""
    shown = []
    for char in text:
        code = ord(char)
        if 0xDC80 <= code <= 0xDCFF:
            shown.append(f"\\x{code - 0xDC00:02x}")
        else:
            shown.append(char if char.isprintable() else f"\\x{code:02x}" if code < 256 else "?")
    return "".join(shown)


def not_there(error: OSError, place: str) -> NotThere:
    """The error of a path, in words."""
    return NotThere(f"{printable(place)}: {(error.strerror or str(error)).lower()}")
