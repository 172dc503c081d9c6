"""A disk being served inside of a test, on a Unix socket or a port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from pipeline.flow.items import RangeReader
from stages.decode.opening import open_image
from stages.serve.cache import CachedImage
from stages.serve.disk import ServedDisk
from stages.serve.server import Limits, NbdServer, listen_on_port, listen_on_socket


async def cached(reader: RangeReader, format: str = "raw", *, capacity: int = 8 << 20) -> CachedImage:
    """An image behind its cache."""
    return CachedImage(await open_image(reader, format), capacity=capacity)


@asynccontextmanager
async def serving(
    disk: ServedDisk, *, socket: Path | None = None, limits: Limits | None = None, problems: list[str] | None = None
) -> AsyncIterator[tuple[NbdServer, str]]:
    """The server and its URL; it ends with the block."""
    told = problems if problems is not None else []
    server = NbdServer(disk, name="disk", limits=limits, on_problem=told.append)
    listener = listen_on_socket(socket) if socket is not None else listen_on_port(0)
    url = f"nbd+unix:///disk?socket={socket}" if socket else f"nbd://127.0.0.1:{listener.getsockname()[1]}/disk"
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, listener)
        yield server, url
        tasks.cancel_scope.cancel()


async def tool(*words: str | Path, code: int | None = 0, input: bytes | None = None) -> str:
    """Run a program beside the server; what it said."""
    command: Sequence[str] = [str(word) for word in words]
    with anyio.fail_after(60):
        done = await anyio.run_process(command, check=False, input=input, stderr=-2)
    said = done.stdout.decode(errors="replace")
    assert code is None or done.returncode == code, said
    return said
