"""Reading from a web server by ranges: exact, pinned to one state, and clear about what does not work."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator

import pytest

from pipeline.config.options import without_secrets
from pipeline.errors import FormatError, PlanError, StoreError
from pipeline.flow.retry import RetryPolicy
from pipeline.units import MiB
from stages.store.stored import open_stored
from stages.store.web import open_web_reader
from tests.stores.process import free_ports
from tests.stores.ranged import RangedServer, ranged_server

DATA = random.Random("web").randbytes(9 * MiB + 123)
QUICK = RetryPolicy(attempts=3, first_wait_s=0.0)


@pytest.fixture
def server() -> Iterator[RangedServer]:
    with ranged_server(disk=DATA) as state:
        yield state


async def test_ranges_are_exact(server: RangedServer) -> None:
    async with open_stored(f"{server.url}/disk") as reader:
        assert reader.size == len(DATA)
        for offset, length in ((0, 1), (5, 0), (1000, 4096), (len(DATA) - 7, 7), (3, 9 * MiB)):
            assert await reader.read(offset, length) == DATA[offset : offset + length]


async def test_no_request_beyond_the_end_is_sent(server: RangedServer) -> None:
    async with open_web_reader(f"{server.url}/disk") as reader:
        before = len(server.asked)
        with pytest.raises(FormatError, match="ends before"):
            await reader.read(len(DATA) - 1, 2)
        assert len(server.asked) == before


@pytest.mark.parametrize("has_etags", [True, False])
async def test_replaced_object_is_not_mixed_with_the_new_one(server: RangedServer, has_etags: bool) -> None:
    server.has_etags = has_etags
    async with open_web_reader(f"{server.url}/disk", policy=QUICK) as reader:
        await reader.read(0, 10)
        server.files["/disk"] = DATA[::-1] + b"!"
        with pytest.raises(StoreError, match="was replaced") as caught:
            await reader.read(0, 10)
        assert not caught.value.temporary


async def test_server_that_ignores_conditions_is_caught_by_its_etag(server: RangedServer) -> None:
    server.knows_conditions = False
    async with open_web_reader(f"{server.url}/disk", policy=QUICK) as reader:
        server.files["/disk"] = DATA[::-1]
        with pytest.raises(StoreError, match="was replaced"):
            await reader.read(0, 10)


async def test_server_without_ranges_is_refused_before_it_sends_the_object(server: RangedServer) -> None:
    server.knows_ranges = False
    server.files["/disk"] = bytes(200 * MiB)
    with pytest.raises(StoreError, match="does not know ranges") as caught:
        async with open_web_reader(f"{server.url}/disk"):
            pass
    assert "Fetch it into a file" in caught.value.hint
    assert server.sent_bytes < 200 * MiB


async def test_short_body_is_an_error_and_tried_again(server: RangedServer) -> None:
    async with open_web_reader(f"{server.url}/disk", policy=QUICK) as reader:
        server.cuts = 2
        assert await reader.read(10, 1000) == DATA[10:1010]
        server.cuts = 3
        with pytest.raises(StoreError, match="other bytes than were asked for"):
            await reader.read(10, 1000)


async def test_busy_server_is_asked_again(server: RangedServer) -> None:
    server.fails = 1
    async with open_web_reader(f"{server.url}/disk", policy=QUICK) as reader:
        assert reader.size == len(DATA)


async def test_missing_object_is_told_once(server: RangedServer) -> None:
    with pytest.raises(StoreError, match="answered 404"):
        async with open_web_reader(f"{server.url}/none"):
            pass
    assert len(server.asked) == 1


async def test_empty_object_has_no_bytes(server: RangedServer) -> None:
    server.files["/disk"] = b""
    async with open_web_reader(f"{server.url}/disk") as reader:
        assert reader.size == 0


async def test_redirections_are_followed_and_bounded(server: RangedServer) -> None:
    server.redirects = {"/latest": "/moved?sig=abc", "/moved": f"{server.url}/disk", "/round": "/round"}
    async with open_web_reader(f"{server.url}/latest") as reader:
        assert await reader.read(1, 2) == DATA[1:3]
    with pytest.raises(StoreError, match="more than 5 redirections"):
        async with open_web_reader(f"{server.url}/round"):
            pass


async def test_password_goes_to_its_own_host_only(server: RangedServer) -> None:
    server.password = base64.b64encode(b"reader:s/e").decode()
    with_user = server.url.replace("://", "://reader:s%2Fe@")
    async with open_web_reader(f"{with_user}/disk") as reader:
        assert await reader.read(0, 4) == DATA[:4]
    with ranged_server(disk=DATA) as other:
        server.redirects = {"/away": f"{other.url}/disk"}
        async with open_web_reader(f"{with_user}/away"):
            pass
        assert all("authorization" not in one.headers for one in other.asked)


async def test_no_message_shows_a_password_or_signature(server: RangedServer) -> None:
    url = server.url.replace("://", "://reader:hunter2@") + "/none?X-Amz-Signature=deadbeef"
    with pytest.raises(StoreError) as caught:
        async with open_web_reader(url):
            pass
    assert "hunter2" not in str(caught.value)
    assert "deadbeef" not in str(caught.value)
    assert without_secrets("http://a:b@c/d?e=f&g=h") == "http://a:***@c/d?e=***&g=***"
    assert without_secrets("/tmp/a?b=c") == "/tmp/a?b=c"


@pytest.mark.parametrize("url", ["http://", "http:///disk", "http://host:port/x", "http://ho st/x", "http://h/a\nb"])
async def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(PlanError, match="does not name an object"):
        async with open_web_reader(url):
            pass


async def test_where_nobody_listens_the_url_is_to_be_checked() -> None:
    (port,) = free_ports(1)
    with pytest.raises(StoreError, match="can't connect") as caught:
        async with open_web_reader(f"http://127.0.0.1:{port}/x", policy=QUICK):
            pass
    assert caught.value.hint.startswith("Check the URL, that")
