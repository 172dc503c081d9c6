"""A disk copied out of an NBD server with nbdcopy: `pipeline serve` against `qemu-nbd` over the same local image."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from perf.case import Attempt, Case, Contender, Goal, Ground, StoredFile
from perf.measure import one

# Starts the server, waits until it listens, copies everything, and ends it. The start counts for both.
SCRIPT = """\
{server} >/dev/null 2>&1 &
server=$!
until [ -S {socket} ]; do kill -0 $server || exit 1; sleep 0.02; done
nbdcopy 'nbd+unix:///?socket={socket}' {image}
code=$?
kill $server
wait $server
exit $code
"""


def copied_from(name: str, server: Callable[[Ground, Path], str]) -> Contender:
    """Return the contender that copies the disk out of a server into a raw file."""

    def prepare(ground: Ground) -> Attempt:
        image, socket = ground.folder / "image.raw", ground.folder / "s"
        script = SCRIPT.format(
            server=server(ground, socket), socket=shlex.quote(str(socket)), image=shlex.quote(str(image))
        )
        return Attempt(steps=(one("sh", "-c", script),), image=StoredFile(path=image, format="raw"))

    return Contender(name, prepare)


def _ours(ground: Ground, socket: Path) -> str:
    # The product is named by the command that takes an export.toml: `... run`.
    return shlex.join([*ground.product[:-1], "serve", "-f", "raw", str(ground.disk), "--socket", str(socket)])


def _qemu(ground: Ground, socket: Path) -> str:
    return shlex.join(["qemu-nbd", "-f", "raw", "-r", "-t", "-e", "16", "-k", str(socket), str(ground.disk)])


CASES = (
    Case(
        name="serve-raw",
        summary="a raw disk copied out of an NBD server",
        disk="system",
        ours=copied_from("pipeline serve | nbdcopy", _ours),
        rival=copied_from("qemu-nbd | nbdcopy", _qemu),
        goals=(Goal("wall ratio", 1.0),),
    ),
)
