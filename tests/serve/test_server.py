"""The NBD server: with the tools that people use, and with clients that want to harm it."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import socket
import struct
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest

from pipeline.errors import PlanError, StoreError
from pipeline.units import KiB, MiB
from stages.decode.named import NamedImage
from stages.serve.cache import PAGE, RUN_MAX, CachedImage
from stages.serve.layer import GRAIN, Layer, open_layer
from stages.serve.opening import open_disk
from stages.serve.server import Limits, listen_on_socket
from stages.store import nbd_wire as wire
from stages.store.file import open_file_reader
from stages.store.nbd_channel import Channel, ChannelClosed, connect
from tests.decode.images import BytesReader, mixed_disk, run
from tests.decode.made import made_gce, made_ova
from tests.disks.letters import write_disk
from tests.serve.served import cached, serving, tool

SIZE = 9 * MiB + 512


def image_of(folder: Path, disk: bytes, *arguments: str) -> bytes:
    (folder / "disk.raw").write_bytes(disk)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *arguments, str(folder / "disk.raw"), str(folder / "q"))
    return (folder / "q").read_bytes()


# ---- the tools -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, on_socket",
    [((), True), ((), False), (("-c",), True), (("-c", "-o", "compression_type=zstd,cluster_size=2M"), False)],
)
async def test_nbdcopy_gets_the_disk(tmp_path: Path, arguments: tuple[str, ...], on_socket: bool) -> None:
    disk = mixed_disk(SIZE)
    image = await cached(BytesReader(image_of(tmp_path, disk, *arguments)), "qcow2")
    async with serving(image, socket=tmp_path / "s" if on_socket else None) as (server, url):
        await tool("nbdcopy", url, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == disk
        # Without structured replies, block status or several connections; requests of odd sizes.
        for words in (("--synchronous",), ("--connections=1", "--request-size=65536"), ("--allocated",)):
            await tool("nbdcopy", *words, url, tmp_path / "out")
            assert (tmp_path / "out").read_bytes() == disk
        assert server.served >= 4
        assert server.clients == 0


FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "raw": ("raw", ()),
    "qcow2": ("qcow2", ()),
    "qcow2 of small clusters": ("qcow2", ("-o", "cluster_size=512")),
    "qcow2 compressed": ("qcow2", ("-c",)),
    "vhd": ("vpc", ("-o", "force_size=on")),
    "vhd fixed": ("vpc", ("-o", "subformat=fixed,force_size=on")),
    "vmdk": ("vmdk", ()),
    "vmdk compressed": ("vmdk", ("-o", "subformat=streamOptimized")),
    "vhdx": ("vhdx", ()),
}


@pytest.mark.parametrize("name", FORMATS)
async def test_local_images_of_every_format_are_what_they_were(tmp_path: Path, name: str) -> None:
    """From a file the kernel sends what lies there as it is: at the right places."""
    disk = mixed_disk(SIZE)
    (tmp_path / "disk.raw").write_bytes(disk)
    kind, arguments = FORMATS[name]
    image = tmp_path / f"image.{kind}"
    run("qemu-img", "convert", "-f", "raw", "-O", kind, *arguments, str(tmp_path / "disk.raw"), str(image))
    async with open_disk(NamedImage(place=str(image), format="vhd" if kind == "vpc" else kind)) as opened:
        assert opened.disk.fd is not None
        async with serving(opened.disk) as (_, url):
            await tool("nbdcopy", url, tmp_path / "out")
            assert (tmp_path / "out").read_bytes()[:SIZE] == disk
            await tool("nbdcopy", "--connections=1", "--request-size=4194304", url, tmp_path / "out")
            assert (tmp_path / "out").read_bytes()[:SIZE] == disk
        assert opened.counter.read_bytes > 0


async def test_an_image_inside_of_an_archive_is_read_where_it_lies(tmp_path: Path) -> None:
    disk = mixed_disk(4 * MiB)
    (tmp_path / "disk.raw").write_bytes(disk)
    vmdk = tmp_path / "disk.vmdk"
    options = ("-O", "vmdk", "-o", "subformat=streamOptimized")
    run("qemu-img", "convert", "-f", "raw", *options, str(tmp_path / "disk.raw"), str(vmdk))
    (tmp_path / "web.ova").write_bytes(made_ova(vmdk.read_bytes()))
    (tmp_path / "web.tar.gz").write_bytes(made_gce(disk))
    for name in ("web.ova", "web.tar.gz"):
        async with open_disk(NamedImage(place=str(tmp_path / name))) as opened:
            assert opened.disk.fd is None
            async with serving(opened.disk) as (_, url):
                await tool("nbdcopy", url, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == disk


async def test_a_file_that_is_cut_while_it_is_served_ends_the_answer(tmp_path: Path) -> None:
    """Never made up with zeros."""
    (tmp_path / "disk.raw").write_bytes(b"x" * 8 * MiB)
    async with open_disk(NamedImage(place=str(tmp_path / "disk.raw"), format="raw")) as opened:
        async with serving(opened.disk) as (_, url):
            os.truncate(tmp_path / "disk.raw", 4 * MiB)
            await tool("nbdcopy", url, tmp_path / "out", code=1)


async def test_nbdinfo_sees_size_and_holes(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", "A--B----C", MiB)
    async with open_file_reader(tmp_path / "disk") as reader:
        async with serving(await cached(reader)) as (_, url):
            told = json.loads(await tool("nbdinfo", "--json", url))["exports"][0]
            assert told["export-size"] == 9 * MiB
            assert told["contexts"] == ["base:allocation"]
            assert (told["is_read_only"], told["can_multi_conn"], told["can_df"]) == (True, True, True)
            found = json.loads(await tool("nbdinfo", "--json", "--map", url))
            zero = [(one["offset"] // MiB, one["length"] // MiB) for one in found if one["type"] == 3]
            assert zero == [(1, 2), (4, 4)]
            listed = json.loads(await tool("nbdinfo", "--list", "--json", url.removesuffix("disk")))
            assert listed["exports"][0]["export-name"] == "disk"
            assert "diskx" in await tool("nbdinfo", url + "x", code=1)


async def test_qemu_img_and_qemu_io_read_it(tmp_path: Path) -> None:
    disk = mixed_disk(SIZE)
    image = await cached(BytesReader(image_of(tmp_path, disk)), "qcow2")
    async with serving(image) as (_, url):
        await tool("qemu-img", "compare", "-f", "raw", "-F", "raw", url, tmp_path / "disk.raw")
        assert json.loads(await tool("qemu-img", "info", "--output=json", url))["virtual-size"] == SIZE
        await tool("qemu-img", "map", "-f", "raw", "--output=json", url)
        draw = random.Random(3)
        script = []
        for _ in range(60):
            offset = draw.randrange(SIZE - 1)
            length = min(SIZE - offset, draw.choice([1, 511, 4096, 65537, 3 * MiB]))
            script.append(f"read -v {offset} {length}" if length < 600 else f"read {offset} {length}")
        said = await tool("qemu-io", "-r", "-f", "raw", url, input="\n".join([*script, "quit"]).encode())
        assert said.count("read ") >= 60
        assert "failed" not in said
        assert "ermission" in await tool("qemu-io", "-f", "raw", "-c", "write 0 512", url, code=None)


async def test_nbdkit_reads_it_through_its_filters(tmp_path: Path) -> None:
    """nbdkit's own client, which asks in other ways than libnbd's programs."""
    disk = mixed_disk(SIZE)
    image = await cached(BytesReader(image_of(tmp_path, disk)), "qcow2")
    async with serving(image, socket=tmp_path / "s") as (_, url):
        for filters in ((), ("--filter=cow", "--filter=cache"), ("--filter=blocksize", "--filter=readahead")):
            copy = f'nbdcopy "$uri" {tmp_path / "out"}'
            await tool("nbdkit", "-U", "-", *filters, "nbd", f"uri={url}", "--run", copy)
            assert (tmp_path / "out").read_bytes() == disk


async def test_an_overlay_takes_writes_and_the_image_none(tmp_path: Path) -> None:
    disk = bytearray(mixed_disk(SIZE))
    stored = image_of(tmp_path, bytes(disk))
    reader = BytesReader(stored)
    layer = open_layer(await cached(reader, "qcow2"), tmp_path / "overlay")
    draw = random.Random(5)
    script = []
    for number in range(80):
        offset, pattern = draw.randrange(SIZE - 1), 1 + number
        length = min(SIZE - offset, draw.choice([1, 512, 4096, 70_000, 2 * MiB]))
        kind = draw.choice(["w", "w", "z"])
        script.append(f"write -P {pattern} {offset} {length}" if kind == "w" else f"write -z {offset} {length}")
        disk[offset : offset + length] = bytes([pattern if kind == "w" else 0]) * length
    async with serving(layer, socket=tmp_path / "s") as (_, url):
        said = await tool("qemu-io", "-f", "raw", url, input="\n".join([*script, "flush", "quit"]).encode())
        assert "failed" not in said
        await tool("nbdcopy", url, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == disk
    assert bytes(reader.data) == stored
    await layer.flush()
    layer.close()
    # The next server takes the same file up again; one of another disk is refused.
    again = open_layer(await cached(BytesReader(stored), "qcow2"), tmp_path / "overlay")
    async with serving(again) as (_, url):
        await tool("nbdcopy", url, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == disk
    again.close()
    with pytest.raises(PlanError, match="no layer over this disk"):
        open_layer(await cached(BytesReader(bytes(4 * MiB))), tmp_path / "overlay")


async def test_nbdcopy_writes_into_an_overlay(tmp_path: Path) -> None:
    disk = mixed_disk(SIZE, seed=9)
    (tmp_path / "new").write_bytes(disk)
    layer = open_layer(await cached(BytesReader(mixed_disk(SIZE))), None)
    async with serving(layer) as (_, url):
        await tool("nbdcopy", "--flush", tmp_path / "new", url)
        await tool("nbdcopy", url, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == disk
    layer.close()


async def test_a_layer_that_may_not_grow_is_full_for_its_clients() -> None:
    layer = open_layer(await cached(BytesReader(bytes(SIZE))), None, limit=2 * GRAIN)
    async with serving(layer) as (_, url):
        orders = [f"write {offset} 512" for offset in (0, 4096, 5 * GRAIN)]
        assert "failed" not in await tool("qemu-io", "-f", "raw", *(w for o in orders for w in ("-c", o)), url)
        assert "No space left" in await tool("qemu-io", "-f", "raw", "-c", f"write {9 * GRAIN} 512", url, code=None)
        assert "failed" not in await tool("qemu-io", "-f", "raw", "-c", "write 1024 512", url)
    layer.close()


# ---- the cache -------------------------------------------------------------------------------------------------------


async def test_one_small_read_costs_one_page_and_the_second_nothing() -> None:
    reader = BytesReader(mixed_disk(SIZE))
    disk = await cached(reader)
    for _ in range(3):
        spans = await disk.read(3 * MiB + 5, 10)
        assert b"".join(span.data or bytes(span.length) for span in spans) == reader.data[3 * MiB + 5 : 3 * MiB + 15]
    assert [length for _, length in reader.reads] == [PAGE]


async def test_reading_straight_on_is_read_ahead_in_growing_steps() -> None:
    reader = BytesReader(bytes(b"x" * SIZE))
    disk = await cached(reader)
    for offset in range(0, SIZE, 4 * KiB):
        await disk.read(offset, min(4 * KiB, SIZE - offset))
    lengths = [length for _, length in reader.reads]
    assert lengths[:6] == [PAGE, 2 * PAGE, 4 * PAGE, 8 * PAGE, 16 * PAGE, RUN_MAX]
    assert sum(lengths) == SIZE, "each byte once"


async def test_cache_keeps_to_its_capacity() -> None:
    reader = BytesReader(bytes(b"x" * SIZE))
    disk = CachedImage((await cached(reader))._image, capacity=2 * MiB)
    draw = random.Random(1)
    for _ in range(400):
        offset = draw.randrange(SIZE - 64 * KiB)
        await disk.read(offset, 64 * KiB)
        assert disk._held <= 2 * MiB
        assert sum(run.length for run in set(disk._pages.values())) <= 2 * MiB
    spans = [span for start in range(0, 8 * MiB, MiB) for span in await disk.read(start, MiB)]
    whole = b"".join(span.data or bytes(span.length) for span in spans)
    assert whole == reader.data[: 8 * MiB]


async def test_a_reader_that_is_cancelled_leaves_its_page_to_others() -> None:
    class Slow(BytesReader):
        gate = anyio.Event()

        async def read(self, offset: int, length: int) -> bytes:
            await self.gate.wait()
            return await super().read(offset, length)

    disk = await cached(Slow(mixed_disk(SIZE)))
    got: list[int] = []

    async def read() -> None:
        got.append(sum(span.length for span in await disk.read(0, 100)))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            async with anyio.create_task_group() as first:
                first.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                first.cancel_scope.cancel()
            Slow.gate.set()
    assert got == [100]


async def test_a_page_that_failed_is_read_again_the_next_time(tmp_path: Path) -> None:
    class Failing(BytesReader):
        failures = 1

        async def read(self, offset: int, length: int) -> bytes:
            if self.failures:
                self.failures -= 1
                raise StoreError("the store is away", operation="read", offset=offset)
            return await super().read(offset, length)

    problems: list[str] = []
    disk = mixed_disk(MiB)
    async with serving(await cached(Failing(disk)), problems=problems) as (_, url):
        said = await tool("qemu-io", "-r", "-f", "raw", "-c", "read 0 4096", "-c", "read 0 4096", url, code=None)
    assert said.count("Input/output error") == 1
    assert "read 4096/4096" in said
    assert problems == ["read: the store is away (offset=0)"]


# ---- clients that want to harm ---------------------------------------------------------------------------------------


class Client:
    """Speaks the protocol by hand."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    @classmethod
    async def of(cls, url: str) -> Client:
        port = int(url.rpartition(":")[2].partition("/")[0])
        client = cls(await connect(("127.0.0.1", port)))
        await client.channel.receive(wire.GREETING.size)
        return client

    async def go(self, *, structured: bool = True) -> None:
        await self.channel.send(wire.CLIENT_FLAGS.pack(wire.FIXED_NEWSTYLE | wire.NO_ZEROES))
        if structured:
            await self.option(wire.Opt.STRUCTURED_REPLY)
            await self.option(wire.Opt.SET_META_CONTEXT, wire.pack_contexts("", [wire.ALLOCATION]))
        kinds = await self.option(wire.Opt.GO, wire.pack_go("", []))
        assert kinds[-1] == wire.Rep.ACK

    async def option(self, option: int, data: bytes = b"") -> list[int]:
        """Ask; the kinds of the answers."""
        await self.channel.send(wire.pack_option(option, data))
        kinds: list[int] = []
        while not kinds or not (kinds[-1] == wire.Rep.ACK or kinds[-1] & wire.REP_ERROR):
            _, _, kind, length = wire.OPTION_REPLY.unpack(await self.channel.receive(wire.OPTION_REPLY.size))
            await self.channel.receive(length)
            kinds.append(kind)
        return kinds

    async def ask(self, command: int, offset: int, length: int, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request; 0, or the error of its answer."""
        await self.channel.send(wire.pack_request(command, 7, offset, length, flags), payload)
        error = 0
        while True:
            head = await self.channel.receive(4)
            if int.from_bytes(head, "big") == wire.SIMPLE_MAGIC:
                _, error, _ = wire.SIMPLE_REPLY.unpack(head + await self.channel.receive(12))
                if not error and command == wire.Command.READ:
                    await self.channel.receive(length)
                return int(error)
            _, chunk, kind, handle, size = wire.CHUNK.unpack(head + await self.channel.receive(wire.CHUNK.size - 4))
            assert handle == 7
            body = await self.channel.receive(size)
            if kind & wire.CHUNK_ERROR:
                error, _ = wire.unpack_error(body)
            if chunk & wire.DONE:
                return error


@pytest.mark.parametrize("structured", [True, False])
async def test_requests_that_make_no_sense_get_the_protocols_errors(structured: bool) -> None:
    layer = open_layer(await cached(BytesReader(bytes(SIZE))), None)
    async with serving(layer) as (_, url):
        client = await Client.of(url)
        await client.go(structured=structured)
        read, write, status = wire.Command.READ, wire.Command.WRITE, wire.Command.BLOCK_STATUS
        assert await client.ask(read, SIZE, 1) == errno.EINVAL
        assert await client.ask(read, 2**64 - 1, 2) == errno.EINVAL
        assert await client.ask(read, 0, 2**32 - 1) == errno.EINVAL
        assert await client.ask(read, 0, 512, 1 << 9) == errno.EINVAL
        assert await client.ask(99, 0, 512) == errno.EINVAL
        assert await client.ask(write, SIZE - 1, 4, payload=b"abcd") == errno.ENOSPC
        assert await client.ask(wire.Command.TRIM, 0, 2**32 - 1) == errno.ENOSPC
        assert await client.ask(status, 0, 0) == errno.EINVAL
        assert await client.ask(status, 0, SIZE) == (0 if structured else errno.EINVAL)
        assert await client.ask(read, 0, 0) == 0
        assert await client.ask(read, SIZE - 512, 512) == 0
        assert await client.ask(wire.Command.FLUSH, 0, 0) == 0
        client.channel.close()
    layer.close()


async def test_read_only_export_refuses_writes_and_stays_in_step() -> None:
    reader = BytesReader(bytes(SIZE))
    async with serving(await cached(reader)) as (_, url):
        client = await Client.of(url)
        await client.go()
        assert await client.ask(wire.Command.WRITE, 0, MiB, payload=b"x" * MiB) == errno.EPERM
        assert await client.ask(wire.Command.WRITE_ZEROES, 0, MiB) == errno.EPERM
        assert await client.ask(wire.Command.READ, 0, 512) == 0
        client.channel.close()
    assert not any(reader.data)


def _option(length: int, data: bytes = b"", option: int = 7) -> bytes:
    return wire.CLIENT_FLAGS.pack(3) + wire.OPTION.pack(wire.OPTION_MAGIC, option, length) + data


@pytest.mark.parametrize(
    "said",
    [
        b"\xff" * 64,
        b"GET / HTTP/1.1\r\n\r\n" + bytes(32),
        _option(2**32 - 1),
        wire.CLIENT_FLAGS.pack(1 << 31) + bytes(64),
        wire.CLIENT_FLAGS.pack(3) + wire.pack_option(3) * 300,
        _option(5, b"wrong", option=1),
    ],
)
async def test_a_client_that_speaks_nonsense_is_hung_up_on(said: bytes) -> None:
    async with serving(await cached(BytesReader(bytes(SIZE)))) as (server, url):
        client = await Client.of(url)
        with anyio.fail_after(5):
            with pytest.raises(ChannelClosed):
                await _talk(client, said)
        await tool("nbdinfo", "--size", url)
        assert server.clients == 0


async def _never_take(client: Client, said: bytes) -> None:
    while True:
        await client.channel.send(said)


async def _talk(client: Client, said: bytes) -> None:
    await client.channel.send(said)
    while True:
        await client.channel.receive(1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack(">I", 2**32 - 1),
        struct.pack(">IH", 0, 65535),
        struct.pack(">I", 0) + struct.pack(">I", 2**31),
        wire.pack_text("disk") + struct.pack(">H", 0) + b"more",
        os.urandom(300),
    ],
)
async def test_an_option_that_makes_no_sense_gets_an_error_and_another_try(data: bytes) -> None:
    async with serving(await cached(BytesReader(bytes(SIZE)))) as (_, url):
        client = await Client.of(url)
        await client.channel.send(wire.CLIENT_FLAGS.pack(3))
        for option in (wire.Opt.GO, wire.Opt.SET_META_CONTEXT, wire.Opt.LIST_META_CONTEXT, wire.Opt.INFO):
            assert (await client.option(option, data))[-1] & wire.REP_ERROR
        assert (await client.option(wire.Opt.STARTTLS))[-1] == wire.Rep.ERR_POLICY
        assert (await client.option(55))[-1] == wire.Rep.ERR_UNSUP
        assert (await client.option(wire.Opt.GO, wire.pack_go("nosuch", [])))[-1] == wire.Rep.ERR_UNKNOWN
        assert (await client.option(wire.Opt.GO, wire.pack_go("", [])))[-1] == wire.Rep.ACK
        assert await client.ask(wire.Command.READ, 0, 512) == 0
        client.channel.close()


async def test_half_open_connections_end_and_others_are_served() -> None:
    """Clients that connect and say nothing, or stop in the middle of a request."""
    limits = Limits(connections=4, handshake_s=0.3, progress_s=0.3)
    problems: list[str] = []
    layer = open_layer(await cached(BytesReader(bytes(SIZE))), None)
    async with serving(layer, limits=limits, problems=problems) as (server, url):
        silent = [await Client.of(url) for _ in range(3)]
        stuck = await Client.of(url)
        await stuck.go()
        await stuck.channel.send(wire.pack_request(wire.Command.WRITE, 1, 0, MiB), b"only this")
        port = int(url.rpartition(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as fifth:
            fifth.setblocking(False)
            await anyio.wait_readable(fifth)
            assert fifth.recv(1) == b"", "one too many"
        for one in (*silent, stuck):
            with anyio.fail_after(5):
                with pytest.raises(ChannelClosed):
                    await one.channel.receive(1)
            one.channel.close()
        await tool("nbdinfo", "--size", url)
        assert server.clients == 0
        assert any("silent" in one for one in problems)
    layer.close()


async def test_a_write_longer_than_any_may_be_is_hung_up_on_before_it_comes() -> None:
    problems: list[str] = []
    layer = open_layer(await cached(BytesReader(bytes(SIZE))), None)
    async with serving(layer, problems=problems) as (server, url):
        client = await Client.of(url)
        await client.go()
        with anyio.fail_after(5):
            with pytest.raises(ChannelClosed):
                await client.ask(wire.Command.WRITE, 0, 2**32 - 1, payload=b"x")
        client.channel.close()
        await tool("nbdinfo", "--size", url)
        assert server.clients == 0
    assert "longer than it may be" in problems[0]
    layer.close()


@pytest.mark.parametrize("is_file", [False, True], ids=["through the cache", "from a file"])
async def test_a_client_that_takes_no_answers_is_hung_up_on_and_holds_little(tmp_path: Path, is_file: bool) -> None:
    """A flood of the longest reads, of which nobody takes one."""
    limits = Limits(progress_s=0.5)
    reader = BytesReader(b"" if is_file else b"x" * (64 * MiB))
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(64 * MiB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with AsyncExitStack() as stack:
        disk = await cached(reader, capacity=8 * MiB)
        if is_file:
            named = NamedImage(place=str(tmp_path / "disk"), format="raw")
            disk = (await stack.enter_async_context(open_disk(named))).disk
        server, url = await stack.enter_async_context(serving(disk, limits=limits))
        client = await Client.of(url)
        await client.go()
        flood = b"".join(wire.pack_request(wire.Command.READ, number, 0, wire.PAYLOAD_MAX) for number in range(20_000))
        with anyio.fail_after(20):
            with pytest.raises(ChannelClosed):
                await _never_take(client, flood)
        client.channel.close()
        await tool("nbdinfo", "--size", url)
        assert server.clients == 0
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KiB
    # The cache, and what the pieces under way hold; the requests ask for 640 GiB.
    assert grown < 64 * MiB, grown


async def test_block_status_of_a_fragmented_disk_is_cut() -> None:
    disk = bytearray(40 * MiB)

    class Holey(BytesReader):
        async def next_data(self, offset: int) -> range | None:
            start = -(-offset // (8 * KiB)) * 8 * KiB if offset % (8 * KiB) >= 4 * KiB else offset
            return range(start, start - start % (8 * KiB) + 4 * KiB) if start < len(disk) else None

    async with serving(await cached(Holey(disk))) as (_, url):
        found = json.loads(await tool("nbdinfo", "--json", "--map", url))
        assert len(found) == 2 * len(disk) // (8 * KiB)


def test_a_socket_is_this_users_alone_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen_on_socket(path)
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(PlanError, match="no socket can be made"):
        listen_on_socket(path)
    first.close()
    listen_on_socket(path).close()
    with pytest.raises(PlanError, match="too long") as caught:
        listen_on_socket(tmp_path / ("x" * 200))
    assert "107 bytes" in caught.value.hint


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + b"\xff"])
def test_a_layer_that_was_not_closed_well_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    async def make() -> Layer:
        return open_layer(await cached(BytesReader(bytes(4 * MiB))), tmp_path / "overlay")

    async def write() -> None:
        layer = await make()
        await layer.write(GRAIN, memoryview(b"x" * 10))
        await layer.flush()
        layer.close()

    anyio.run(write)
    (tmp_path / "overlay").write_bytes(damage((tmp_path / "overlay").read_bytes()))
    with pytest.raises(PlanError, match="no layer"):
        anyio.run(make)
