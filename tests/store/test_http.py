"""Nothing waits for ever: name lookup, connecting, sending, waiting for a reply and reading it all have an end.

And what goes through a proxy.
"""

from __future__ import annotations

import base64
import random
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import pytest

from pipeline.errors import StoreError
from pipeline.units import MiB
from stages.store.http import BytesBody, HttpClient, Timeouts
from tests.stores.nginx import WebServer
from tests.stores.process import free_ports
from tests.stores.tls import make_certificate
from tests.stores.tunnel import TunnelProxy

QUICK = Timeouts(connect_s=0.3, progress_s=0.3, floor_bytes_per_s=1e6, reply_s=0.6)


@asynccontextmanager
async def server(handle: Callable[[anyio.abc.SocketStream], object]) -> AsyncIterator[str]:
    """One that does with each connection what it is told; gives its origin."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with anyio.create_task_group() as tasks:

            async def serve(stream: anyio.abc.SocketStream) -> None:
                async with stream:
                    try:
                        await handle(stream)  # type: ignore[misc]  # they are coroutine functions
                    except (anyio.BrokenResourceError, anyio.EndOfStream, anyio.ClosedResourceError):
                        pass

            tasks.start_soon(listener.serve, serve)
            yield f"http://127.0.0.1:{port}"
            tasks.cancel_scope.cancel()


class Zeros:
    """A body that is there at once."""

    def __init__(self, length: int) -> None:
        self.length = length

    async def chunks(self) -> AsyncIterator[bytes]:
        """Of 1 MiB."""
        for _ in range(0, self.length, MiB):
            yield bytes(MiB)


async def ask(origin: str, *, body: Zeros | None = None, reply_max: int = MiB) -> None:
    """One request, which has to end within a few seconds."""
    client = HttpClient(origin, connections=1, timeouts=QUICK)
    try:
        with anyio.fail_after(5):
            await client.request(
                "PUT" if body else "GET", origin + "/x", {}, body, operation="ask", reply_max=reply_max
            )
    finally:
        await client.close()


def check(error: StoreError, message: str) -> None:
    """It may be tried again, and says what it waited for."""
    assert error.temporary
    assert message in str(error)


async def test_a_name_service_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    real = socket.getaddrinfo

    def silent(host: str, *more: object, **options: object) -> object:
        if host == "store.test":
            released.wait(10)
        return real("127.0.0.1", *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    try:
        with pytest.raises(StoreError) as caught:
            await ask("http://store.test:9")
    finally:
        released.set()
    check(caught.value, "no connection within 300 ms")


async def test_a_tls_handshake_that_does_not_end_is_given_up() -> None:
    async def silent(stream: anyio.abc.SocketStream) -> None:
        await anyio.sleep_forever()

    async with server(silent) as origin:
        with pytest.raises(StoreError) as caught:
            await ask(origin.replace("http:", "https:"))
    check(caught.value, "connect")


async def test_a_proxy_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(stream: anyio.abc.SocketStream) -> None:
        await anyio.sleep_forever()

    async with server(silent) as proxy:
        monkeypatch.setenv("https_proxy", proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(StoreError) as caught:
            await ask("https://store.test")
    check(caught.value, "connect")


async def test_a_server_that_takes_no_more_is_given_up() -> None:
    async def deaf(stream: anyio.abc.SocketStream) -> None:
        await stream.receive(100)
        await anyio.sleep_forever()

    async with server(deaf) as origin:
        with pytest.raises(StoreError) as caught:
            await ask(origin, body=Zeros(64 * MiB))
    check(caught.value, "stopped taking data")


async def test_a_server_that_takes_a_byte_now_and_then_is_given_up() -> None:
    async def slow(stream: anyio.abc.SocketStream) -> None:
        while await stream.receive(16384):
            await anyio.sleep(0.05)

    async with server(slow) as origin:
        with pytest.raises(StoreError) as caught:
            await ask(origin, body=Zeros(64 * MiB))
    check(caught.value, "stopped taking data")


@pytest.mark.parametrize("body", [None, Zeros(MiB)])
async def test_a_server_that_never_answers_is_given_up(body: Zeros | None) -> None:
    async def silent(stream: anyio.abc.SocketStream) -> None:
        while await stream.receive():
            pass

    async with server(silent) as origin:
        with pytest.raises(StoreError) as caught:
            await ask(origin, body=body)
    check(caught.value, "no answer for 300 ms")


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
@pytest.mark.parametrize("body", [None, Zeros(MiB)])
async def test_a_reply_that_drips_is_given_up(head: bytes, body: Zeros | None) -> None:
    """Each byte comes in time, and the reply would take for ever."""

    async def drip(stream: anyio.abc.SocketStream) -> None:
        left = body.length if body else 1
        while left > 0:
            left -= len(await stream.receive())
        await stream.send(head)
        while True:
            await anyio.sleep(0.05)
            await stream.send(b"x")

    async with server(drip) as origin:
        with pytest.raises(StoreError) as caught:
            await ask(origin, body=body)
    check(caught.value, "the reply did not end within 600 ms")


async def test_a_long_reply_has_the_time_that_its_bytes_take() -> None:
    async def steady(stream: anyio.abc.SocketStream) -> None:
        await stream.receive()
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2097152\r\n\r\n")
        for _ in range(16):
            await anyio.sleep(0.06)
            await stream.send(bytes(131072))

    async with server(steady) as origin:
        await ask(origin, reply_max=2 * MiB)


async def test_where_nothing_listens_is_told_at_once() -> None:
    with pytest.raises(StoreError) as caught:
        await ask(f"http://127.0.0.1:{free_ports(1)[0]}")
    check(caught.value, "can't connect")


# ---- proxies -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lead(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the proxy that the environment names."""
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return lambda proxy: monkeypatch.setenv("https_proxy", proxy)


async def there_and_back(web: WebServer, *, ca_file: Path | None = None) -> None:
    """A file goes to the server by name, over TLS, and comes back the same."""
    name, sent = f"open/tunnel-{uuid.uuid4().hex}", random.Random(1).randbytes(8 * MiB)
    origin = f"https://localhost:{web.tls_port}"
    client = HttpClient(origin, connections=1, ca_file=ca_file or web.ca_file)
    try:
        with anyio.fail_after(30):
            reply = await client.request("PUT", f"{origin}/{name}", {}, BytesBody(sent), operation="put")
            assert reply.status == 201
            reply = await client.request("GET", f"{origin}/{name}", {}, operation="get", reply_max=8 * MiB)
    finally:
        await client.close()
    assert reply.body == sent == (web.data / name).read_bytes()


@pytest.mark.parametrize(
    "form", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "http://web%2001:it%27s@127.0.0.1:{port}"]
)
async def test_bytes_go_through_the_tunnel_of_a_proxy_both_ways(
    web_server: WebServer, lead: Callable[[str], None], form: str
) -> None:
    async with TunnelProxy(web_server.tls_port) as proxy:
        lead(form.format(port=proxy.port))
        await there_and_back(web_server)
        (tunnel,) = proxy.tunnels
    assert tunnel.target == f"localhost:{web_server.tls_port}", "the proxy looks the name up"
    assert min(tunnel.up_bytes, tunnel.down_bytes) > 8 * MiB
    said = base64.b64encode(b"web 01:it's").decode()
    assert tunnel.authorization == (f"Basic {said}" if "@" in form else "")


async def test_server_in_no_proxy_is_reached_without_it(
    web_server: WebServer, lead: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "localhost")
    async with TunnelProxy(web_server.tls_port) as proxy:
        lead(proxy.url)
        await there_and_back(web_server)
        assert proxy.tunnels == []


async def test_store_at_the_end_of_a_tunnel_has_to_be_trusted_too(
    web_server: WebServer, lead: Callable[[str], None], tmp_path: Path
) -> None:
    async with TunnelProxy(web_server.tls_port) as proxy:
        lead(proxy.url)
        with pytest.raises(StoreError, match="certificate of the store is not trusted"):
            await there_and_back(web_server, ca_file=make_certificate(tmp_path / "stranger").ca)
        assert len(proxy.tunnels) == 1


@pytest.mark.parametrize(
    "refusal, hint, is_temporary",
    [
        ("407 Proxy Authentication Required", "USER:PASSWORD", False),
        ("403 Forbidden", "no_proxy", False),
        ("503 Service Unavailable", "no_proxy", True),
    ],
)
async def test_proxy_that_refuses_is_told_from_the_store(
    web_server: WebServer, lead: Callable[[str], None], refusal: str, hint: str, is_temporary: bool
) -> None:
    async with TunnelProxy(web_server.tls_port, refusal=refusal) as proxy:
        lead(proxy.url.replace("://", "://writer:hunter2@"))
        with pytest.raises(StoreError, match=f"the proxy answered {refusal}") as caught:
            await there_and_back(web_server)
    assert caught.value.temporary == is_temporary
    assert caught.value.status is None, "it is not the store's"
    assert hint in caught.value.hint
    assert "hunter2" not in str(caught.value) + caught.value.hint


async def test_proxy_where_nothing_listens_is_told_from_the_store(
    web_server: WebServer, lead: Callable[[str], None]
) -> None:
    port = free_ports(1)[0]
    lead(f"http://writer:hunter2@127.0.0.1:{port}")
    with pytest.raises(StoreError) as caught:
        await there_and_back(web_server)
    check(caught.value, "can't connect to the proxy")
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "hunter2" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize(
    "wrong", ["socks5://writer:hunter2@127.0.0.1:1080", "http://writer:hunter2@", "http://a:hunter2"]
)
def test_what_is_no_proxy_is_told_without_its_password(lead: Callable[[str], None], wrong: str) -> None:
    lead(wrong)
    with pytest.raises(StoreError, match="https_proxy") as caught:
        HttpClient("https://store.test", connections=1)
    assert "hunter2" not in str(caught.value) + caught.value.hint
