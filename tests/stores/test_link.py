"""The link is as late and as slow as it says, and no slower."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import anyio
import anyio.abc
import pytest
from anyio.to_thread import run_sync

from tests.stores.link import Link, Network, running_link
from tests.stores.s3 import S3Server

MB = 1_000_000


@asynccontextmanager
async def echo_server() -> AsyncIterator[int]:
    """A server that answers `?` with `!`, and at the end of what a client sent with its length."""

    async def count(stream: anyio.abc.SocketStream) -> None:
        total = 0
        async with stream:
            with suppress(anyio.BrokenResourceError):
                async for data in stream:
                    total += len(data)
                    if data.endswith(b"?"):
                        await stream.send(b"!")
                await stream.send(str(total).encode())

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    with anyio.fail_after(30):
        async with listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, count)
            yield listener.extra(anyio.abc.SocketAttribute.local_port)
            group.cancel_scope.cancel()


async def send(port: int, count: int) -> float:
    """Send so many bytes and wait for their receipt; returns the seconds it took."""
    begun = time.monotonic()
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(bytes(count))
        await stream.send_eof()
        assert await stream.receive() == str(count).encode()
    return time.monotonic() - begun


async def test_round_trip_takes_twice_the_latency() -> None:
    async with echo_server() as port, Link(port, Network(latency_s=0.05)) as link:
        begun = time.monotonic()
        async with await anyio.connect_tcp("127.0.0.1", link.port) as stream:
            for round_trips in (2, 3):  # The first pays for the connection too.
                await stream.send(b"?")
                assert await stream.receive() == b"!"
                took = time.monotonic() - begun
                assert round_trips * 0.1 <= took < round_trips * 0.1 + 0.2


async def test_bandwidth_is_shared_by_all_connections() -> None:
    async with echo_server() as port, Link(port, Network(up_bytes_per_s=20 * MB)) as link:
        begun = time.monotonic()
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(send, link.port, 2 * MB)
        took = time.monotonic() - begun
        assert 0.38 < took < 1.2


async def test_latency_does_not_lower_the_throughput_of_a_wide_window() -> None:
    """8 MB at 50 ms one way: with 100 KiB under way at a time it would take 8 s."""
    async with echo_server() as port, Link(port, Network(latency_s=0.05, window_bytes=8 * MB)) as link:
        assert 0.2 <= await send(link.port, 8 * MB) < 1.5


async def test_window_bounds_what_is_under_way() -> None:
    """1 MB in windows of 256 KiB takes 4 windows, one way each, and the two round trips around them."""
    async with echo_server() as port, Link(port, Network(latency_s=0.05, window_bytes=256 * 1024)) as link:
        assert await send(link.port, 1024 * 1024) >= 0.1 + 4 * 0.05 + 0.05


async def test_cut_link_resets_and_mends() -> None:
    async with echo_server() as port, Link(port, Network(latency_s=0.01)) as link:
        async with await anyio.connect_tcp("127.0.0.1", link.port) as stream:
            await stream.send(b"?")
            assert await stream.receive() == b"!"
            link.cut()
            with pytest.raises((anyio.BrokenResourceError, anyio.EndOfStream)):
                await stream.receive()
        with pytest.raises(OSError):
            await anyio.connect_tcp("127.0.0.1", link.port)
        link.mend()
        assert await send(link.port, 1000) > 0


async def test_store_works_through_a_link_with_tls(seaweedfs_tls: S3Server) -> None:
    bucket = seaweedfs_tls.new_bucket()
    async with Link(seaweedfs_tls.port, Network(latency_s=0.01)) as link:
        server = seaweedfs_tls.reached_at(f"https://127.0.0.1:{link.port}")
        await run_sync(server.put, bucket, "image", bytes(MB))
        assert await run_sync(server.get, bucket, "image") == bytes(MB)


async def test_link_of_its_own_process_ends_with_the_block() -> None:
    async with echo_server() as port:
        with running_link(port, Network(latency_s=0.002, up_bytes_per_s=50 * MB)) as link_port:
            assert await send(link_port, 10 * MB) >= 0.2
        with pytest.raises(OSError):
            await anyio.connect_tcp("127.0.0.1", link_port)
