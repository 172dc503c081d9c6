"""The S3 client: what replies mean, and that requests are sent once, to one host, and never wait for ever."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from pipeline.errors import FormatError, PlanError, StoreError
from stages.store.http import BytesBody, HttpClient, Timeouts
from stages.store.s3 import Addressing, S3Client, S3Error, S3Url, open_reader
from tests.stores.faults import LoseReply, Nth, Reply, ResetReply, Rule, Stall, TruncateReply, error_reply
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import S3Server


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some credentials, and nothing of this machine."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEYID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@asynccontextmanager
async def connected(bucket: str = "b", **more: object) -> AsyncIterator[S3Client]:
    """A client, closed at the end."""
    client = await S3Client.connect(bucket, **more)  # type: ignore[arg-type]  # passed through
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def answering(*rules: Rule) -> AsyncIterator[tuple[S3Client, FaultProxy]]:
    """A client of a server that answers by rules only."""
    async with FaultProxy(9, rules=rules) as proxy, connected(endpoint=proxy.url) as client:
        yield client, proxy


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter the server by the AWS chain."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status,code,temporary,throttled",
    [
        (503, "SlowDown", True, True),
        (503, "ServiceUnavailable", True, True),
        (500, "InternalError", True, False),
        (400, "RequestTimeout", True, False),
        (429, "TooManyRequests", True, True),
        (502, "", True, False),
        (504, "", True, False),
        (501, "NotImplemented", False, False),
        (403, "AccessDenied", False, False),
        (400, "BadDigest", False, False),
        (404, "NoSuchUpload", False, False),
        (409, "BucketAlreadyExists", False, False),
    ],
)
async def test_an_error_reply_says_whether_trying_again_may_help(
    status: int, code: str, temporary: bool, throttled: bool
) -> None:
    async with answering(Rule(error_reply(status, code))) as (client, _):
        with pytest.raises(S3Error) as caught:
            await client.look()
    error = caught.value
    assert (error.status, error.code, error.temporary, error.throttled) == (status, code, temporary, throttled)
    assert error.context["request_id"] is None or error.context["request_id"]


async def test_retry_after_is_understood_as_seconds_and_as_a_date() -> None:
    for text, low, high in (("7", 7, 7), ("Fri, 01 Jan 2100 00:00:00 GMT", 1e9, 1e10), ("soon", None, None)):
        reply = Reply(status=503, headers={"Retry-After": text}, when="body")
        async with answering(Rule(reply)) as (client, _):
            with pytest.raises(S3Error) as caught:
                await client.look()
        if low is None:
            assert caught.value.retry_after_s is None
        else:
            assert caught.value.retry_after_s is not None
            assert high is not None
            assert low <= caught.value.retry_after_s <= high


async def test_a_wrong_region_is_told_with_the_right_one() -> None:
    moved = Reply(
        status=301, headers={"x-amz-bucket-region": "eu-west-3", "Location": "http://127.0.0.1:9/"}, when="body"
    )
    malformed = Reply(
        status=400,
        body=b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>",
        when="body",
    )
    for reply in (moved, malformed):
        async with answering(Rule(reply)) as (client, proxy):
            with pytest.raises(S3Error) as caught:
                await client.look()
            assert len(proxy.seen) == 1, "a redirection is not followed"
        assert 'region = "eu-west-3"' in caught.value.hint
        assert "us-east-1" in caught.value.hint


async def test_a_clock_that_is_wrong_is_told_by_how_much() -> None:
    reply = Reply(
        status=403,
        body=b"<Error><Code>RequestTimeTooSkewed</Code><Message>m</Message></Error>",
        headers={"Date": "Fri, 01 Jan 2100 00:00:00 GMT"},
        when="body",
    )
    async with answering(Rule(reply)) as (client, _):
        with pytest.raises(S3Error, match="RequestTimeTooSkewed") as caught:
            await client.look()
    assert "s away from the store's" in caught.value.hint


async def test_secrets_are_in_no_message() -> None:
    async with answering(Rule(error_reply(403, "SignatureDoesNotMatch"))) as (client, _):
        with pytest.raises(S3Error) as caught:
            await client.look()
    assert "KEYID" in caught.value.hint
    assert "secret" not in f"{caught.value} {caught.value.hint} {caught.value.context}".replace(
        "Check key, secret,", ""
    )


@pytest.mark.parametrize(
    "body",
    [
        b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><x>&b;</x>',
        b"not xml",
        b"<x>" + b"y" * (1 << 20) + b"</x>",
    ],
    ids=["entities", "no XML", "too long"],
)
async def test_a_reply_that_is_no_s3_reply_is_an_error(body: bytes) -> None:
    async with answering(Rule(Reply(status=200, body=body, when="body"))) as (client, _):
        with pytest.raises(StoreError, match="reply"):
            await client.open_uploads("k")


async def test_an_error_inside_a_200_of_complete_is_an_error() -> None:
    reply = Reply(status=200, body=b"  \n<Error><Code>InternalError</Code><Message>m</Message></Error>", when="body")
    async with answering(Rule(reply)) as (client, _):
        with pytest.raises(S3Error, match="InternalError") as caught:
            await client.complete_upload("k", "u", [{"PartNumber": "1", "ETag": "e"}], {})
    assert caught.value.temporary


# ---- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PUT"])
async def test_a_request_on_a_connection_that_was_closed_is_never_sent_twice_silently(
    seaweedfs: S3Server, method: str
) -> None:
    """aiohttp would send it again by itself; here the caller is told, and decides."""
    async with FaultProxy(seaweedfs.port, rules=[Rule(LoseReply(), path="/second")]) as proxy:
        client = HttpClient(proxy.url, connections=1)
        body = BytesBody(b"x") if method == "PUT" else None
        await client.request("GET", f"{proxy.url}/first", {}, operation="read")
        with pytest.raises(StoreError, match="connection was lost") as caught:
            await client.request(method, f"{proxy.url}/second", {}, body, operation="read")
        assert caught.value.temporary
        assert caught.value.retry_after_s == 0
        assert len(proxy.requests(path="/second")) == 1
        assert proxy.seen[0].connection == proxy.seen[1].connection
        await client.close()


@pytest.mark.parametrize("fault", [Stall(at="head"), TruncateReply(after_bytes=3), ResetReply(after_bytes=3)])
async def test_a_reply_that_does_not_come_whole_is_a_temporary_failure(seaweedfs: S3Server, fault: Stall) -> None:
    async with FaultProxy(seaweedfs.port, rules=[Rule(fault)]) as proxy:
        client = HttpClient(proxy.url, connections=1, timeouts=Timeouts(progress_s=0.3))
        with anyio.fail_after(5), pytest.raises(StoreError) as caught:
            await client.request("GET", f"{proxy.url}/", {}, operation="read")
        assert caught.value.temporary
        await client.close()


async def test_a_host_that_swallows_connections_is_given_up(seaweedfs: S3Server) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        proxy.cut("blackhole")
        client = HttpClient(proxy.url, connections=1, timeouts=Timeouts(connect_s=0.3, progress_s=0.3))
        with anyio.fail_after(5), pytest.raises(StoreError, match=r"no connection in time|no answer") as caught:
            await client.request("GET", f"{proxy.url}/", {}, operation="read")
        assert caught.value.temporary
        await client.close()


async def test_an_error_of_the_body_comes_out_unchanged(seaweedfs: S3Server) -> None:
    class Broken(BytesBody):
        async def chunks(self) -> AsyncIterator[bytes]:
            yield b"x" * 10
            raise FormatError("the source of the body")

    client = HttpClient(seaweedfs.endpoint, connections=1)
    with pytest.raises(FormatError, match="the source of the body"):
        await client.request("PUT", f"{seaweedfs.endpoint}/a", {}, Broken(b"y" * 100), operation="put_part")
    await client.close()


async def test_proxies_come_from_the_environment_and_netrc_does_not(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    use(seaweedfs, monkeypatch)
    bucket = seaweedfs.new_bucket()
    async with FaultProxy(seaweedfs.port) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        async with connected(bucket) as client:
            await client.look()
        assert len(proxy.seen) == 1
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        async with connected(bucket) as client:
            await client.look()
        assert len(proxy.seen) == 1


@pytest.mark.parametrize(
    "endpoint,bucket,addressing,base",
    [
        ("http://127.0.0.1:9000", "b", "auto", "http://127.0.0.1:9000/b"),
        ("http://[::1]:9000", "bbb", "auto", "http://[::1]:9000/bbb"),
        ("http://localhost:9000/", "bbb", "auto", "http://localhost:9000/bbb"),
        ("https://cos.example.com", "images", "auto", "https://images.cos.example.com"),
        ("https://cos.example.com", "im.ages", "auto", "https://cos.example.com/im.ages"),
        ("https://cos.example.com", "Images", "auto", "https://cos.example.com/Images"),
        ("https://cos.example.com", "images", "path", "https://cos.example.com/images"),
        ("http://127.0.0.1:9000", "images", "virtual", "http://images.127.0.0.1:9000"),
        ("", "images", "auto", "https://images.s3.eu-north-1.amazonaws.com"),
    ],
)
async def test_where_a_bucket_is_addressed(endpoint: str, bucket: str, addressing: Addressing, base: str) -> None:
    async with connected(bucket, endpoint=endpoint, region="eu-north-1", addressing=addressing) as client:
        assert client._base == base


async def test_the_endpoint_of_the_environment_is_used_and_s3s_own_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    async with connected() as client:
        assert client.endpoint == "http://127.0.0.1:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:2")
    async with connected() as client:
        assert client.endpoint == "http://127.0.0.1:2"
    async with connected(endpoint="http://127.0.0.1:3") as client:
        assert client.endpoint == "http://127.0.0.1:3"


@pytest.mark.parametrize("endpoint", ["cos.example.com", "ftp://x", "http://host/path", "https://"])
async def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(PlanError, match="not the URL of a store"):
        await S3Client.connect("b", endpoint=endpoint)


async def test_a_ca_file_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the CA file can't be read: no such file") as caught:
        await S3Client.connect("b", endpoint="https://h", ca_file=tmp_path / "none.pem")
    assert str(tmp_path / "none.pem") in str(caught.value)
    (tmp_path / "empty.pem").touch()
    with pytest.raises(PlanError, match="the CA file holds no certificate"):
        await S3Client.connect("b", endpoint="https://h", ca_file=tmp_path / "empty.pem")


def test_an_s3_url_is_taken_apart() -> None:
    assert S3Url.parse("s3://b/a/c d?#.qcow2") == S3Url(bucket="b", key="a/c d?#.qcow2")
    assert str(S3Url.parse("s3://b/k")) == "s3://b/k"


async def test_cloudflare_wants_equal_parts() -> None:
    async with connected(endpoint="https://id.r2.cloudflarestorage.com") as client:
        assert client.limits.equal
    async with connected(endpoint="https://cos.example.com") as client:
        assert not client.limits.equal


@pytest.mark.parametrize("status, code", [(403, "QuotaExceeded"), (507, "XMinioStorageFull"), (507, "")])
async def test_a_full_store_is_told_as_such_at_once(status: int, code: str) -> None:
    async with answering(Rule(error_reply(status, code))) as (client, _):
        with pytest.raises(S3Error) as caught:
            await client.put_text("x", b"x", {})
    assert not caught.value.temporary
    assert "full, or a quota" in caught.value.hint


# ---- reading -------------------------------------------------------------------------------------------------------

DATA = bytes(range(256)) * 4096


@asynccontextmanager
async def reading(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, *rules: Rule
) -> AsyncIterator[tuple[str, FaultProxy]]:
    """An object and a proxy before it; gives the object's URL."""
    use(server, monkeypatch)
    bucket = server.new_bucket()
    server.put(bucket, "o b", DATA)
    async with FaultProxy(server.port, rules=rules) as proxy:
        yield f"s3://{bucket}/o b", proxy


async def test_ranges_are_exact(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async with reading(s3_server, monkeypatch) as (url, proxy), open_reader(url, endpoint=proxy.url) as reader:
        assert reader.size == len(DATA)
        assert await reader.read(0, len(DATA)) == DATA
        assert await reader.read(12345, 1) == DATA[12345:12346]
        assert await reader.read(len(DATA) - 5, 5) == DATA[-5:]
        assert await reader.read(len(DATA), 0) == b""
        with pytest.raises(FormatError, match="ends before"):
            await reader.read(len(DATA) - 5, 6)


@pytest.mark.parametrize("fault", [TruncateReply(after_bytes=1000), ResetReply(after_bytes=1000), LoseReply()])
async def test_a_range_that_is_cut_short_is_read_again(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, fault: TruncateReply
) -> None:
    async with reading(s3_server, monkeypatch, Rule(fault, method="GET", when=Nth(1))) as (url, proxy):
        async with open_reader(url, endpoint=proxy.url, timeouts=Timeouts(progress_s=3)) as reader:
            assert await reader.read(500, 100_000) == DATA[500:100_500]
        assert len(proxy.requests("GET")) == 2


async def test_an_object_that_is_replaced_while_it_is_read_is_noticed(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with reading(s3_server, monkeypatch) as (url, proxy), open_reader(url, endpoint=proxy.url) as reader:
        await reader.read(0, 10)
        s3_server.put(S3Url.parse(url).bucket, "o b", DATA[::-1])
        with pytest.raises(StoreError, match="replaced while it was read"):
            await reader.read(0, 10)


async def test_a_missing_object_is_told(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async with reading(s3_server, monkeypatch) as (url, proxy):
        with pytest.raises(StoreError, match="no such object"):
            async with open_reader(url + "x", endpoint=proxy.url):
                pass
        with pytest.raises(StoreError, match="NoSuchBucket"):
            async with open_reader("s3://no-such-bucket-here/x", endpoint=proxy.url):
                pass


async def test_reads_may_run_at_the_same_time(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[int, bytes] = {}
    async with reading(seaweedfs, monkeypatch) as (url, proxy), open_reader(url, endpoint=proxy.url) as reader:

        async def read(offset: int) -> None:
            got[offset] = await reader.read(offset, 1000)

        async with anyio.create_task_group() as tasks:
            for offset in range(0, 20_000, 1000):
                tasks.start_soon(read, offset)
    assert b"".join(got[offset] for offset in sorted(got)) == DATA[:20_000]


async def test_what_the_store_attests_is_what_receipts_compare(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For `pipeline verify --level receipt`, any time after the run."""
    from stages.verify.receipt import judge, receipt_of

    use(s3_server, monkeypatch)
    bucket, data = s3_server.new_bucket(), b"image" * 1000
    async with connected(bucket, endpoint=s3_server.endpoint, region=s3_server.region) as client:
        await client.put_text("x", data, {})
    async with open_reader(f"s3://{bucket}/x", endpoint=s3_server.endpoint, region=s3_server.region) as reader:
        attested = reader.attested
        assert set(attested) == {"CRC64NVME", "CRC32C", "ETag (MD5)"}
        ours = hashlib.md5(data).hexdigest()
        assert judge(receipt_of(reader, [("ETag (MD5)", ours, "")]), size=len(data)).state == "identical"
        assert judge(receipt_of(reader, [("ETag (MD5)", "0" * 32, "")]), size=len(data)).state == "differs"
        assert judge(receipt_of(reader, [("CRC64NVME", "x", "")]), size=len(data)).state in ("unproven", "differs")
