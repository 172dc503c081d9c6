"""`pipeline inspect`: what an image says about itself, whether it is in order, and what it stores where. By ranges."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import Console, ca_file_option, run_async, until_interrupted, verb
from pipeline.config.options import without_secrets
from pipeline.errors import EXIT_DIFFERS, EXIT_OK
from pipeline.units import format_exact, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stages.decode.check.report import CheckReport, ImageInfo
    from stages.decode.named import NamedImage, OpenedFiles
    from stages.decode.places import Place

# More are counted; whoever wants all asks for --json.
_FINDINGS_SHOWN = 20


@click.command("inspect")
@click.argument("image", metavar="IMAGE|URL")
@click.option("-f", "--format", default="auto", metavar="FMT", help="Of the image; else told once by its first bytes.")
@click.option("--deep", is_flag=True, help="Also read and unpack every stored block.")
@click.option("--map", "with_map", is_flag=True, help="What is stored where; with --json as `qemu-img map` prints it.")
@click.option(
    "--extent", "extents", multiple=True, metavar="FILE", help="A VMDK's other file; in the order of its descriptor."
)
@click.option("--member", default="", metavar="NAME", help="The disk inside of an OVA that has several.")
@click.option("--backing", multiple=True, metavar="FILE", help="What a qcow2 overlay lies on, the next below it first.")
@click.option("--backing-format", default="auto", metavar="FMT", help="Of the --backing images.")
@click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store.")
@ca_file_option
@verb
def command(console: Console, image: str, deep: bool, with_map: bool, **named: Any) -> int:
    """Look at an image by ranges, without fetching it: what it is, every invariant of its format, what it stores.

    Of a qcow2 overlay the file itself is checked, and with --backing the map is that of the whole chain.

    Exits 0 when it is in order (leaks only waste space: 0, with a warning), 3 when it is corrupt, 2 when it uses what
    is not read here or a file was not named, 1 when it can't be read.
    """
    from stages.decode.named import NamedImage

    wanted = NamedImage(place=image, **named)
    return run_async(partial(_inspect, console, wanted, deep, with_map))


async def _inspect(console: Console, wanted: NamedImage, deep: bool, with_map: bool) -> int:
    work = partial(_look, console, wanted, deep, with_map)
    return await until_interrupted(work, console, cleaned="nothing was changed")


async def _look(console: Console, wanted: NamedImage, deep: bool, with_map: bool) -> int:
    from stages.decode.check.checking import check
    from stages.decode.named import open_files

    async with open_files(wanted) as files:
        reader, inner = await files.open_packed()
        report = await check(
            reader,
            inner,
            deep=deep,
            extents=files.extents or None,
            member=wanted.member,
            is_overlay=files.backing is not None,
        )
        if not report.is_complete:
            await files.refuse_another_format()
        _tell(console, files, report, quietly=with_map and console.as_json)
        if with_map and (report.verdict != "corrupt" or report.is_complete):
            await _tell_map(console, files)
    return EXIT_DIFFERS if report.verdict == "corrupt" else EXIT_OK


def _tell(console: Console, files: OpenedFiles, report: CheckReport, *, quietly: bool) -> None:
    place = without_secrets(files.named.place)
    if report.verdict == "leaks":
        console.note(f"warning: {report.leaks} leaked blocks: space is wasted, nothing is lost")
    if quietly:
        if report.verdict == "corrupt":
            console.note(f"error: {place} is corrupt: {report.corruptions} faults")
        return
    console.tell(
        "inspected",
        image=place,
        format=files.format,
        format_note=files.note,
        verdict=report.verdict,
        **{name: value for name, value in dataclasses.asdict(report).items() if name != "format"},
    )
    for line in _lines(place, files, report):
        console.say(line)


def _lines(place: str, files: OpenedFiles, report: CheckReport) -> Iterator[str]:
    title = report.info.variant if report.info and report.info.variant != files.format else ""
    yield f"{place}: {files.format}{f' ({title})' if title else ''}"
    facts = [*_info_lines(report.info), *_count_lines(report)]
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        yield f"  {name:<{width}}  {value}"
    for finding in report.findings[:_FINDINGS_SHOWN]:
        places = [
            f"{name} {at}"
            for name, at in (("at", finding.image_offset), ("guest offset", finding.guest_offset))
            if at is not None
        ]
        yield f"  {finding.kind}: {finding.message}" + (f" ({', '.join(places)})" if places else "")
    hidden = report.corruptions + report.leaks + report.warnings - min(len(report.findings), _FINDINGS_SHOWN)
    if hidden > 0 and len(report.findings) > _FINDINGS_SHOWN:
        yield f"  and {hidden} more"
    yield _verdict_line(report)


def _info_lines(info: ImageInfo | None) -> Iterator[tuple[str, str]]:
    if info is None:
        return
    yield "virtual size", format_exact(info.virtual_size)
    yield "file size", format_exact(info.file_size)
    if info.block_size:
        yield "block size", format_size(info.block_size)
    if info.compression != "none":
        yield "compression", info.compression
    if info.flags:
        yield "flags", ", ".join(info.flags)
    if info.identity:
        yield "identity", _printable(info.identity)
    for name, value in info.details:
        yield name, _printable(value)


def _count_lines(report: CheckReport) -> Iterator[tuple[str, str]]:
    kinds = (("stored", report.data_blocks), ("compressed", report.packed_blocks), ("zero", report.zero_blocks))
    told = ", ".join(f"{count} {kind}" for kind, count in kinds if count)
    if report.blocks and report.info is not None and report.info.block_size:
        yield "blocks", f"{report.blocks}" + (f": {told}" if told else ", none stored")
    if report.metadata_bytes:
        yield "metadata", format_exact(report.metadata_bytes)


def _verdict_line(report: CheckReport) -> str:
    how = "every stored block was unpacked" if report.is_deep else "headers and tables; --deep also unpacks every block"
    if report.verdict == "corrupt":
        more = "" if report.is_complete else "; the check could not go on"
        return f"CORRUPT: {report.corruptions} faults{more}"
    if report.verdict == "leaks":
        return f"no corruption, {report.leaks} leaked blocks ({how})"
    return f"clean ({how})" + (f", {report.warnings} warnings" if report.warnings else "")


async def _tell_map(console: Console, files: OpenedFiles) -> None:
    from stages.decode.places import map_image

    image = await files.open_image()
    formats = [one.format for one in _chain(files)]
    if console.as_json:
        line = "["
        async for place in map_image(image):
            if line != "[":
                console.put(line + ",")
                line = ""
            line += json.dumps(_as_qemu(place, formats[place.depth]))
        console.put(line + "]")
        return
    depth = "   depth" if files.backing else ""
    console.say(f"  {'guest offset':>16} {'length':>16}  {'kind':<8} {'image offset':>16}{depth}")
    async for place in map_image(image):
        at = "" if place.at is None else str(place.at)
        console.say(
            f"  {place.offset:>16} {place.length:>16}  {place.kind:<8} {at:>16}{depth and f'{place.depth:>8}'}".rstrip()
        )


def _chain(files: OpenedFiles | None) -> Iterator[OpenedFiles]:
    while files is not None:
        yield files
        files = files.backing


def _as_qemu(place: Place, format: str) -> dict[str, Any]:
    """A place as qemu-img tells one of an image of this format. docs/checker.md says where ours tells more.

    Source: qemu-img(1), "map"; QEMU block/vpc.c and block/vmdk.c, `co_block_status`: a VHD never calls a block absent,
    and a hole of the file below a flat disk is data that is zero.
    """
    is_hole_below = place.kind == "zero" and place.at is not None and format in ("vhd", "vmdk")
    told: dict[str, Any] = {
        "start": place.offset,
        "length": place.length,
        "depth": place.depth,
        "present": place.kind != "hole" or format == "vhd",
        "zero": place.kind in ("zero", "hole"),
        "data": place.kind in ("data", "packed") or is_hole_below,
        "compressed": place.kind == "packed",
    }
    return told if place.at is None else {**told, "offset": place.at}


def _printable(text: str) -> str:
    """What an image says is shown, but never acts on a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)
