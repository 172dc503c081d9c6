"""`pipeline serve`: any image, local or remote, as an NBD export that other tools can use; nothing is downloaded."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import Console, Interrupted, ca_file_option, run_async, until_interrupted, verb
from pipeline.config.options import without_secrets
from pipeline.errors import EXIT_OK, FormatError, PipelineError
from pipeline.units import format_exact, format_size

if TYPE_CHECKING:
    import socket

    from stages.decode.named import NamedImage
    from stages.serve.server import NbdServer

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@click.command("serve")
@click.argument("image", metavar="IMAGE|URL")
@click.option("-f", "--format", default="auto", metavar="FMT", help="Of the image; else told once by its first bytes.")
@click.option(
    "--overlay",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Let clients write: into this file, never into the image. It is made, or taken up again.",
)
@click.option(
    "--socket", "path", type=click.Path(path_type=Path), metavar="PATH", help="Listen on a Unix socket, for this user."
)
@click.option("--port", type=click.IntRange(0, 65535), metavar="N", help="Listen on this TCP port; 0: any free one.")
@click.option(
    "--address", default="127.0.0.1", show_default=True, help="With --port: where. NBD has no login: keep it here."
)
@click.option("--name", default="", help="Of the export; it is always reachable without one too.")
@click.option(
    "--extent", "extents", multiple=True, metavar="FILE", help="A VMDK's other file; in the order of its descriptor."
)
@click.option("--member", default="", metavar="NAME", help="The disk inside of an OVA that has several.")
@click.option("--backing", multiple=True, metavar="FILE", help="What a qcow2 overlay lies on, the next below it first.")
@click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store.")
@ca_file_option
@verb
def command(
    console: Console,
    image: str,
    overlay: Path | None,
    path: Path | None,
    port: int | None,
    address: str,
    name: str,
    **named: Any,
) -> int:
    """Serve an image as a disk, until it is interrupted. The image is never written.

    Prints the export's URL once clients may come: `nbdcopy URL disk.raw`, `qemu-img info URL`, `nbdfuse DIR URL`, and
    with --overlay `qemu-system-x86_64 -drive file=URL,format=raw,if=virtio`.
    """
    from stages.decode.named import NamedImage

    if path is not None and port is not None:
        raise click.UsageError("--socket and --port exclude each other")
    wanted = NamedImage(place=image, **named)
    listen = partial(_listen, path, port or 0, address)
    return run_async(partial(_serve, console, wanted, overlay, listen, name))


def _listen(path: Path | None, port: int, address: str) -> tuple[socket.socket, str]:
    """The listening socket, and the URL that leads there."""
    from urllib.parse import quote

    from stages.serve.server import listen_on_port, listen_on_socket

    if path is not None:
        return listen_on_socket(path), f"nbd+unix:///{{name}}?socket={quote(str(path.absolute()))}"
    listener = listen_on_port(port, address)
    host = f"[{address}]" if ":" in address else address
    return listener, f"nbd://{host}:{listener.getsockname()[1]}/{{name}}"


async def _serve(console: Console, wanted: NamedImage, overlay: Path | None, listen: Any, name: str) -> int:
    work = partial(_work, console, wanted, overlay, listen, name)
    try:
        await until_interrupted(work, console, cleaned="nothing was changed")
    except Interrupted:
        pass  # the way in which it ends
    return EXIT_OK


async def _work(console: Console, wanted: NamedImage, overlay: Path | None, listen: Any, name: str) -> None:
    import sys

    import anyio

    from stages.serve.layer import open_layer
    from stages.serve.opening import open_disk
    from stages.serve.server import NbdServer

    opened = False
    # Answers are sent by threads that need the interpreter for a moment between two calls. With the default of 5 ms a
    # copy took a tenth longer (perf/cases/serving.py); much less costs more switches than it saves.
    sys.setswitchinterval(0.0005)
    try:
        async with open_disk(wanted) as source:
            opened = True
            layer = open_layer(source.disk, overlay) if overlay is not None else None
            try:
                server = NbdServer(
                    layer or source.disk,
                    name=name,
                    description=f"{source.files.format} image",
                    on_problem=lambda problem: console.note(f"warning: {problem}"),
                )
                listener, url = listen()
                shown = url.format(name=name)
                _announce(console, wanted, server, shown, source.files.format)
                try:
                    await server.serve(listener)
                finally:
                    if wanted_path := _socket_path(listener, shown):
                        wanted_path.unlink(missing_ok=True)
                    if layer is not None:
                        with anyio.CancelScope(shield=True):
                            await layer.flush()
                    _sum_up(console, server, source.counter.read_bytes)
            finally:
                if layer is not None:
                    layer.close()
    except FormatError as error:
        if opened:
            raise
        # Nothing was found out about the image: that is not "corrupt".
        raise PipelineError(
            error.message, operation=error.operation, hint=error.hint or "Say with -f what it is.", **error.context
        ) from None


def _socket_path(listener: socket.socket, url: str) -> Path | None:
    from urllib.parse import unquote

    return Path(unquote(url.partition("?socket=")[2])) if "+unix" in url else None


def _announce(console: Console, wanted: NamedImage, server: NbdServer, url: str, format: str) -> None:
    place = without_secrets(wanted.place)
    can_write = server.disk.can_write
    console.tell("serving", url=url, image=place, format=format, size=server.disk.size, can_write=can_write)
    console.say(url)
    kind = "writes go into the overlay" if can_write else "read-only"
    console.note(f"serving {place} ({format}, {format_exact(server.disk.size)}), {kind}; Ctrl-C ends it")
    if not url.startswith("nbd+unix") and not any(f"//{one}:" in url or f"//[{one}]:" in url for one in _LOOPBACK):
        console.note("warning: whoever reaches this address can read the whole disk: NBD has no login")
    console.note(f"  for example: nbdinfo {shlex.quote(url)}")


def _sum_up(console: Console, server: NbdServer, fetched: int) -> None:
    console.tell(
        "served",
        clients=server.served,
        read_bytes=server.read_bytes,
        written_bytes=server.written_bytes,
        fetched_bytes=fetched,
    )
    console.note(
        f"{server.served} clients read {format_size(server.read_bytes)} and wrote {format_size(server.written_bytes)}; "
        f"{format_size(fetched)} were read of the image"
    )
