"""A forward proxy that knows CONNECT alone: it makes a tunnel to a server, and never sees what goes through.

Source: RFC 9110, section 9.3.6.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio

from tests.stores.messages import MessageReader
from tests.stores.wire import CHUNK, Relay, Wire, WireLost


@dataclass(slots=True, kw_only=True)
class Tunnel:
    """One CONNECT that a client asked for.

    Attributes:
        target: `host:port`.
        authorization: who the client said it is; empty where it did not.
        up_bytes, down_bytes: what went through, client to server and back.
    """

    target: str
    authorization: str
    up_bytes: int = 0
    down_bytes: int = 0


class TunnelProxy(Relay):
    """`async with TunnelProxy(server.tls_port) as proxy: ...` with clients whose `https_proxy` is `proxy.url`.

    Every tunnel ends at the server, whatever host it was asked for. Other requests are answered with 405.
    """

    def __init__(self, upstream_port: int, *, refusal: str = "") -> None:
        """Prepare it.

        Args:
            refusal: status and reason that every CONNECT is answered with; empty where tunnels are made.
        """
        super().__init__(upstream_port)
        self._refusal = refusal
        self.tunnels: list[Tunnel] = []

    async def _serve(self, client: Wire, number: int) -> None:
        reader = MessageReader(client)
        try:
            head = await reader.head()
            if head is None:
                return
            method, target, _ = head.start
            refusal = self._refusal if method == "CONNECT" else "405 Method Not Allowed"
            self.tunnels.append(Tunnel(target=target, authorization=head.headers.get("proxy-authorization", "")))
            if refusal:
                await client.send(f"HTTP/1.1 {refusal}\r\nContent-Length: 0\r\n\r\n".encode())
                await client.finish()
                return
            await self._join(reader, await self._connect(), self.tunnels[-1])
        except (WireLost, ConnectionRefusedError):
            client.reset()

    async def _join(self, reader: MessageReader, server: Wire, tunnel: Tunnel) -> None:
        """Pass bytes both ways until both sides have ended."""

        def up(count: int) -> None:
            tunnel.up_bytes += count

        def down(count: int) -> None:
            tunnel.down_bytes += count

        client = reader.wire
        try:
            await client.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            async with anyio.create_task_group() as group:
                group.start_soon(self._carry, reader.some, client, server, up)
                group.start_soon(self._carry, server.receive, server, client, down)
        finally:
            self._drop(server)

    async def _carry(
        self, take: Callable[[int], Awaitable[bytes]], source: Wire, target: Wire, count: Callable[[int], None]
    ) -> None:
        """Carry one direction to its end; a reset of one side resets the other."""
        try:
            while data := await take(CHUNK):
                await target.send(data)
                count(len(data))
            target.end()
        except WireLost:
            source.reset()
            target.reset()
