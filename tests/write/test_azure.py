"""write.azure_block and write.azure_page through whole chains, against Azurite: what only met the emulator."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

import anyio
import anyio.to_thread
import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.config.options import Secret
from pipeline.errors import (
    ConfigError,
    FormatError,
    LeftBehindError,
    PlanError,
    StageError,
    StoreError,
    VerificationError,
)
from pipeline.events import Event, FallbackTaken, RetryScheduled
from pipeline.flow.engine import Outcome
from pipeline.flow.items import Receipt, StoredImage
from pipeline.flow.orders import Order
from pipeline.flow.retry import RetryPolicy
from pipeline.flow.stage import Clock, SinkRequest
from pipeline.units import MiB
from stages.store.azure import AzureClient, AzureUrl
from stages.write.azure_block import AzureBlockWriter, Options
from stages.write.azure_page import AzurePageWriter
from stages.write.azure_page import Options as PageOptions
from tests.chains import export, write_toml
from tests.disks.letters import write_disk
from tests.end_to_end.command import call
from tests.end_to_end.places import unused_name
from tests.stores.azurite import ACCOUNT, AzureServer, Azurite
from tests.stores.faults import FlipRequest, LoseReply, Nth, Reply, ResetRequest, Rule, Stall, StallRequest
from tests.stores.proxy import FaultProxy
from tests.write.images import Collected, Image, ImageReplay, PatientClock, QuickClock, make_context, mixed

NAME = "images/web 01+ä.vhd"
LETTERS = "AB0-A" + "-" * 9 + "C0" + "DEF" * 4
PAGE_CHAIN = ('encode.vhd; variant = "fixed"', "write.azure_page")


@pytest.fixture(autouse=True)
def _no_azure_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONNECTION_STRING", "ACCOUNT", "KEY", "SAS_TOKEN", "SERVICE_ENDPOINT"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)


@dataclass
class Bench:
    """A container of an emulator, and what a run against it needs."""

    server: AzureServer
    tmp: Path
    monkeypatch: pytest.MonkeyPatch
    container: str = ""
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.container = self.container or self.server.create_container(unused_name())
        self.reach(self.server.endpoint)

    def reach(self, endpoint: str) -> None:
        """Lead the program here."""
        for name, value in self.server.environment(endpoint).items():
            self.monkeypatch.setenv(name, value)

    @property
    def url(self) -> str:
        """Of the image."""
        return f"az://{self.container}/{NAME}"

    @property
    def left(self) -> list[str]:
        """Everything in the container, blocks that nobody committed too."""
        return self.server.names(self.container)

    def toml(
        self, *more: str, encoder: str = "encode.raw", writer: str = "write.azure_block", options: str = ""
    ) -> Path:
        """An export of the disk in `tmp`."""
        tls = f'; ca_file = "{self.server.ca_file}"' if self.server.ca_file else ""
        return write_toml(
            self.tmp / "export.toml",
            f'read.disk; path = "{self.tmp / "disk"}"',
            "checksum.guest",
            "sparse.zeros",
            encoder,
            f'{writer}; url = "{self.url}"{tls}' + (f"; {options}" if options else ""),
            *more,
        )

    async def export(self, *more: str, **given: str) -> Outcome:
        """Run it."""
        return await export(self.toml(*more, **given), events=self.events)

    @asynccontextmanager
    async def planned(
        self,
        image: Image,
        *,
        memory: int = 64 * MiB,
        longest: int | None = None,
        disk_size: int | None = None,
        clock: Clock | None = None,
        **options: object,
    ) -> AsyncIterator[AzureBlockWriter]:
        """A writer after its planning; closed at the end."""
        again = ImageReplay(image.data)
        context = make_context(image, events=self.events, clock=QuickClock(), disk_size=disk_size, replay=again)
        given = Options(**{"url": self.url, **options})  # type: ignore[arg-type]  # the types of Options' fields
        writer = AzureBlockWriter(
            given, replace(context, name="write.azure_block", clock=clock or context.clock), retry_policy=RetryPolicy()
        )
        layout = image.layout(image_bytes_max=longest or image.size)
        order = Order.HEAD_LAST if image.head_length else Order.SEQUENTIAL
        try:
            plan = await writer.plan(SinkRequest(layout=layout, order=order, memory=memory))
            again.boundaries = plan.boundaries
            yield writer
        finally:
            with anyio.CancelScope(shield=True):
                await writer.close()

    async def store(self, image: Image, **more: object) -> StoredImage:
        """Plan, run, and close."""
        async with self.planned(image, **more) as writer:  # type: ignore[arg-type]  # passed through
            outlet = Collected()
            await writer.run(image.pieces(), outlet)
            return outlet.images[0]


@pytest.fixture
def bench(azure_server: AzureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A container of the test's own."""
    write_disk(tmp_path / "disk", LETTERS)
    return Bench(azure_server, tmp_path, monkeypatch)


# ---- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2", 'encode.qcow2; compression = "none"'])
async def test_the_container_holds_the_disk(bench: Bench, encoder: str) -> None:
    outcome = await bench.export("verify.receipt", "verify.readback", encoder=encoder)
    assert outcome.state == "identical"
    assert outcome.uri == bench.url
    image = bench.tmp / "image"
    image.write_bytes(bench.server.get(bench.container, NAME))
    kind = "raw" if "raw" in encoder else "qcow2"
    disk = str(bench.tmp / "disk")
    subprocess.run(["qemu-img", "compare", "-F", kind, "-f", "raw", disk, str(image)], check=True)
    assert bench.left == [NAME, f"{NAME}.manifest.json"]


@pytest.mark.parametrize("memory", [64 * MiB, 12 * MiB])  # blocks are kept, or streamed
@pytest.mark.parametrize("checksum", ["md5", "crc64"])
async def test_blocks_go_up_in_any_order_and_the_list_puts_them_together(
    bench: Bench, memory: int, checksum: str
) -> None:
    image = mixed(30 * MiB, head_length=65536)
    stored = await bench.store(image, memory=memory, checksum=checksum)
    assert bench.server.get(bench.container, NAME) == image.data
    assert stored.size == image.size


async def test_receipt_names_what_each_block_was_compared_with(bench: Bench) -> None:
    image = mixed(30 * MiB)
    async with bench.planned(image) as writer:
        await writer.run(image.pieces(), Collected())
        async with writer._after_planning().upload.fetch_receipt() as receipt:
            assert isinstance(receipt, Receipt)
    ((what, ours, theirs),) = receipt.proofs
    assert (what, ours) == ("block list", theirs)


async def test_page_blob_holds_a_fixed_vhd_and_gets_no_zeros(bench: Bench) -> None:
    disk = write_disk(bench.tmp / "disk", "A" + "0" * 20 + "-" * 20 + "B", MiB)
    async with FaultProxy(bench.server.port) as proxy:
        bench.reach(bench.server.reached_at(proxy.url))
        outcome = await bench.export("verify.readback", encoder=PAGE_CHAIN[0], writer=PAGE_CHAIN[1])
        sent = sum(seen.body_bytes for seen in proxy.requests("PUT", query="comp=page"))
        assert all(seen.body_bytes <= 4 * MiB for seen in proxy.requests("PUT", query="comp=page"))
    assert outcome.state == "identical"
    assert sent <= 2 * MiB + 4096
    image = bench.tmp / "image.vhd"
    image.write_bytes(bench.server.get(bench.container, NAME))
    assert image.read_bytes()[: disk.stat().st_size] == disk.read_bytes()
    assert image.stat().st_size % MiB == 512


async def test_over_tls_with_an_own_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_disk(tmp_path / "disk", LETTERS)
    with Azurite(with_tls=True) as azurite:
        bench = Bench(azurite.server, tmp_path, monkeypatch)
        assert (await bench.export("verify.readback")).state == "identical"
        with pytest.raises(StoreError, match="certificate of the store is not trusted"):
            await bench.store(mixed(MiB))


@pytest.mark.parametrize("with_key", [True, False])
async def test_every_kind_of_credentials_opens_the_account(bench: Bench, with_key: bool) -> None:
    text = bench.server.connection_string()
    given: dict[str, object] = {"endpoint": bench.server.endpoint, "account": ACCOUNT}
    if with_key:
        given["key"] = Secret("KEY", text.partition("AccountKey=")[2].partition(";")[0])
    else:
        given["sas"] = Secret("SAS", "?" + bench.server.sas(bench.container))
    bench.monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    image = mixed(9 * MiB)
    await bench.store(image, **given)
    assert bench.server.get(bench.container, NAME) == image.data


# ---- planning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [("encode.raw", "write.azure_block"), PAGE_CHAIN])
async def test_an_existing_target_is_refused_and_kept_or_replaced(bench: Bench, writer: tuple[str, str]) -> None:
    for name in (NAME, f"{NAME}.manifest.json"):
        bench.server.put(bench.container, name, b"precious")
        with pytest.raises(PlanError, match="target exists"):
            await bench.export(encoder=writer[0], writer=writer[1])
        assert bench.server.get(bench.container, name) == b"precious"
    outcome = await bench.export("verify.readback", encoder=writer[0], writer=writer[1], options="overwrite = true")
    assert outcome.state == "identical"


async def test_wrong_credentials_and_a_missing_container_are_told_in_planning(bench: Bench) -> None:
    wrong = base64.b64encode(b"wrong" * 12).decode()
    for key, reason in ((wrong, "refuses"), ("not base64!", "not base64")):
        bench.monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", bench.server.connection_string(key=key))
        with pytest.raises(PlanError, match=reason) as caught:
            await bench.store(mixed(MiB))
        assert key not in f"{caught.value}{caught.value.hint}"
    bench.monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    garbage = Secret("CONNECTION", "garbage;AccountKey=hunter2")
    with pytest.raises(PlanError, match="connection string is malformed") as malformed:
        await bench.store(mixed(MiB), connection_string=garbage)
    assert "hunter2" not in f"{malformed.value}{malformed.value.hint}"
    for options, reason in (({}, "which storage account"), ({"account": "a"}, "no credentials")):
        with pytest.raises(PlanError, match=reason):
            await bench.store(mixed(MiB), **options)
    read_only = Secret("SAS", bench.server.sas(bench.container, "r"))
    with pytest.raises(StoreError) as refused:
        await bench.store(mixed(MiB), endpoint=bench.server.endpoint, sas=read_only)
    assert refused.value.status == 403
    bench.reach(bench.server.endpoint)
    bench.container = "absent"
    with pytest.raises(PlanError, match="ContainerNotFound") as missing:
        await bench.store(mixed(MiB))
    assert "az storage container create" in missing.value.hint


@pytest.mark.parametrize("container", ["c", "ab", "Container", "a_b", "a--b", "-ab", "ab-", "a" * 64])
def test_what_names_no_container_is_told_how_containers_are_named(container: str) -> None:
    with pytest.raises(PlanError, match="is not the name of a container") as caught:
        AzureUrl.parse(f"az://{container}/x")
    assert "3 to 63" in caught.value.hint


@pytest.mark.parametrize("container", ["abc", "a-1", "a" * 63, "$root"])
def test_containers_of_every_length_are_known(container: str) -> None:
    assert AzureUrl.parse(f"az://{container}/x/y").container == container


@pytest.mark.parametrize("url", ["az://container", "az://container/", "az:///x", "s3://a/b"])
async def test_what_names_no_blob_is_refused(bench: Bench, url: str) -> None:
    with pytest.raises(PlanError, match="does not name a blob"):
        await bench.store(mixed(MiB), url=url)


async def test_page_blob_wants_its_size_first(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"write.azure_page takes pieces"):
        await bench.export(encoder="encode.qcow2", writer="write.azure_page")
    image = mixed(MiB)
    for length in (None, MiB + 1, 9 << 40):
        writer = AzurePageWriter(PageOptions(url=bench.url), make_context(image))
        request = SinkRequest(layout=image.layout(image_bytes=length), order=Order.SPARSE, memory=64 * MiB)
        with pytest.raises(PlanError, match="whole size") as caught:
            await writer.plan(request)
        assert "encode.vhd" in caught.value.hint
        await writer.close()


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [64 * MiB, 12 * MiB])
@pytest.mark.parametrize(
    "rule",
    [
        Rule(Reply(status=503, when="body"), method="PUT", query="comp=block&", when=Nth(2)),
        Rule(ResetRequest(after_bytes=MiB), method="PUT", query="comp=block&", when=Nth(2)),
        Rule(LoseReply(), method="PUT", query="comp=block&", when=Nth(2)),
        Rule(LoseReply(), method="PUT", query="comp=blocklist"),
        Rule(Reply(status=500), method="PUT", query="comp=blocklist", when=Nth(1)),
    ],
    ids=["busy", "reset", "lost block", "lost commit", "failed commit"],
)
async def test_faults_on_the_way_are_mended(bench: Bench, rule: Rule, memory: int) -> None:
    image = mixed(30 * MiB, head_length=65536)
    async with FaultProxy(bench.server.port, rules=[rule]) as proxy:
        bench.reach(bench.server.reached_at(proxy.url))
        await bench.store(image, memory=memory)
    assert bench.server.get(bench.container, NAME) == image.data


async def test_lost_answer_to_a_whole_blob_is_found_out(bench: Bench) -> None:
    image = mixed(3 * MiB)
    async with FaultProxy(bench.server.port, rules=[Rule(LoseReply(), method="PUT")]) as proxy:
        bench.reach(bench.server.reached_at(proxy.url))
        await bench.store(image)
    assert bench.server.get(bench.container, NAME) == image.data


async def test_block_that_changed_on_the_way_is_refused_and_nothing_is_left(bench: Bench) -> None:
    rules = [Rule(FlipRequest(offset=1000), method="PUT", query="comp=block&", when=Nth(2))]
    async with FaultProxy(bench.server.port, rules=rules) as proxy:
        bench.reach(bench.server.reached_at(proxy.url))
        with pytest.raises(StoreError, match=r"(?i)md5"):
            await bench.store(mixed(30 * MiB))
    assert bench.left == []


@pytest.mark.parametrize("replaces", [False, True])
async def test_cancelled_upload_leaves_nothing_that_anybody_sees(bench: Bench, replaces: bool) -> None:
    if replaces:
        bench.server.put(bench.container, NAME, b"old")
    rules = [Rule(StallRequest(after_bytes=MiB), method="PUT", query="comp=block&", when=Nth(3))]
    async with FaultProxy(bench.server.port, rules=rules) as proxy:
        bench.reach(bench.server.reached_at(proxy.url))
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(bench.store, mixed(30 * MiB), overwrite=replaces, parts_in_flight=1))
                await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
                tasks.cancel_scope.cancel()
    assert bench.left == ([NAME] if replaces else [])
    if replaces:
        assert bench.server.get(bench.container, NAME) == b"old"
        assert [event for event in bench.events if isinstance(event, FallbackTaken)]


async def test_block_that_comes_after_the_abort_began_is_removed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request was cut off, and was in the server's hands all the same."""
    plain, block_id = AzureClient.blocks, quote(base64.b64encode(bytes(28)).decode(), safe="")
    late = partial(bench.server.request, "PUT", f"{bench.container}/{quote(NAME)}?comp=block&blockid={block_id}", b"x")
    seen: list[bool] = []

    async def blocks(client: AzureClient, name: str, *, committed: bool) -> list[tuple[str, int]] | None:
        found = await plain(client, name, committed=committed)
        seen.append(bool(found))
        if not found and seen.count(False) == 1:
            assert (await anyio.to_thread.run_sync(late))[0] == 201
        return found

    monkeypatch.setattr(AzureClient, "blocks", blocks)
    rules = [Rule(StallRequest(after_bytes=MiB), method="PUT", query="comp=block&", when=Nth(3))]
    async with FaultProxy(bench.server.port, rules=rules) as proxy:
        bench.reach(bench.server.reached_at(proxy.url))
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(bench.store, mixed(30 * MiB), parts_in_flight=1))
                await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
                tasks.cancel_scope.cancel()
    assert seen == [True, False, True, False]
    assert bench.left == []


async def test_failed_abort_names_the_commands(bench: Bench) -> None:
    rules = [
        Rule(Reply(status=400), method="PUT", query="comp=block&", when=Nth(3)),
        Rule(Reply(status=403), method="GET", query="blocklist"),
    ]
    async with FaultProxy(bench.server.port, rules=rules) as proxy:
        bench.reach(bench.server.reached_at(proxy.url))
        with pytest.raises(LeftBehindError) as caught:
            await bench.store(mixed(30 * MiB), parts_in_flight=1)
    bench.reach(bench.server.endpoint)
    (command,) = caught.value.commands
    assert "pipeline uploads abort" in command
    assert bench.left == [NAME]
    for verb, told in (("list", "2 parts"), ("abort", "1 removed")):
        done = await anyio.to_thread.run_sync(partial(call, "uploads", verb, bench.url, env=bench.server.environment()))
        assert told in done.out, done.err
    assert bench.left == []


async def test_target_of_somebody_else_that_appears_meanwhile_is_left_alone(bench: Bench) -> None:
    async with bench.planned(mixed(30 * MiB)) as writer:
        bench.server.put(bench.container, NAME, b"theirs")
        with pytest.raises(StoreError, match=r"appeared while|InvalidBlock"):
            await writer.run(mixed(30 * MiB).pieces(), Collected())
    assert bench.server.get(bench.container, NAME) == b"theirs"


async def test_image_that_lacks_guest_bytes_is_not_committed(bench: Bench) -> None:
    image = mixed(30 * MiB)
    with pytest.raises(StageError, match="guest bytes were written"):
        await bench.store(image, disk_size=image.guest_bytes + 1)
    assert bench.left == []


@pytest.mark.parametrize("writer", [("encode.raw", "write.azure_block"), PAGE_CHAIN])
async def test_image_that_is_not_the_disk_is_withdrawn(
    bench: Bench, writer: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.store.azure import AzureClient

    original = AzureClient.get_range

    async def flipped(self: AzureClient, name: str, offset: int, length: int, etag: str) -> bytes:
        data = await original(self, name, offset, length, etag)
        return bytes([data[0] ^ 1]) + data[1:]

    monkeypatch.setattr(AzureClient, "get_range", flipped)
    with pytest.raises((VerificationError, FormatError)):
        await bench.export("verify.readback", encoder=writer[0], writer=writer[1])
    assert bench.left == []


async def test_page_blob_of_a_cancelled_run_is_removed_and_of_a_killed_one_is_listed(bench: Bench) -> None:
    write_disk(bench.tmp / "disk", "ABCDEFGH" * 3, MiB)
    toml = bench.toml(encoder=PAGE_CHAIN[0], writer=PAGE_CHAIN[1])
    rules = [Rule(Stall(), method="PUT", query="comp=page", when=Nth(2))]
    async with FaultProxy(bench.server.port, rules=rules) as proxy:
        bench.reach(bench.server.reached_at(proxy.url))
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(export, toml)
                await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
                assert bench.left == [NAME]
                done = await anyio.to_thread.run_sync(
                    lambda: call("uploads", "list", f"az://{bench.container}/", env=bench.server.environment())
                )
                tasks.cancel_scope.cancel()
    assert NAME in done.out, done.err
    assert bench.left == []


@pytest.mark.slow
async def test_emulator_that_is_killed_in_the_middle_of_a_block_and_comes_back_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Azurite() as azurite:
        bench, image, clock = Bench(azurite.server, tmp_path, monkeypatch), mixed(30 * MiB), PatientClock()
        third = Rule(StallRequest(after_bytes=MiB), method="PUT", query="comp=block&", when=Nth(3))
        async with FaultProxy(azurite.server.port, rules=[third]) as proxy:
            bench.reach(azurite.server.reached_at(proxy.url))
            with anyio.fail_after(90):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(partial(bench.store, image, clock=clock, parts_in_flight=1))
                    await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
                    before = [seen for seen in proxy.requests("PUT", query="comp=block&") if seen.status == 201]
                    acknowledged = sum(seen.body_bytes for seen in before)
                    await anyio.to_thread.run_sync(azurite.wait_until_saved, acknowledged)
                    await anyio.to_thread.run_sync(azurite.kill)
                    await clock.sleeps.wait()
                    await anyio.to_thread.run_sync(azurite.start)
                    clock.back.set()
            after = proxy.requests("PUT", query="comp=block&")[len(before) + 1 :]
        assert [event for event in bench.events if isinstance(event, RetryScheduled)]
        assert len(before) == 2
        assert acknowledged + sum(seen.body_bytes for seen in after) == image.size, "no block is sent twice"
        assert azurite.server.get(bench.container, NAME) == image.data


# ---- resume, and other commands ------------------------------------------------------------------------------------


def test_export_that_failed_goes_on_in_a_new_process(bench: Bench, tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk", "ABCDEFGHIJKLMNOP" * 4, MiB)
    toml = bench.toml("verify.readback")
    env = {"XDG_STATE_HOME": str(tmp_path / "state")}
    first = anyio.run(_broken, bench, toml, env)
    assert first == 4
    assert bench.left == [NAME]
    said = call("run", toml, "--resume", "--json", env={**env, **bench.server.environment()})
    assert said.code == 0, said.err
    assert bench.server.get(bench.container, NAME) == disk.read_bytes()
    stored = said.last("run_finished")
    assert stored["verified"] == "identical"


async def _broken(bench: Bench, toml: Path, env: dict[str, str]) -> int:
    rules = [Rule(Reply(status=400), method="PUT", query="comp=block&", when=Nth(6))]
    async with FaultProxy(bench.server.port, rules=rules) as proxy:
        there = bench.server.environment(bench.server.reached_at(proxy.url))
        # One part at a time: five are acknowledged when the sixth is refused, however fast the machine is.
        one_by_one = ("--set", "write.azure_block.parts_in_flight=1")
        said = await anyio.to_thread.run_sync(lambda: call("run", toml, *one_by_one, env={**env, **there}))
    return said.code


def test_conversion_goes_to_and_comes_from_a_container(bench: Bench) -> None:
    back, url = bench.tmp / "back.raw", f"az://{bench.container}/x.qcow2"
    runner = CliRunner()
    for arguments in (
        ["convert", str(bench.tmp / "disk"), url, "-f", "raw", "-q"],
        ["verify", url],
        ["verify", url, "--level", "receipt"],
        ["inspect", url],
        ["convert", url, str(back), "-q"],
    ):
        done = runner.invoke(main, arguments, prog_name="pipeline")
        assert done.exit_code == 0, (arguments, done.output)
    assert back.read_bytes() == (bench.tmp / "disk").read_bytes()
