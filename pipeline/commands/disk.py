"""`pipeline disk`: what is on a disk or in an image, who uses it, and what an export would copy."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import Console, ca_file_option, run_async, until_interrupted, verb
from pipeline.config.options import without_secrets
from pipeline.errors import EXIT_OK, PlanError
from pipeline.units import format_exact, format_size, parse_size

if TYPE_CHECKING:
    from stages.decode.named import NamedImage
    from stages.disk.mapping import Region
    from stages.disk.occupancy import Use
    from stages.disk.selection import Selection, Wanted
    from stages.disk.tables import Partition

# As wide as a terminal at least is, with a frame.
_COLUMNS = 76
_SHADES = " ░▒▓█"
_SHADES_ASCII = " .:+#"


@click.command("disk")
@click.argument("disk", metavar="DISK|IMAGE|URL")
@click.option("-f", "--format", default="auto", metavar="FMT", help="Of the image; else told once by its first bytes.")
@click.option(
    "--extent", "extents", multiple=True, metavar="FILE", help="A VMDK's other file; in the order of its descriptor."
)
@click.option("--member", default="", metavar="NAME", help="The disk inside of an OVA that has several.")
@click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store.")
@ca_file_option
@click.option("--partitions", default="", metavar="1,2|needed", help="What an export of these would copy.")
@click.option("--through", type=int, metavar="N", help="What an export up to the end of this partition would copy.")
@click.option("--bytes", "stop", default="", metavar="SIZE", help="What an export of the beginning would copy.")
@verb
def command(console: Console, disk: str, partitions: str, through: int | None, stop: str, **named: Any) -> int:
    """Show partition table, filesystems, volumes, mounts, and what an export would copy. Nothing is written.

    Any image format, from a path or URL, by ranges. Exits 0; 2 for a cut that is not possible; 1 when it can't be read.
    """
    from stages.decode.named import NamedImage
    from stages.disk.selection import Wanted

    try:
        wanted = Wanted(
            partitions=tuple(int(one) for one in partitions.split(",")) if partitions not in ("", "needed") else None,
            needed=partitions == "needed",
            through=through,
            stop=parse_size(stop) if stop else None,
        )
    except ValueError as error:
        raise click.UsageError(f"--partitions wants numbers as in 1,2, --bytes a size: {error}") from None
    if sum(one is not None for one in (partitions or None, wanted.through, wanted.stop)) > 1:
        raise click.UsageError("--partitions, --through and --bytes contradict each other: give one of them")
    return run_async(partial(_disk, console, NamedImage(place=disk, **named), wanted))


async def _disk(console: Console, named: NamedImage, wanted: Wanted) -> int:
    return await until_interrupted(partial(_look, console, named, wanted), console, cleaned="nothing was changed")


async def _look(console: Console, named: NamedImage, wanted: Wanted) -> int:
    from pathlib import Path

    from stages.decode.named import is_block_device, open_files
    from stages.disk.occupancy import sector_size_of, uses_of
    from stages.disk.selection import select
    from stages.store.file import local_path
    from stages.store.stored import scheme_of

    async with open_files(named) as files:
        image = await files.open_image()
        uses: tuple[Use, ...] = ()
        sector_size = sector_size_of(Path(local_path(named.place))) if is_block_device(named.place) else None
        is_local = scheme_of(named.place) == "file" and files.format == "raw"
        path = Path(local_path(named.place)) if is_local else None
        if path is not None:
            uses = uses_of(path)
        chosen = await select(image, wanted, sector_size=sector_size, uses=uses, large_sectors=True, path=path)
    place = without_secrets(named.place)
    console.tell("disk", **_told(place, files.format, chosen, uses))
    for line in _lines(place, files.format, chosen, uses):
        console.say(line.rstrip())
    return EXIT_OK


# -- for programs ------------------------------------------------------------------------------------------------------


def _told(place: str, format: str, chosen: Selection, uses: Sequence[Use]) -> dict[str, Any]:
    from stages.disk.selection import used_partitions

    table = chosen.table
    mounts: dict[int, list[dict[str, Any]]] = {}
    for use in uses:
        for number in used_partitions(table, use):
            told = {"point": use.point, "kind": use.kind, "filesystem": use.filesystem, "writable": use.writable}
            mounts.setdefault(number, []).append(told)
    partitions = [
        {**one, **_space(chosen, one["number"]), "uses": mounts.get(one["number"], [])} for one in chosen.partitions()
    ]
    whole = next((region for region in _regions(chosen) if region.kind == "disk"), None)
    return {
        "disk": place,
        "format": format,
        "size": table.disk_size,
        "sector_size": table.sector_size,
        "table": table.kind,
        "signature": table.disk_signature,
        "boot_code": table.boot_code,
        "problems": table.problems,
        "partitions": partitions,
        "filesystem": whole.signature.kind if whole and whole.signature else "",
        "uses": mounts.get(0, []),
        "gaps": [
            {"offset": region.offset, "length": region.length, "copied": region.copied, "why": region.reason}
            for region in _regions(chosen)
            if region.kind == "gap"
        ],
        "virtual_size": chosen.size,
        "copied_bytes": chosen.used_bytes,
        "reasons": [list(one) for one in chosen.map.reasons()] if chosen.map else [],
        "counts": [
            {"through": number, "bytes": size, "mib": mib, "dd": dd} for number, size, mib, dd, _ in _counts(chosen)
        ],
    }


def _space(chosen: Selection, number: int) -> dict[str, Any]:
    region = _region(chosen, number)
    used, free = _used_and_free(region)
    signature = region.signature if region else None
    return {"used": used, "free": free, "state": signature.state if signature else "unknown"}


def _regions(chosen: Selection) -> Sequence[Region]:
    return chosen.map.regions if chosen.map else ()


def _region(chosen: Selection, number: int) -> Region | None:
    return next((one for one in _regions(chosen) if one.partition and one.partition.number == number), None)


def _used_and_free(region: Region | None) -> tuple[int | None, int | None]:
    """As the filesystem says, else as its map does."""
    from stages.disk.usage import UsedMap

    if region is None or region.signature is None:
        return None, None
    if region.signature.used is not None:
        return region.signature.used, region.signature.free
    if isinstance(region.outcome, UsedMap):
        return region.copied, region.length - region.copied
    return None, None


def _counts(chosen: Selection) -> Iterator[tuple[int, int, int, str, str]]:
    """(partition, bytes up to its end, MiB, what dd takes, the trap) for every place where the disk can be cut."""
    from stages.disk.cuts import guide_count

    for one in _by_start(chosen):
        try:
            made = guide_count(chosen.table, one.number)
        except PlanError:
            continue
        yield one.number, made.size, made.mib, made.command, made.trap


def _by_start(chosen: Selection) -> list[Partition]:
    return sorted((one for one in chosen.table.partitions if not one.is_extended), key=lambda one: one.start)


# -- for people --------------------------------------------------------------------------------------------------------


def _lines(place: str, format: str, chosen: Selection, uses: Sequence[Use]) -> Iterator[str]:
    from stages.disk.selection import printable

    table = chosen.table
    kinds = {"mbr": "MBR", "gpt": "GPT", "hybrid": "GPT with a hybrid MBR", "protective": "GPT that can't be read"}
    boot = "boot code in its first sector" if table.boot_code else "no boot code in its first sector"
    yield f"{place}: {format_exact(table.disk_size)}, {format}, sectors of {table.sector_size} bytes"
    signature = f" {table.disk_signature}" if table.disk_signature else ""
    yield f"  {kinds.get(table.kind, 'no partition table')}{signature}, {boot}"
    if table.sector_size != 512 and table.partitions:
        yield f"  its table counts sectors of {table.sector_size} bytes: a guest with sectors of 512 finds no partition"
    for problem in table.problems:
        yield f"  warning: {printable(problem)}"
    yield ""
    yield from _table([_HEAD, *_rows(chosen, uses)])
    yield ""
    yield from _picture(chosen)
    yield ""
    if chosen.cut is not None:
        yield f"  cut: the image has a disk of {format_exact(chosen.size)}"
    for what, how in chosen.summary():
        if what not in ("cut", "table"):
            yield f"  {what}: {printable(how)}"
    share = chosen.used_bytes * 100 / chosen.size if chosen.size else 0.0
    yield (
        f"  an export reads {format_exact(chosen.used_bytes)}, {share:.1f}% of the virtual disk; that is the most that "
        "travels, zeros and compression make it less"
    )
    counts = list(_counts(chosen))
    if counts:
        yield ""
        yield "  where a plain copy may end:"
        for number, size, mib, dd, _ in counts:
            yield f"  through partition {number}: {size} bytes = {_mib(size, mib)}: dd {dd}"
        yield f"  {counts[-1][4]}"


def _mib(size: int, mib: int) -> str:
    return f"{mib} MiB" if size == mib << 20 else f"{size / (1 << 20):.3f} MiB"


_HEAD = ("#", "start", "size", "type", "holds", "label", "uuid", "used", "free", "flags", "in use")


def _rows(chosen: Selection, uses: Sequence[Use]) -> Iterator[tuple[str, ...]]:
    from stages.disk.selection import used_partitions

    for one in sorted(chosen.table.partitions, key=lambda part: (part.start, not part.is_extended)):
        region = _region(chosen, one.number)
        own = [use for use in uses if one.number in used_partitions(chosen.table, use)]
        yield _row(str(one.number), one.start, one.length, one.type_name, region, one, own)
    for region in _regions(chosen):
        if region.kind == "disk":
            yield _row("-", 0, region.length, "whole disk", region, None, uses)


def _row(
    number: str,
    start: int,
    length: int,
    kind: str,
    region: Region | None,
    partition: Partition | None,
    uses: Sequence[Use],
) -> tuple[str, ...]:
    from stages.disk.selection import printable

    signature = region.signature if region else None
    used, free = _used_and_free(region)
    flags = [
        *(["boot"] if partition and partition.bootable else []),
        *(["dirty"] if signature and signature.state == "dirty" else []),
    ]
    points = dict.fromkeys(f"{use.point}{'' if use.writable or use.kind != 'mount' else ' (ro)'}" for use in uses)
    return (
        number,
        str(start),
        format_size(length),
        kind,
        printable(signature.kind) if signature else "",
        printable(signature.label) if signature else "",
        signature.uuid if signature else "",
        "" if used is None else format_size(used),
        "" if free is None else format_size(free),
        ", ".join(flags),
        printable(", ".join(points)),
    )


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns as wide as they need to be; those with nothing in them are left out."""
    shown = [index for index in range(len(_HEAD)) if any(row[index] for row in rows[1:])]
    if not shown:
        return
    widths = [max(len(row[index]) for row in rows) for index in shown]
    numbers = {"#", "start", "size", "used", "free"}
    for row in rows:
        cells = [
            row[index].rjust(width) if _HEAD[index] in numbers else row[index].ljust(width)
            for index, width in zip(shown, widths, strict=True)
        ]
        yield "  " + "  ".join(cells)


def _picture(chosen: Selection) -> Iterator[str]:
    """The disk from left to right: partition numbers where they begin, and below how much of each place is copied."""
    size = chosen.table.disk_size
    shades = _SHADES if "utf" in (getattr(sys.stdout, "encoding", "") or "").lower() else _SHADES_ASCII
    if not size:
        return
    names = [" "] * _COLUMNS
    for one in _by_start(chosen):
        at = min(_COLUMNS - 1, one.start * _COLUMNS // size)
        for index, char in enumerate(str(one.number)):
            if at + index < _COLUMNS and names[at + index] == " ":
                names[at + index] = char
    cells = []
    for column in range(_COLUMNS):
        begin, end = size * column // _COLUMNS, size * (column + 1) // _COLUMNS
        taken = chosen.taken_between(begin, end)
        step = 0 if not taken else 1 + (len(shades) - 2) * taken // max(1, end - begin)
        cells.append(shades[min(step, len(shades) - 1)])
    yield f"   {''.join(names)}"
    yield f"  |{''.join(cells)}|"
    yield f"   {shades[-1]} copied whole, {shades[1]} a little of it, blank: nothing"
