"""write.http through whole chains, against nginx with WebDAV, and presigned URLs against S3 stores."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import anyio
import anyio.to_thread
import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.config.options import Secret
from pipeline.errors import ConfigError, LeftBehindError, PlanError, StageError, StoreError, VerificationError
from pipeline.events import Event, PartReplayed, RetryScheduled, UploadRemoved
from pipeline.flow.engine import Outcome
from pipeline.flow.manifest import Manifest
from pipeline.flow.orders import Order
from pipeline.flow.retry import RetryPolicy
from pipeline.flow.stage import Clock, RealClock, SinkPlan, SinkRequest
from pipeline.units import MiB
from stages.write.http import HttpWriter, Options
from stages.write.partial import partial_name
from tests.chains import export, write_toml
from tests.disks.letters import write_disk
from tests.end_to_end.places import unused_name
from tests.stores.faults import LoseReply, Nth, Reply, ResetRequest, Rule, StallRequest
from tests.stores.nginx import PASSWORD, TOKEN, USER, Nginx, WebServer
from tests.stores.process import free_ports
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import S3Server
from tests.write.images import Collected, Image, ImageReplay, QuickClock, make_context, mixed

LETTERS = "AB0-A" + "-" * 9 + "C0" + "DEF" * 4


@pytest.fixture(autouse=True)
def _logins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_PASSWORD", PASSWORD)
    monkeypatch.setenv("WEB_TOKEN", TOKEN)
    monkeypatch.setenv("WEB_WRONG", "wrong")
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@dataclass
class Target:
    """A name on a server, and what a run against it needs."""

    server: WebServer
    tmp: Path
    folder: str = "open"
    scheme: str = "dav"
    port: int = 0
    name: str = ""
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.name or f"{unused_name()} image.ä"

    @property
    def url(self) -> str:
        """Not quoted, as people write it."""
        return self.server.url(f"{self.folder}/{self.name.replace(' ', '%20')}", self.scheme, self.port)

    @property
    def path(self) -> Path:
        """The file as this machine sees it."""
        return self.server.data / self.folder / self.name

    @property
    def left(self) -> list[str]:
        """Names of ours on the server, of the image and of what may be left."""
        return sorted(path.name for path in self.path.parent.iterdir() if self.name in path.name)

    def toml(self, *more: str, encoder: str = "encode.raw", options: str = "", url: str = "") -> Path:
        """An export of the disk in `tmp`."""
        tls = f'; ca_file = "{self.server.ca_file}"' if self.scheme.endswith("s") else ""
        where = url or f'"{self.url}"'
        return write_toml(
            self.tmp / "export.toml",
            f'read.disk; path = "{self.tmp / "disk"}"',
            "checksum.guest",
            "sparse.zeros",
            *encoder.split(" + "),
            f"write.http; url = {where}{tls}" + (f"; {options}" if options else ""),
            *more,
        )

    async def export(self, *more: str, encoder: str = "encode.raw", options: str = "", url: str = "") -> Outcome:
        """Run it."""
        return await export(self.toml(*more, encoder=encoder, options=options, url=url), events=self.events)

    @asynccontextmanager
    async def planned(
        self,
        image: Image,
        *,
        is_known: bool = False,
        disk_size: int | None = None,
        replay: ImageReplay | None = None,
        clock: Clock | None = None,
        **options: object,
    ) -> AsyncIterator[tuple[HttpWriter, SinkPlan]]:
        """A writer after its planning, closed at the end."""
        again = replay or ImageReplay(image.data)
        context = make_context(image, events=self.events, clock=QuickClock(), disk_size=disk_size, replay=again)
        layout = image.layout(image_bytes=image.size) if is_known else image.layout()
        given = Options(**{"url": self.url, "ca_file": self.server.ca_file, **options})  # type: ignore[arg-type]
        writer = HttpWriter(
            given,
            replace(context, name="write.http", layout=layout, clock=clock or context.clock),
            retry_policy=RetryPolicy(attempts=6 if clock else 3),
        )
        try:
            plan = await writer.plan(SinkRequest(layout=layout, order=Order.SEQUENTIAL, memory=64 * MiB))
            again.boundaries = plan.boundaries
            yield writer, plan
        finally:
            with anyio.CancelScope(shield=True):
                await writer.close()

    async def store(self, image: Image, **more: object) -> HttpWriter:
        """Plan, run, and close."""
        async with self.planned(image, **more) as (writer, _):  # type: ignore[arg-type]  # passed through
            await writer.run(image.pieces(), Collected())
        return writer


@pytest.fixture
def target(web_server: WebServer, tmp_path: Path) -> Target:
    """A name of the test's own on the session's server."""
    write_disk(tmp_path / "disk", LETTERS)
    return Target(web_server, tmp_path)


LOGIN = f'user = "{USER}"; password = {{ env = "WEB_PASSWORD" }}'

# ---- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme, folder, options",
    [
        ("dav", "open", ""),
        ("http", "open", ""),
        ("https", "open", 'length = "chunked"'),
        ("davs", "private", LOGIN),
        ("https", "token", 'token = { env = "WEB_TOKEN" }'),
        ("http", "plain", ""),
        ("https", "put", 'length = "chunked"'),
        ("dav", "labelled", 'headers = { "X-Label" = "a label" }'),
    ],
)
async def test_the_server_holds_the_disk_and_reads_it_back(
    target: Target, scheme: str, folder: str, options: str
) -> None:
    target.scheme, target.folder = scheme, folder
    outcome = await target.export("verify.readback", options=options)
    assert outcome.state == "identical"
    assert target.path.read_bytes() == (target.tmp / "disk").read_bytes()
    assert target.left == [target.name, f"{target.name}.manifest.json"]
    assert outcome.uri.startswith(f"{scheme}://")
    manifest = Manifest.from_json((target.path.parent / target.left[1]).read_bytes(), where="there")
    assert PASSWORD not in str(manifest.options)
    assert TOKEN not in str(manifest.options)


@pytest.mark.parametrize(
    "encoder",
    [
        'encode.qcow2; compression = "none"',
        "encode.raw + compress.zstd",
        'encode.vhd; variant = "fixed"',
        "encode.vmdk",
    ],
)
async def test_every_format_that_travels_in_sequence_goes_in_one_put(target: Target, encoder: str) -> None:
    outcome = await target.export("verify.readback", encoder=encoder)
    assert outcome.state == "identical"


async def test_login_in_the_url_works_and_is_never_shown(target: Target) -> None:
    target.folder = "private"
    quoted = quote(PASSWORD, safe="")
    url = target.url.replace("://", f"://{USER}:{quoted}@")
    outcome = await target.export("verify.readback", url=f'"{url}"')
    assert outcome.state == "identical"
    assert quoted not in outcome.uri + str(target.events) + target.path.with_name(target.left[1]).read_text()


async def test_image_that_replaces_another_does_so_at_the_end_in_one_step(target: Target) -> None:
    target.path.write_bytes(b"old")
    seen: list[bytes] = []

    class Looking(list[Event]):
        def append(self, event: Event) -> None:
            if type(event).__name__ == "ImageSealed":
                seen.append(target.path.read_bytes())

    await export(target.toml("verify.readback", options="overwrite = true"), events=Looking())
    assert seen == [b"old"]
    assert target.path.read_bytes() == (target.tmp / "disk").read_bytes()


async def test_bytes_go_out_at_the_limit(target: Target) -> None:
    image = mixed(8 * MiB, zeros=False)
    async with target.planned(image, rate_limit=MiB) as (writer, _):
        clock = writer._context.clock
        begun = clock.now()
        await writer.run(image.pieces(), Collected())
        assert clock.now() - begun == pytest.approx(7, abs=3.5)


async def test_length_is_announced_where_it_is_known(target: Target) -> None:
    async with FaultProxy(target.server.port) as proxy:
        target.port, image = proxy.port, mixed(5 * MiB)
        await target.store(image, is_known=True)
        (known,) = proxy.requests("PUT")
        assert known.headers["content-length"] == str(image.size)
        target.name += "2"
        await target.store(image)
        assert proxy.requests("PUT")[1].headers["transfer-encoding"] == "chunked"
    assert target.server.data.joinpath("open").exists()


async def test_proxy_of_the_environment_is_taken(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FaultProxy(target.server.port) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        await target.export("verify.readback")
        assert proxy.requests("PUT")
        seen = len(proxy.seen)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        target.name += "2"
        await target.export()
        assert len(proxy.seen) == seen


# ---- planning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".manifest.json"])
@pytest.mark.parametrize("folder", ["open", "plain"])
async def test_an_existing_target_is_refused_and_kept(target: Target, folder: str, suffix: str) -> None:
    target.folder, target.scheme = folder, "http"
    there = target.path.with_name(target.name + suffix)
    there.write_text("precious")
    with pytest.raises(PlanError, match="target exists"):
        await target.export()
    assert there.read_text() == "precious"


async def test_a_missing_folder_is_told_with_the_command_that_makes_it(target: Target) -> None:
    target.folder = "open/absent"
    with pytest.raises(PlanError, match="folder does not exist") as caught:
        await target.export()
    subprocess.run(caught.value.hint.removeprefix("Make it: "), shell=True, check=True, capture_output=True)
    await target.export("verify.readback")


@pytest.mark.parametrize(
    "folder, options, hint",
    [
        ("private", "", "wants a login"),
        ("private", f'user = "{USER}"; password = {{ env = "WEB_WRONG" }}', "what was sent is not right"),
        ("token", 'token = { env = "WEB_WRONG" }', "wants a login"),
        ("labelled", "", "does not let us"),
    ],
)
async def test_wrong_logins_are_refused_in_planning(target: Target, folder: str, options: str, hint: str) -> None:
    target.folder = folder
    with pytest.raises(PlanError, match=r"answered 40[13]") as caught:
        await target.export(options=options)
    assert hint in caught.value.hint
    assert target.left == []


async def test_server_that_nobody_vouches_for_is_refused(target: Target, tmp_path: Path) -> None:
    target.scheme = "https"
    with pytest.raises(StoreError, match="certificate of the store is not trusted") as caught:
        async with target.planned(mixed(MiB), ca_file=None):
            pass
    assert "ca_file" in caught.value.hint
    with pytest.raises(PlanError, match="CA file holds no certificate"):
        async with target.planned(mixed(MiB), ca_file=tmp_path / "disk"):
            pass


async def test_where_nobody_listens_is_told(target: Target) -> None:
    (target.port,) = free_ports(1)
    with pytest.raises(StoreError, match="can't connect") as caught:
        async with target.planned(mixed(MiB)):
            pass
    assert caught.value.hint.startswith('Check "url", that')


@pytest.mark.parametrize("folder", ["plain", "put", "read"])
async def test_dav_url_of_a_server_without_move_is_refused(target: Target, folder: str) -> None:
    target.folder = folder
    with pytest.raises(PlanError, match="not a WebDAV server") as caught:
        await target.export()
    assert "http://" in caught.value.hint


@pytest.mark.parametrize("url", ["dav://host", "http://host/", "dav://host/folder/", "https:///x"])
async def test_what_names_no_file_is_refused(target: Target, url: str) -> None:
    with pytest.raises(PlanError, match="does not name"):
        async with target.planned(mixed(MiB), url=url):
            pass


@pytest.mark.parametrize(
    "options",
    [
        'user = "me"',
        'password = { env = "WEB_PASSWORD" }',
        f'{LOGIN}; token = {{ env = "WEB_TOKEN" }}',
        'headers = { "Content-Length" = "1" }',
        'headers = { "bad header" = "x" }',
        'headers = { "x:" = "x" }',
        'headers = { "" = "x" }',
        'headers = { "X-A" = "a\\r\\nX-B: b" }',
    ],
)
async def test_options_that_contradict_each_other_are_told(target: Target, options: str) -> None:
    with pytest.raises(ConfigError):
        await target.export(options=options)


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["open", "plain"])
@pytest.mark.parametrize("is_known", [True, False])
async def test_put_that_is_cut_off_starts_again_from_the_first_byte(
    target: Target, folder: str, is_known: bool
) -> None:
    image = mixed(9 * MiB)
    target.folder, target.scheme = folder, "http"
    async with FaultProxy(
        target.server.port, rules=[Rule(ResetRequest(after_bytes=5 * MiB), method="PUT", when=Nth(1))]
    ) as proxy:
        target.port = proxy.port
        writer = await target.store(image, is_known=is_known)
    stored = [path for path in target.path.parent.iterdir() if target.name in path.name]
    assert [path.read_bytes() for path in stored] == [image.data]
    replayed = [event for event in target.events if isinstance(event, PartReplayed)]
    assert [event.from_bytes for event in replayed] == [0]
    assert [event.operation for event in target.events if isinstance(event, RetryScheduled)] == ["put"]
    assert writer._context.progress.acked_bytes == image.guest_bytes


async def test_disk_that_changed_meanwhile_is_not_sent_a_second_time(target: Target) -> None:
    image = mixed(9 * MiB)
    changed = ImageReplay(image.data[: 2 * MiB] + b"!" + image.data[2 * MiB + 1 :])
    async with FaultProxy(
        target.server.port, rules=[Rule(ResetRequest(after_bytes=5 * MiB), method="PUT", when=Nth(1))]
    ) as proxy:
        target.port = proxy.port
        with pytest.raises(Exception, match="other bytes than the first time"):
            await target.store(image, replay=changed)
    assert target.left == []


@pytest.mark.parametrize("folder", ["open", "plain"])
async def test_lost_answer_to_the_put_is_not_a_failure(target: Target, folder: str) -> None:
    image = mixed(3 * MiB)
    target.folder, target.scheme = folder, "http"
    async with FaultProxy(target.server.port, rules=[Rule(LoseReply(), method="PUT", when=Nth(1))]) as proxy:
        target.port = proxy.port
        await target.store(image)
        assert len(proxy.requests("PUT")) == 1
    assert target.path.exists() == (folder == "plain")


async def cut_while(target: Target, act: Callable[[Path], object], *, cancels: bool, options: str = "") -> Exception:
    """Export, and do something to the file on the server while 4 MiB of the PUT are there; how that ended.

    Args:
        act: gets the path that the PUT writes to.
        cancels: the run is cancelled then; else the connection is lost.
    """
    rules = [Rule(StallRequest(after_bytes=4 * MiB), method="PUT", when=Nth(1))]
    ended: list[Exception] = []

    async def attempt() -> None:
        try:
            await target.export(options=options)
        except Exception as error:
            ended.append(error)

    async with FaultProxy(target.server.port, rules=rules) as proxy:
        target.port = proxy.port
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(attempt)
                await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
                act(target.path.with_name(unquote(proxy.requests("PUT")[0].path.rpartition("/")[2])))
                if cancels:
                    tasks.cancel_scope.cancel()
                else:
                    proxy.cut()
                    proxy.mend()
    return ended[0] if ended else Exception("none")


# Some servers store what they have of a PUT that broke off; nginx does not, so the tests do it in its place.


async def test_what_a_webdav_server_kept_of_a_cut_put_is_removed(target: Target) -> None:
    await cut_while(target, lambda path: path.write_bytes(b"A" * 1000), cancels=True)
    assert target.left == []
    assert [event for event in target.events if isinstance(event, UploadRemoved)]


async def test_what_came_under_the_targets_name_is_left_alone_and_named_with_the_command(target: Target) -> None:
    """It may be what the server kept of the PUT, or somebody else's."""
    target.folder, target.scheme = "plain", "http"
    error = await cut_while(target, lambda path: path.write_bytes(b"A" * 1000), cancels=True)
    assert isinstance(error, LeftBehindError)
    assert target.path.read_bytes() == b"A" * 1000
    assert "curl --fail --request DELETE http://" in error.commands[0]
    assert "or somebody else's" in str(error)


@pytest.mark.parametrize("whole", [True, False])
async def test_what_came_meanwhile_is_neither_replaced_nor_taken_for_the_image(target: Target, whole: bool) -> None:
    """Also where it is as long as the image, as another one of this disk is."""
    target.folder, target.scheme = "plain", "http"
    theirs = b"A" * (target.tmp.joinpath("disk").stat().st_size if whole else 1000)
    error = await cut_while(target, lambda path: path.write_bytes(theirs), cancels=False)
    assert isinstance(error, LeftBehindError)
    assert target.path.read_bytes() == theirs


async def test_what_came_meanwhile_is_replaced_where_that_was_asked_for(target: Target) -> None:
    target.folder, target.scheme = "plain", "http"
    await cut_while(target, lambda path: path.write_bytes(b"A"), cancels=False, options="overwrite = true")
    assert target.path.read_bytes() == target.tmp.joinpath("disk").read_bytes()


async def test_another_image_of_the_same_length_is_not_taken_for_ours_after_a_lost_answer(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = mixed(3 * MiB)
    target.folder, target.scheme = "plain", "http"
    async with FaultProxy(target.server.port, rules=[Rule(LoseReply(), method="PUT", when=Nth(1))]) as proxy:
        target.port = proxy.port
        async with target.planned(image) as (writer, _):
            look = writer._is_stored_already

            async def replaced(*given: Any) -> bool:
                target.path.write_bytes(b"A" * image.size)
                return await look(*given)

            monkeypatch.setattr(writer, "_is_stored_already", replaced)
            with pytest.raises(LeftBehindError):
                await writer.run(image.pieces(), Collected())
    assert target.path.read_bytes() == b"A" * image.size


async def test_server_that_heeds_conditions_says_itself_that_the_target_appeared(target: Target) -> None:
    target.folder, target.scheme = "plain", "http"
    async with FaultProxy(target.server.port, rules=[Rule(Reply(status=412, when="body"), method="PUT")]) as proxy:
        target.port = proxy.port
        with pytest.raises(StoreError, match="appeared while") as caught:
            await target.store(mixed(MiB))
        assert not isinstance(caught.value, LeftBehindError)
        assert proxy.requests("PUT")[0].headers["if-none-match"] == "*"
        assert not proxy.requests("DELETE")


async def test_what_is_removed_is_named_by_its_state(target: Target) -> None:
    """So that a server that heeds it does not remove what came a moment ago."""
    target.folder, target.scheme = "plain", "http"
    async with FaultProxy(target.server.port) as proxy:
        target.port = proxy.port
        async with target.planned(mixed(MiB)) as (writer, _):
            await writer.run(mixed(MiB).pieces(), Collected())
            await writer.withdraw()
        (removed,) = proxy.requests("DELETE")
    assert removed.headers["if-match"].startswith('"')
    assert target.left == []


async def test_file_that_cannot_be_removed_is_named_with_the_command(target: Target) -> None:
    target.folder, target.scheme = "put", "http"
    async with target.planned(mixed(MiB), disk_size=None) as (writer, _):
        await writer.run(mixed(MiB).pieces(), Collected())
        with pytest.raises(LeftBehindError) as caught:
            await writer.withdraw()
    assert "curl --fail --request DELETE http://" in caught.value.commands[0]


async def test_image_that_lacks_guest_bytes_is_not_finished(target: Target) -> None:
    image = mixed(3 * MiB)
    with pytest.raises(StageError, match="guest bytes were written"):
        await target.store(image, disk_size=image.guest_bytes + 512)
    assert target.left == []


async def test_too_long_image_for_the_server_is_told_at_once(target: Target) -> None:
    target.folder = "small"
    with pytest.raises(StoreError, match="answered 413") as caught:
        await target.store(mixed(9 * MiB), is_known=True)
    assert "client_max_body_size" in caught.value.hint
    assert not any(isinstance(event, RetryScheduled) for event in target.events)
    assert target.left == []


async def test_image_that_is_not_the_disk_is_withdrawn(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.write import bodies

    original, counted = bodies.Segment.chunks, iter(range(1 << 30))

    def flipped(segment: bodies.Segment) -> Iterator[memoryview]:
        for view in original(segment):
            yield view if next(counted) != 3 else memoryview(bytes([view[0] ^ 1]) + bytes(view[1:]))

    monkeypatch.setattr(bodies.Segment, "chunks", flipped)
    with pytest.raises(VerificationError):
        await target.export("verify.readback")
    assert target.left == []


@pytest.mark.parametrize("folder", ["open", "plain"])
async def test_target_of_somebody_else_that_appears_meanwhile_is_left_alone(target: Target, folder: str) -> None:
    target.folder, target.scheme = folder, "http"
    image = mixed(2 * MiB)
    async with target.planned(image) as (writer, _):
        await writer.run(image.pieces(), Collected())
        target.path.write_bytes(b"theirs, and longer than nothing")
        if folder == "open":
            with pytest.raises(StoreError, match="appeared while"):
                await writer.publish(b"{}")
        await writer.withdraw()
    assert target.path.read_bytes() == b"theirs, and longer than nothing"
    assert target.left == [target.name]


async def test_server_that_is_killed_and_comes_back_gets_the_image(own_nginx: Nginx, tmp_path: Path) -> None:
    image = mixed(9 * MiB)
    target = Target(own_nginx.server, tmp_path)
    rules = [Rule(StallRequest(after_bytes=4 * MiB), method="PUT", when=Nth(1))]
    async with FaultProxy(own_nginx.server.port, rules=rules) as proxy:
        target.port = proxy.port
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(target.store, image, clock=RealClock()))
                await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
                await anyio.to_thread.run_sync(own_nginx.restart)
                proxy.release()
    (stored,) = [path for path in (own_nginx.server.data / "open").iterdir() if target.name in path.name]
    assert stored.read_bytes() == image.data


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A filesystem of 8 MiB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
async def test_full_disk_of_the_server_fails_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small") as folder, Nginx(data=folder) as nginx:
        target = Target(nginx.server, tmp_path)
        with pytest.raises(StoreError) as caught:
            await target.store(mixed(20 * MiB, zeros=False), is_known=True)
        assert caught.value.operation == "put"
        assert target.left == []


async def test_redirected_put_is_refused_with_the_address(target: Target) -> None:
    rules = [Rule(Reply(status=307, headers={"Location": "/elsewhere"}), method="PUT")]
    async with FaultProxy(target.server.port, rules=rules) as proxy:
        target.port = proxy.port
        with pytest.raises(StoreError, match="answered 307") as caught:
            await target.store(mixed(MiB))
    assert "/elsewhere" in caught.value.hint


async def test_success_before_the_whole_body_is_no_success(target: Target) -> None:
    async with FaultProxy(target.server.port, rules=[Rule(Reply(status=201), method="PUT")]) as proxy:
        target.port = proxy.port
        with pytest.raises(StoreError, match=r"answered before it had all|connection was lost"):
            await target.store(mixed(40 * MiB, zeros=False), attempts=1)
    assert target.left == []


# ---- presigned URLs ------------------------------------------------------------------------------------------------


def signed(server: S3Server, method: str, bucket: str) -> str:
    """A URL that lets whoever has it do this one thing."""
    url: str = server.client().generate_presigned_url(
        method, Params={"Bucket": bucket, "Key": "web01.raw"}, ExpiresIn=600
    )
    return url


async def test_presigned_url_takes_the_image_and_is_never_shown(
    s3_server: S3Server, web_server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.new_bucket()
    disk = write_disk(tmp_path / "disk", LETTERS)
    monkeypatch.setenv("PUT_URL", signed(s3_server, "put_object", bucket))
    monkeypatch.setenv("GET_URL", signed(s3_server, "get_object", bucket))
    target = Target(web_server, tmp_path, scheme="http")
    outcome = await target.export(
        "verify.receipt", "verify.readback", url='{ env = "PUT_URL" }', options='read_url = { env = "GET_URL" }'
    )
    assert outcome.state == "identical"
    assert s3_server.get(bucket, "web01.raw") == disk.read_bytes()
    assert s3_server.keys(bucket) == ["web01.raw"]
    assert outcome.manifest_path is not None
    told = outcome.uri + str(target.events) + outcome.manifest_path.read_text()
    signature = os.environ["PUT_URL"].partition("Signature=")[2][:20]
    assert signature
    assert signature not in told


async def test_presigned_url_without_a_length_or_a_way_to_read_says_so(
    swift: S3Server, web_server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = swift.new_bucket()
    write_disk(tmp_path / "disk", LETTERS)
    monkeypatch.setenv("PUT_URL", signed(swift, "put_object", bucket))
    target = Target(web_server, tmp_path, scheme="http")
    with pytest.raises(LeftBehindError) as left:
        await target.export("verify.readback", url='{ env = "PUT_URL" }')
    assert "can't be read" in str(left.value.cause)
    monkeypatch.setenv("PUT_URL", signed(swift, "get_object", bucket))
    with pytest.raises(StoreError, match="answered 403") as caught:
        await target.export(url='{ env = "PUT_URL" }')
    assert "expired" in caught.value.hint


def test_secret_in_the_url_is_masked() -> None:
    assert "x=y" not in repr(Options(url=Secret("PUT_URL", "https://h/p?x=y")))


# ---- other commands ------------------------------------------------------------------------------------------------


def command(*arguments: object) -> tuple[int, str]:
    """The command line in this process."""
    done = CliRunner().invoke(main, [str(one) for one in arguments], prog_name="pipeline")
    return done.exit_code, done.output


def test_conversion_goes_to_and_comes_from_a_webdav_server(target: Target) -> None:
    disk, back = target.tmp / "disk", target.tmp / "back.raw"
    target.name += ".qcow2"
    assert command("convert", disk, target.url, "-f", "raw", "-q")[0] == 0
    assert command("verify", target.url)[0] == 0
    code, told = command("inspect", target.url)
    assert code == 0, told
    assert "qcow2" in told
    assert command("convert", target.url, back, "-q")[0] == 0
    assert back.read_bytes() == disk.read_bytes()


def test_temporary_files_are_listed_and_removed(target: Target) -> None:
    target.folder = "private"
    quoted = quote(PASSWORD, safe="")
    url = target.url.replace("://", f"://{USER}:{quoted}@")
    left = target.path.with_name(partial_name(target.name, "web01", "0a1b", hidden=False))
    for path in (left, target.path.with_name(partial_name("other", "web01", "0a1b")), target.path):
        path.write_bytes(b"12345")
        path.chmod(0o666)
    code, told = command("uploads", "list", url)
    assert (code, told.count("5 bytes")) == (0, 2), told
    assert ".web01.0a1b.partial" in told
    assert quoted not in told
    code, told = command("uploads", "abort", url)
    assert code == 0, told
    assert target.left == [target.name]
    assert command("uploads", "list", url)[1].startswith("nothing was left behind")
    assert command("uploads", "list", target.server.url("plain/x"))[0] == 1
