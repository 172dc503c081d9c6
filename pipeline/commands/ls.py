"""`pipeline ls`: files on a disk inside of an image, wherever it is stored, without fetching it."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import Console, run_async, until_interrupted, verb
from pipeline.commands.looking import (
    Inside,
    not_there,
    open_place,
    parse_place,
    printable,
    takes_place,
    view_of,
    volume_lines,
)
from pipeline.errors import EXIT_OK, FormatError

if TYPE_CHECKING:
    from stages.decode.named import NamedImage
    from stages.disk.tree import Node, View
    from stages.disk.volumes import DiskVolumes

# What a datetime can hold: the years 1 to 9999. A damaged inode can claim any time.
_FIRST_S, _LAST_S = -62135596800, 253402300799
_LETTERS = {
    "file": "-",
    "directory": "d",
    "link": "l",
    "character device": "c",
    "block device": "b",
    "fifo": "p",
    "socket": "s",
}


@click.command("ls")
@takes_place
@verb
def command(console: Console, place: str, **named: Any) -> int:
    """List files on a disk: image.qcow2:2/etc is the folder /etc of partition 2, image.qcow2:/etc that of the system
    with everything mounted as its fstab says. IMAGE alone lists the partitions and logical volumes.

    Reads ext2, ext3, ext4, xfs, btrfs and FAT in images of any format, from a file or a URL by ranges.
    """
    from stages.decode.named import NamedImage

    inside = parse_place(place)
    work = partial(_list, console, inside, NamedImage(place=inside.image, **named))
    return run_async(partial(until_interrupted, work, console, cleaned="nothing was changed"))


async def _list(console: Console, inside: Inside, wanted: NamedImage) -> int:
    async with open_place(inside, wanted) as disk:
        if inside.path is None:
            _tell_volumes(console, disk)
            return EXIT_OK
        view = await view_of(disk, inside)
        try:
            node = await view.stat(inside.path, follow=inside.path.endswith("/"))
            if node.kind.value != "directory":
                await _tell(console, view, inside.path, inside.path, node)
                return EXIT_OK
            entries = await view.list(inside.path)
        except OSError as error:
            raise not_there(error, inside.path) from None
        for entry in sorted(entries, key=lambda one: one.name):
            path = f"{inside.path.rstrip('/')}/{entry.name}"
            try:
                await _tell(console, view, path, entry.name, await view.stat(path, follow=False))
            except (OSError, FormatError) as error:
                why = error.message if isinstance(error, FormatError) else error.strerror
                console.note(f"warning: {printable(path)}: {why}")
    return EXIT_OK


def _tell_volumes(console: Console, disk: DiskVolumes) -> None:
    for line in volume_lines(disk):
        console.say(line)
    for problem in disk.problems:
        console.note(f"warning: {problem}")
    for one in disk.volumes:
        console.tell(
            "volume",
            name=one.name,
            partition=one.number,
            offset=one.offset,
            length=one.length,
            kind=one.tree.kind if one.tree else one.signature.kind,
            label=one.tree.label if one.tree else one.signature.label,
            uuid=one.tree.uuid if one.tree else one.signature.uuid,
            readable=one.tree is not None,
            dirty=one.tree.dirty if one.tree else None,
            problem=one.problem,
        )


async def _tell(console: Console, view: View, path: str, name: str, node: Node) -> None:
    target = await view.target(path) if node.kind.value == "link" else None
    when = datetime.fromtimestamp(max(_FIRST_S, min(node.modified_s, _LAST_S)), UTC)
    console.tell(
        "entry",
        name=name,
        path=path,
        kind=node.kind.value,
        inode=node.number,
        mode=f"{node.mode:04o}",
        uid=node.uid,
        gid=node.gid,
        size=node.size,
        modified=when.isoformat(),
        target=target,
        immutable=node.immutable,
        append_only=node.append_only,
    )
    letters = _LETTERS.get(node.kind.value, "?") + stat.filemode(node.mode | stat.S_IFREG)[1:]
    arrow = f" -> {printable(target)}" if target is not None else ""
    shown = f"{printable(name)}{arrow}"
    console.say(f"{letters} {node.uid:>5} {node.gid:>5} {node.size:>12} {when:%Y-%m-%d %H:%M} {shown}")
