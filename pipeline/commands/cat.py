"""`pipeline cat`: one file of a disk inside of an image, wherever it is stored, without fetching the rest."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import Console, run_async, until_interrupted, verb
from pipeline.commands.looking import Inside, NotThere, not_there, open_place, parse_place, takes_place, view_of
from pipeline.errors import EXIT_FAILED, EXIT_OK, PlanError
from pipeline.units import MiB

if TYPE_CHECKING:
    from stages.decode.named import NamedImage

# Read and written at a time. Smaller ones cost round trips to a store, larger ones memory.
_STEP = 4 * MiB


@click.command("cat")
@takes_place
@verb
def command(console: Console, place: str, **named: Any) -> int:
    """Write a file of a disk to stdout: image.qcow2:2/etc/fstab is /etc/fstab of partition 2, image.qcow2:/etc/fstab
    that of the system with everything mounted. Links are followed inside of that.
    """
    from stages.decode.named import NamedImage

    if console.as_json:
        raise PlanError("--json writes to stdout, and the file goes there", hint="pipeline ls --json tells about it.")
    inside = parse_place(place)
    if inside.path is None:
        raise NotThere("this is an image, not a file in it", hint=f"Say which: {place}:/etc/fstab, or {place}:1/file.")
    work = partial(_copy, inside, NamedImage(place=inside.image, **named))
    return run_async(partial(until_interrupted, work, console, cleaned="nothing was changed"))


async def _copy(inside: Inside, wanted: NamedImage) -> int:
    path = inside.path or "/"
    async with open_place(inside, wanted) as disk:
        view = await view_of(disk, inside)
        try:
            node = await view.stat(path)
            if node.kind.value != "file":
                raise NotThere(f"{path}: it is a {node.kind.value}", hint="pipeline ls lists folders.")
            for offset in range(0, node.size, _STEP):
                sys.stdout.buffer.write(await view.read_at(path, offset, _STEP))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            # `| head` has seen enough. What is still buffered would raise again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILED
        except OSError as error:
            raise not_there(error, path) from None
    return EXIT_OK
