"""Each fault of the proxy does to a real client and a real store what it says, at the byte where it says it."""

from __future__ import annotations

import http.client
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import aiohttp
import anyio
import anyio.abc
import pytest
from anyio.to_thread import run_sync

from tests.stores.faults import (
    ArmedRule,
    Chance,
    Delay,
    First,
    FlipReply,
    FlipRequest,
    LimitRate,
    LoseReply,
    Nth,
    ResetReply,
    ResetRequest,
    Rule,
    Stall,
    StallRequest,
    TruncateReply,
    error_reply,
    slow_down,
)
from tests.stores.process import free_ports
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import Answer, S3Server

MIB = 1024 * 1024
DATA = random.Random(1).randbytes(3 * MIB)


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    """A bucket for this module; tests take keys of their own."""
    return s3_server.new_bucket()


@asynccontextmanager
async def proxied(server: S3Server, *rules: Rule) -> AsyncIterator[tuple[FaultProxy, S3Server]]:
    """A proxy before the server, and the server as it is reached through it."""
    with anyio.fail_after(30):
        async with FaultProxy(server.port, rules=rules) as proxy:
            yield proxy, server.reached_at(proxy.url)


async def put(server: S3Server, bucket: str, key: str, data: bytes = DATA, **headers: str) -> Answer:
    """Store an object by one request without retries."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await run_sync(partial(server.request, "PUT", f"/{bucket}/{key}", headers=named, body=data))


async def get(server: S3Server, bucket: str, key: str) -> Answer:
    """Read an object by one request without retries."""
    return await run_sync(server.request, "GET", f"/{bucket}/{key}")


async def test_signed_requests_pass_untouched_on_one_connection(s3_server: S3Server, bucket: str) -> None:
    async with proxied(s3_server) as (proxy, server):

        def use_everything() -> bytes:
            client = server.client()
            client.put_object(Bucket=bucket, Key="all", Body=DATA)
            client.head_object(Bucket=bucket, Key="all")
            upload = client.create_multipart_upload(Bucket=bucket, Key="parts")["UploadId"]
            part = client.upload_part(Bucket=bucket, Key="parts", UploadId=upload, PartNumber=1, Body=DATA)
            client.complete_multipart_upload(
                Bucket=bucket,
                Key="parts",
                UploadId=upload,
                MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
            )
            client.delete_object(Bucket=bucket, Key="all")  # 204, no body and no length
            body: bytes = client.get_object(Bucket=bucket, Key="parts")["Body"].read()
            return body

        assert await run_sync(use_everything) == DATA
        assert [(seen.method, seen.status) for seen in proxy.seen] == [
            ("PUT", 200),
            ("HEAD", 200),
            ("POST", 200),
            ("PUT", 200),
            ("POST", 200),
            ("DELETE", 204),
            ("GET", 200),
        ]
        assert proxy.connections == 1
        first, part, last = proxy.seen[0], proxy.seen[3], proxy.seen[-1]
        assert (first.path, first.body_bytes, first.reply_bytes) == (f"/{bucket}/all", len(DATA), 0)
        assert re.search("partNumber=1", part.query)
        assert last.reply_bytes == len(DATA)
        assert first.headers["authorization"].startswith("AWS4-HMAC-SHA256")


async def test_slow_down_before_the_body_never_reaches_the_store(s3_server: S3Server, bucket: str) -> None:
    async with proxied(s3_server, Rule(slow_down(), method="PUT", when=First(1))) as (proxy, server):
        refused = await put(server, bucket, "slow", DATA[:1000])
        assert (refused.status, refused.code, refused.headers["connection"]) == (503, "SlowDown", "close")
        assert (await get(server, bucket, "slow")).status == 404
        assert (await put(server, bucket, "slow")).status == 200
        assert [(seen.status, seen.upstream_status, seen.body_bytes) for seen in proxy.requests("PUT")] == [
            (503, None, 0),
            (200, 200, len(DATA)),
        ]


async def test_slow_down_after_the_body_keeps_the_connection(s3_server: S3Server, bucket: str) -> None:
    async with proxied(s3_server, Rule(slow_down(when="body"), path="/after$", when=Nth(1))) as (proxy, server):

        def store_with_retry() -> None:
            server.client(attempts=3).put_object(Bucket=bucket, Key="after", Body=DATA)

        await run_sync(store_with_retry)
        assert [seen.status for seen in proxy.seen] == [503, 200]
        assert proxy.connections == 1
        assert (await get(s3_server, bucket, "after")).body == DATA


async def test_any_error_can_be_answered(s3_server: S3Server, bucket: str) -> None:
    rules = Rule(error_reply(400, "BadDigest"), path="/digest"), Rule(error_reply(403, "AccessDenied"), path="/denied")
    async with proxied(s3_server, *rules) as (_, server):
        assert (await put(server, bucket, "digest")).code == "BadDigest"
        denied = await get(server, bucket, "denied")
        assert (denied.status, denied.code) == (403, "AccessDenied")


@pytest.mark.parametrize("after_bytes", [0, 1, 1_000_000, len(DATA)])
async def test_request_is_reset_after_exactly_so_many_bytes(s3_server: S3Server, bucket: str, after_bytes: int) -> None:
    async with proxied(s3_server, Rule(ResetRequest(after_bytes=after_bytes))) as (proxy, server):
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            await put(server, bucket, f"reset-{after_bytes}")
        await proxy.until(lambda: proxy.seen[0].is_done)
        assert (proxy.seen[0].body_bytes, proxy.seen[0].status) == (after_bytes, None)
        if after_bytes < len(DATA):  # With the whole body the store may have stored it: the client cannot know.
            assert (await get(s3_server, bucket, f"reset-{after_bytes}")).status == 404


async def test_stalled_request_goes_on_when_released(s3_server: S3Server, bucket: str) -> None:
    rules = [Rule(Stall(), path="/head$"), Rule(StallRequest(after_bytes=1000), path="/body$")]
    rules.append(Rule(Stall(at="reply"), path="/reply$"))
    answers: list[int] = []

    async with proxied(s3_server, *rules) as (proxy, server):

        async def store(key: str) -> None:
            answers.append((await put(server, bucket, key)).status)

        async with anyio.create_task_group() as group:
            for key in ("head", "body", "reply"):
                group.start_soon(store, key)
            await proxy.until(lambda: sum(seen.is_stalled for seen in proxy.seen) == 3)
            by_key = {seen.path.rpartition("/")[2]: seen for seen in proxy.seen}
            assert (by_key["head"].body_bytes, by_key["body"].body_bytes) == (0, 1000)
            assert (by_key["reply"].upstream_status, by_key["reply"].status) == (200, None)
            assert (await get(s3_server, bucket, "reply")).body == DATA, "the store has it while the client waits"
            assert answers == []
            proxy.release()
        assert answers == [200, 200, 200]
        assert (await get(s3_server, bucket, "body")).body == DATA


async def test_lost_reply_leaves_the_object_stored(s3_server: S3Server, bucket: str) -> None:
    async with proxied(s3_server, Rule(LoseReply(), when=Nth(1))) as (proxy, server):
        with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
            await put(server, bucket, "lost")
        assert (await get(server, bucket, "lost")).body == DATA
        assert (proxy.seen[0].upstream_status, proxy.seen[0].status) == (200, None)


async def read_what_comes(server: S3Server, bucket: str, key: str) -> tuple[bytes, str]:
    """Read an object by aiohttp until it ends or breaks: the bytes that came, and the name of the error."""
    client = server.client()
    url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=60)
    got = bytearray()
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(url) as response:
                async for chunk in response.content.iter_any():
                    got += chunk
        except aiohttp.ClientError as error:
            return bytes(got), type(error).__name__
    return bytes(got), ""


async def test_reply_breaks_after_exactly_so_many_bytes(s3_server: S3Server, bucket: str) -> None:
    await put(s3_server, bucket, "reply")
    rules = [Rule(ResetReply(after_bytes=1_000_000), when=Nth(1)), Rule(TruncateReply(after_bytes=2_000_000))]
    async with proxied(s3_server, *rules) as (proxy, server):
        reset = await read_what_comes(server, bucket, "reply")
        cut_short = await read_what_comes(server, bucket, "reply")
        assert cut_short == (DATA[:2_000_000], "ClientPayloadError")
        # aiohttp throws away what it had not handed out when the reset came; what it handed out is right.
        assert DATA.startswith(reset[0])
        assert reset[1]
        await proxy.until(lambda: all(seen.is_done for seen in proxy.seen))
        assert [seen.reply_bytes for seen in proxy.seen] == [1_000_000, 2_000_000]


async def test_flipped_byte_of_a_reply_reaches_the_client(s3_server: S3Server, bucket: str) -> None:
    await put(s3_server, bucket, "flip")
    async with proxied(s3_server, Rule(FlipReply(offset=1_234_567))) as (_, server):
        body = (await get(server, bucket, "flip")).body
    assert len(body) == len(DATA)
    assert [at for at, (mine, theirs) in enumerate(zip(DATA, body, strict=True)) if mine != theirs] == [1_234_567]


async def test_flipped_byte_of_a_request_is_refused_by_a_store_that_is_given_a_checksum(
    s3_server: S3Server, bucket: str
) -> None:
    def store(server: S3Server, key: str, **options: str) -> None:
        server.client().put_object(Bucket=bucket, Key=key, Body=DATA, **options)

    async with proxied(s3_server, Rule(FlipRequest(offset=2_000_000), when=Nth(1))) as (_, server):
        with pytest.raises(Exception, match=r"BadDigest|XAmzContentSHA256Mismatch"):
            await run_sync(partial(store, server, "flipped", ChecksumAlgorithm="CRC32"))
        await run_sync(partial(store, server, "good", ChecksumAlgorithm="CRC32"))
    assert (await get(s3_server, bucket, "flipped")).status == 404
    assert (await get(s3_server, bucket, "good")).body == DATA


async def test_delay_and_rate_take_their_time(s3_server: S3Server, bucket: str) -> None:
    rules = [Rule(Delay(seconds=0.3), method="HEAD"), Rule(LimitRate(bytes_per_s=10e6), method="PUT")]
    async with proxied(s3_server, *rules) as (_, server):
        begun = time.monotonic()
        assert (await put(server, bucket, "rate")).status == 200
        put_took = time.monotonic() - begun
        begun = time.monotonic()
        await run_sync(server.request, "HEAD", f"/{bucket}/rate")
        assert time.monotonic() - begun >= 0.3
        assert put_took >= len(DATA) / 10e6


async def test_refused_network_comes_back_on_the_same_port(s3_server: S3Server, bucket: str) -> None:
    async with proxied(s3_server, Rule(Stall(), when=Nth(1))) as (proxy, server):
        errors: list[BaseException] = []

        async def ask() -> None:
            try:
                await get(server, bucket, "x")
            except OSError as error:
                errors.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
            proxy.cut()
        assert [type(error) for error in errors] == [ConnectionResetError]
        with pytest.raises(ConnectionRefusedError):
            await get(server, bucket, "x")
        proxy.mend()
        assert (await get(server, bucket, "x")).status == 404


async def test_blackhole_keeps_silent_until_it_is_mended(s3_server: S3Server, bucket: str) -> None:
    async with proxied(s3_server) as (proxy, server):
        await put(server, bucket, "hole")
        proxy.cut("blackhole")
        answers: list[int] = []

        async def ask() -> None:
            answers.append((await get(server, bucket, "hole")).status)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            with anyio.move_on_after(0.3) as waited:
                await anyio.sleep_forever()
            assert waited.cancelled_caught
            assert answers == []
            assert len(proxy.seen) == 1
            proxy.mend()
        assert answers == [200]


async def test_dead_server_is_a_reset(s3_server: S3Server) -> None:
    (unused,) = free_ports(1)
    async with FaultProxy(unused) as proxy:
        with pytest.raises(ConnectionResetError):
            await get(s3_server.reached_at(proxy.url), "bucket", "key")


def test_numbers_count_every_matching_request() -> None:
    nth, first = ArmedRule(Rule(LoseReply(), when=Nth(3))), ArmedRule(Rule(LoseReply(), when=First(2), method="PUT"))
    assert [nth.fires("PUT", "/b/k", "") for _ in range(4)] == [False, False, True, False]
    methods = ["PUT", "GET", "PUT", "PUT"]
    assert [first.fires(method, "/b/k", "") for method in methods] == [True, False, True, False]
    by_part = ArmedRule(Rule(LoseReply(), path="^/b/k$", query="partNumber=3&"))
    assert by_part.fires("PUT", "/b/k", "partNumber=3&uploadId=x")
    assert not by_part.fires("PUT", "/b/k2", "partNumber=3&uploadId=x")
    assert not by_part.fires("PUT", "/b/k", "partNumber=33&uploadId=x")


def test_same_seed_picks_the_same_requests() -> None:
    def picked(seed: int) -> list[bool]:
        armed = ArmedRule(Rule(LoseReply(), when=Chance(0.1, seed=seed)))
        return [armed.fires("PUT", "/b/k", "") for _ in range(1000)]

    assert picked(1) == picked(1) != picked(2)
    assert 60 < sum(picked(1)) < 140


# --- what no store does on demand: a server of the test's own

Handler = Callable[[anyio.abc.SocketStream], Awaitable[None]]


@asynccontextmanager
async def before(handler: Handler, *rules: Rule) -> AsyncIterator[FaultProxy]:
    """A proxy before a server that does what the test wants."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    with anyio.fail_after(10):
        async with listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, handler)
            async with FaultProxy(port, rules=rules) as proxy:
                yield proxy
            group.cancel_scope.cancel()


async def receive_until(stream: anyio.abc.SocketStream, end: bytes) -> bytes:
    """Read until the bytes end so."""
    got = b""
    while not got.endswith(end):
        got += await stream.receive()
    return got


async def test_chunked_bodies_pass_both_ways_byte_for_byte() -> None:
    request = (
        b"PUT /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;name=value\r\nhello\r\n1\r\n!\r\n0\r\nTail: 1\r\n\r\n"
    )
    reply = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n"
    got: list[bytes] = []

    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            for _ in range(2):
                got.append(await receive_until(stream, b"Tail: 1\r\n\r\n"))
                await stream.send(reply)

    async with before(answer) as proxy, await anyio.connect_tcp("127.0.0.1", proxy.port) as client:
        for _ in range(2):
            for at in range(len(request)):  # One byte at a time: every boundary falls within a read.
                await client.send(request[at : at + 1])
            assert await receive_until(client, b"0\r\n\r\n") == reply
        assert got == [request, request]
        assert [(seen.body_bytes, seen.reply_bytes) for seen in proxy.seen] == [(6, 10), (6, 10)]


async def test_interim_reply_passes_before_the_body() -> None:
    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await receive_until(stream, b"\r\n\r\n")
            await stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            await receive_until(stream, b"body")
            await stream.send(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with before(answer) as proxy, await anyio.connect_tcp("127.0.0.1", proxy.port) as client:
        await client.send(b"PUT /x HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert await receive_until(client, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"body")
        assert await receive_until(client, b"\r\n\r\n") == b"HTTP/1.1 204 No Content\r\n\r\n"


async def test_reply_that_comes_before_the_body_ended_is_not_lost() -> None:
    """A store that refuses after the head and closes: the client is still sending, and must see the refusal."""
    reply = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"

    async def refuse(stream: anyio.abc.SocketStream) -> None:
        await receive_until(stream, b"\r\n\r\n")
        await stream.send(reply)
        await stream.aclose()

    async with before(refuse) as proxy, await anyio.connect_tcp("127.0.0.1", proxy.port) as client:
        await client.send(b"PUT /x HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n")
        assert await receive_until(client, b"no") == reply
        await client.send(bytes(100_000))
        await client.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await client.receive()
        assert proxy.seen[0].status == 403


async def test_reply_without_a_length_ends_with_the_connection() -> None:
    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await receive_until(stream, b"\r\n\r\n")
            await stream.send(b"HTTP/1.1 200 OK\r\n\r\nall there is")

    async with before(answer) as proxy, await anyio.connect_tcp("127.0.0.1", proxy.port) as client:
        await client.send(b"GET /x HTTP/1.1\r\n\r\n")
        got = b"".join([data async for data in client])
        assert got.endswith(b"\r\n\r\nall there is")
