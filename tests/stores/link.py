"""A slow or distant network: constant latency each way, and a bandwidth that all connections share.

It works below HTTP, so TLS passes too.
In a test: `async with Link(server.port, Network(latency_s=0.025, up_bytes_per_s=50e6)) as link: ...` with clients at
`link.port`. Measurements want it in a process of its own, so that it does not share the client's core: `with
running_link(port, network) as port:`.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import anyio

from tests.stores.process import Command, ServerProcess, fresh_folder
from tests.stores.wire import CHUNK, Relay, Wire, WireLost

# Bytes that may be under way on one connection and direction. Room is made when they arrive, not when that is
# acknowledged, so 4 MiB behave as a TCP window of 8 MiB: 155 MiB/s at 25 ms one way, measured.
WINDOW_BYTES = 4 * 1024 * 1024
# How far ahead of the bandwidth a connection may read: a smaller queue gives less throughput when timers are late by a
# millisecond, a larger one adds its length to every round trip (bufferbloat).
_QUEUE_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What lies between client and server.

    Attributes:
        latency_s: one way; a round trip takes twice this, and a new connection waits one round trip before its first
            byte moves.
        up_bytes_per_s: client to server, all connections together; None is as fast as it goes.
        down_bytes_per_s: server to client.
        window_bytes: what one connection may have under way in one direction.
    """

    latency_s: float = 0.0
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    window_bytes: int = WINDOW_BYTES


class Link(Relay):
    """Passes bytes of any protocol on, as late and as slowly as the network says."""

    def __init__(self, upstream_port: int, network: Network) -> None:
        super().__init__(upstream_port)
        self._network = network
        self._up = _Lane(network.up_bytes_per_s)
        self._down = _Lane(network.down_bytes_per_s)

    async def _serve(self, client: Wire, number: int) -> None:
        await anyio.sleep(2 * self._network.latency_s)
        try:
            server = await self._connect()
        except ConnectionRefusedError:
            client.reset()
            return
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._carry, client, server, self._up)
                group.start_soon(self._carry, server, client, self._down)
        finally:
            self._drop(server)

    async def _carry(self, source: Wire, target: Wire, lane: _Lane) -> None:
        """Carry one direction of one connection to its end; a reset of one side resets the other."""
        under_way = _UnderWay(self._network.window_bytes)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._deliver, under_way, source, target)
                while True:
                    await lane.wait_for_room()
                    await under_way.wait_for_room()
                    data = await source.receive(lane.bite)
                    under_way.put(lane.clear(len(data)) + self._network.latency_s, data)
                    if not data:
                        break
        except* WireLost:
            source.reset()
            target.reset()

    async def _deliver(self, under_way: _UnderWay, source: Wire, target: Wire) -> None:
        while True:
            due, data = await under_way.first()
            await anyio.sleep_until(due)
            if not data:
                target.end()
                return
            await target.send(data)
            under_way.arrived()


class _Lane:
    """One direction of the network: what all connections send goes through it one after the other."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._clear_at = 0.0
        self.bite = CHUNK if bytes_per_s is None else max(4096, min(CHUNK, int(bytes_per_s * _QUEUE_S / 4)))

    async def wait_for_room(self) -> None:
        if self._bytes_per_s is not None:
            await anyio.sleep_until(self._clear_at - _QUEUE_S)

    def clear(self, count: int) -> float:
        """Put this many bytes on the lane: when has the last of them left it?"""
        now = anyio.current_time()
        if self._bytes_per_s is None:
            return now
        self._clear_at = max(self._clear_at, now) + count / self._bytes_per_s
        return self._clear_at


class _UnderWay:
    """Bytes of one direction of one connection between their leaving and their arrival."""

    def __init__(self, window_bytes: int) -> None:
        self._window_bytes = window_bytes
        self._bytes = 0
        self._items: deque[tuple[float, bytes]] = deque()
        self._changed = anyio.Event()

    def put(self, due: float, data: bytes) -> None:
        self._items.append((due, data))
        self._bytes += len(data)
        self._notify()

    async def first(self) -> tuple[float, bytes]:
        while not self._items:
            await self._changed.wait()
        return self._items[0]

    def arrived(self) -> None:
        _, data = self._items.popleft()
        self._bytes -= len(data)
        self._notify()

    async def wait_for_room(self) -> None:
        while self._bytes >= self._window_bytes:
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


@contextmanager
def running_link(upstream_port: int, network: Network) -> Iterator[int]:
    """Run a link in a process of its own; gives the port for clients."""
    folder = fresh_folder("link")
    port_file = folder / "port"
    arguments = [sys.executable, "-m", "tests.stores.link", str(upstream_port), "--port-file", str(port_file)]
    arguments += ["--latency-s", str(network.latency_s), "--window-bytes", str(network.window_bytes)]
    if network.up_bytes_per_s is not None:
        arguments += ["--up-bytes-per-s", str(network.up_bytes_per_s)]
    if network.down_bytes_per_s is not None:
        arguments += ["--down-bytes-per-s", str(network.down_bytes_per_s)]
    process = ServerProcess(
        folder=folder,
        commands=[Command(name="link", arguments=tuple(arguments), environment={"PYTHONPATH": ":".join(sys.path)})],
        is_ready=port_file.exists,
    )
    process.start()
    try:
        yield int(port_file.read_text())
    finally:
        process.kill()


async def _run(upstream_port: int, network: Network, port_file: str) -> None:
    async with Link(upstream_port, network) as link:
        path = anyio.Path(port_file)
        fresh = path.with_suffix(".new")
        await fresh.write_text(str(link.port))
        await fresh.rename(path)
        await anyio.sleep_forever()


def main() -> None:
    """Run a link until the process is killed."""
    parser = argparse.ArgumentParser(description="Pass loopback TCP on to a port, late and slowly.")
    parser.add_argument("upstream_port", type=int)
    parser.add_argument("--port-file", required=True, help="the port for clients is written here")
    parser.add_argument("--latency-s", type=float, default=0.0, help="one way")
    parser.add_argument("--up-bytes-per-s", type=float)
    parser.add_argument("--down-bytes-per-s", type=float)
    parser.add_argument("--window-bytes", type=int, default=WINDOW_BYTES)
    given = parser.parse_args()
    network = Network(
        latency_s=given.latency_s,
        up_bytes_per_s=given.up_bytes_per_s,
        down_bytes_per_s=given.down_bytes_per_s,
        window_bytes=given.window_bytes,
    )
    anyio.run(_run, given.upstream_port, network, given.port_file)


if __name__ == "__main__":
    main()
