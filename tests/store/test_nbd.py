"""The NBD client against nbdkit and qemu-nbd, over TCP, Unix sockets and TLS, and against a server that lies."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread
import pytest

from pipeline.errors import FormatError, PlanError, StoreError
from pipeline.flow.retry import Retry, RetryPolicy
from pipeline.units import KiB, MiB
from stages.read.image import ImageReader, Options
from stages.store import nbd_wire as wire
from stages.store.nbd import NbdClient, NbdReader, NbdUrl, Patience, open_nbd_reader
from tests.chains import export, write_toml
from tests.decode.images import mixed_disk, run
from tests.disks.letters import write_disk
from tests.stores.link import Link, Network
from tests.stores.nbd import NbdServer
from tests.verify.context import make_context
from tests.write.images import QuickClock

ONCE = RetryPolicy(attempts=1)


@asynccontextmanager
async def client_of(
    url: str, *, policy: RetryPolicy = ONCE, patience: Patience | None = None
) -> AsyncIterator[NbdClient]:
    retry = Retry(policy, clock=QuickClock(), emit=lambda event: None, stage="test")
    client = NbdClient(NbdUrl.parse(url), retry, patience=patience)
    try:
        await client.open()
        yield client
    finally:
        await client.close()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk with holes."""
    path = tmp_path_factory.mktemp("nbd") / "disk.raw"
    return write_disk(path, "AB" + "-" * 20 + "CD0E", MiB)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
@pytest.mark.parametrize("on", ["port", "socket"])
async def test_an_export_is_read_with_its_holes(
    disk: Path, kind: Literal["nbdkit", "qemu-nbd"], on: Literal["port", "socket"]
) -> None:
    arguments = ("file", disk) if kind == "nbdkit" else ("-f", "raw", "-r", disk)
    with NbdServer(kind, *arguments, on=on) as server:
        async with open_nbd_reader(server.url()) as reader:
            whole = disk.read_bytes()
            assert reader.size == len(whole)
            assert await reader.read(0, reader.size) == whole
            assert await reader.read(511, 3 * MiB + 2) == whole[511 : 3 * MiB + 513]
            assert await reader.next_data(0) == range(2 * MiB)
            assert await reader.next_data(5 * MiB) == range(22 * MiB, 26 * MiB) or kind == "qemu-nbd"
            assert await reader.next_data(reader.size) is None
            with pytest.raises(FormatError, match="ends before"):
                await reader.read(reader.size - 1, 2)


async def test_read_image_takes_an_export_and_zeros_are_not_fetched(disk: Path, tmp_path: Path) -> None:
    with NbdServer("nbdkit", "--filter=stats", "file", disk, f"statsfile={tmp_path / 'stats'}") as server:
        source = ImageReader(Options(url=server.url()), make_context("read.image", disk_size=0))
        info = await source.open()
        assert (info.size, info.mapped_bytes) == (26 * MiB, 6 * MiB)
        await source.close()
        toml = write_toml(
            tmp_path / "export.toml",
            f'read.image; url = "{server.url()}"; format = "raw"',
            "checksum.guest",
            "sparse.zeros",
            "encode.qcow2",
            f'write.file; path = "{tmp_path / "out.qcow2"}"',
            "verify.readback",
        )
        outcome = await export(toml)
        assert outcome.state == "identical"
        server.process.stop()
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(disk), str(tmp_path / "out.qcow2"))
    read = next(line for line in (tmp_path / "stats").read_text().splitlines() if line.startswith("read:"))
    assert "MiB" in read
    # Beside the data: a look at the head, and a sample of what was skipped, which readback reads after all.
    assert float(read.split(",")[2].split()[0]) < 6 + 32 + 1, read


async def test_a_disk_inside_of_an_image_on_a_server_is_found(tmp_path: Path) -> None:
    """A qcow2 file behind a server that knows no formats."""
    content = mixed_disk(3 * MiB)
    (tmp_path / "disk.raw").write_bytes(content)
    run("qemu-img", "convert", "-O", "qcow2", str(tmp_path / "disk.raw"), str(tmp_path / "disk.qcow2"))
    with NbdServer("nbdkit", "file", tmp_path / "disk.qcow2") as server:
        source = ImageReader(Options(url=server.url()), make_context("read.image", disk_size=0))
        info = await source.open()
        assert info.size == 3 * MiB
        assert info.identity["format"] == "qcow2"
        await source.close()


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
async def test_what_is_written_is_there(tmp_path: Path, kind: Literal["nbdkit", "qemu-nbd"]) -> None:
    target = tmp_path / "target.raw"
    target.write_bytes(b"\xee" * 24 * MiB)
    arguments = ("file", target) if kind == "nbdkit" else ("-f", "raw", target)
    expected = bytearray(b"\xee" * 24 * MiB)
    with NbdServer(kind, *arguments) as server:
        async with client_of(server.url()) as client:
            data = mixed_disk(5 * MiB + 300)
            await client.write([(MiB, memoryview(data)), (20 * MiB, memoryview(b"x" * 512))], fua=True)
            expected[MiB : MiB + len(data)] = data
            expected[20 * MiB : 20 * MiB + 512] = b"x" * 512
            await client.zero(8 * MiB + 100, 3 * MiB)
            expected[8 * MiB + 100 : 11 * MiB + 100] = bytes(3 * MiB)
            await client.trim(15 * MiB, MiB)
            await client.flush()
            expected[15 * MiB : 16 * MiB] = await client.read(15 * MiB, MiB)
            assert await client.read(0, 24 * MiB) == bytes(expected)
            assert client.made > 1, "several connections"
    assert target.read_bytes() == bytes(expected)


async def test_blocks_larger_than_the_bytes_are_read_first(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"\xee" * MiB)
    policy = ("blocksize-minimum=4096", "blocksize-error-policy=error")
    with NbdServer("nbdkit", "--filter=blocksize-policy", "file", image, *policy) as server:
        async with client_of(server.url()) as client:
            assert client.info.block_min == 4096
            await client.write([(1000, memoryview(b"a" * 10_000))])
            await client.zero(20_001, 9_000)
            assert await client.read(999, 10_002) == b"\xee" + b"a" * 10_000 + b"\xee"
            assert await client.read(20_000, 9_002) == b"\xee" + bytes(9_000) + b"\xee"


@pytest.mark.parametrize("filters", [("--filter=nozero",), ("--filter=noextents",), ("--filter=nofilter",)])
async def test_servers_that_can_less_still_do(filters: tuple[str, ...], tmp_path: Path) -> None:
    with NbdServer("nbdkit", "--no-sr", *filters, "memory", "8M") as server:
        async with client_of(server.url()) as client:
            assert not client.knows_status
            data = mixed_disk(3 * MiB)
            await client.write([(MiB, memoryview(data))])
            await client.zero(2 * MiB, 100)
            assert await client.read(MiB, 3 * MiB) == data[:MiB] + bytes(100) + data[MiB + 100 :]
            assert await NbdReader(client).next_data(5) == range(5, 8 * MiB)


# ---- who may, and whom we trust --------------------------------------------------------------------------------------


async def test_tls_by_certificates_both_ways() -> None:
    with NbdServer("nbdkit", "memory", "4M", with_tls=True, with_client_certificates=True) as server:
        async with client_of(server.url()) as client:
            data = mixed_disk(4 * MiB)
            await client.write([(0, memoryview(data))])
            assert await client.read(0, 4 * MiB) == data


async def test_a_server_whose_certificate_nobody_signed_is_refused() -> None:
    with NbdServer("nbdkit", "memory", "4M", with_tls=True) as server:
        url = server.url().partition("?")[0]
        with pytest.raises(StoreError, match=r"not trusted") as caught:
            async with client_of(url):
                raise AssertionError
        assert "tls-certificates" in caught.value.hint
        assert not caught.value.temporary
        with pytest.raises(StoreError, match="wants TLS"):
            async with client_of(url.replace("nbds", "nbd")):
                raise AssertionError


async def test_a_client_without_a_certificate_is_refused(tmp_path: Path) -> None:
    with NbdServer("nbdkit", "memory", "4M", with_tls=True, with_client_certificates=True) as server:
        (tmp_path / "ca-cert.pem").write_bytes((server.certificates / "ca-cert.pem").read_bytes())
        url = f"nbds://127.0.0.1:{server.port}/?tls-certificates={tmp_path}"
        with pytest.raises(StoreError, match=r"TLS failed|can't connect"):
            async with client_of(url):
                raise AssertionError


async def test_tls_is_not_given_up_for_a_server_that_has_none() -> None:
    with NbdServer("nbdkit", "memory", "4M") as server:
        with pytest.raises(StoreError, match="does not speak TLS"):
            async with client_of(server.url().replace("nbd://", "nbds://")):
                raise AssertionError


async def test_missing_export_says_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "web01").write_bytes(bytes(MiB))
    with NbdServer("nbdkit", "file", f"dir={tmp_path}") as server:
        with pytest.raises(StoreError, match=r"can't connect|no such export"):
            async with client_of(server.url("web02")):
                raise AssertionError
    with NbdServer("qemu-nbd", "-f", "raw", "-x", "web01", tmp_path / "web01") as server:
        with pytest.raises(StoreError, match="no such export") as caught:
            async with client_of(server.url("web02")):
                raise AssertionError
        assert "web01" in caught.value.hint


@pytest.mark.parametrize(
    "url",
    [
        "nbd:///x",
        "nbd+unix:///x",
        "nbd://h/x?foo=1",
        "nbd://u:p@h/x",
        "nbd://h/x?tls-psk-file=x",
        "nbd://h:0x/",
        "nbd:x",
    ],
)
def test_what_is_no_export_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(PlanError):
        NbdUrl.parse(url)


@pytest.mark.parametrize(
    "url",
    ["nbd://h/", "nbd://h:1/a%20b", "nbds://[::1]/x?tls-certificates=/c", "nbd+unix:///x?socket=/run/s", "nbd://h/a/b"],
)
def test_url_is_what_it_was(url: str) -> None:
    parsed = NbdUrl.parse(url)
    assert NbdUrl.parse(str(parsed)) == parsed
    assert str(parsed) == url


# ---- faults ----------------------------------------------------------------------------------------------------------


async def test_a_failing_sector_is_tried_again(tmp_path: Path, disk: Path) -> None:
    armed = tmp_path / "armed"
    armed.touch()
    arguments = ("--filter=error", "file", disk, "error=EIO", "error-pread-rate=30%", f"error-file={armed}")
    with NbdServer("nbdkit", *arguments) as server:
        async with client_of(server.url(), policy=RetryPolicy(attempts=30)) as client:
            assert await client.read(0, 26 * MiB) == disk.read_bytes()
        async with client_of(server.url(), policy=ONCE) as client:
            with pytest.raises(StoreError, match="I/O error") as caught:
                await client.read(0, 26 * MiB)  # 26 requests: one in 10,000 such reads would work
        assert caught.value.temporary


async def test_a_full_server_is_final(tmp_path: Path) -> None:
    with NbdServer("nbdkit", "--filter=error", "memory", "4M", "error=ENOSPC", "error-pwrite-rate=100%") as server:
        async with client_of(server.url(), policy=RetryPolicy(attempts=6)) as client:
            with pytest.raises(StoreError, match="no space left") as caught:
                await client.write([(0, memoryview(bytes(3 * MiB)))])
            assert not caught.value.temporary
            assert await client.read(0, 512) == bytes(512), "the connection lives on"


async def test_a_killed_server_that_comes_back_is_found_again(disk: Path) -> None:
    with NbdServer("nbdkit", "file", disk) as server:
        async with client_of(server.url(), policy=RetryPolicy(attempts=8)) as client:
            before = await client.read(0, MiB)
            await anyio.to_thread.run_sync(server.restart)
            assert await client.read(0, MiB) == before


async def test_an_export_that_changed_its_size_is_not_taken_for_the_same(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(MiB))
    with NbdServer("nbdkit", "file", image) as server:
        async with client_of(server.url(), policy=RetryPolicy(attempts=4)) as client:
            image.write_bytes(bytes(2 * MiB))
            await anyio.to_thread.run_sync(server.restart)
            with pytest.raises(StoreError, match="another export"):
                await client.read(0, 512)


async def test_a_silent_server_is_given_up() -> None:
    with NbdServer("nbdkit", "--filter=delay", "memory", "4M", "rdelay=60") as server:
        async with client_of(server.url(), patience=Patience(progress_s=0.3)) as client:
            with pytest.raises(StoreError, match="did not answer") as caught:
                await client.read(0, 512)
            assert caught.value.temporary
        server.kill()


async def test_a_cancelled_read_does_not_harm_the_others(disk: Path) -> None:
    """Whoever is cancelled may have been the one that received for all."""
    # Not nbdkit's own delay: it ends at times where a connection is cut while it sleeps.
    network = Network(latency_s=0.01, down_bytes_per_s=100e6)
    with NbdServer("nbdkit", "file", disk) as server:
        async with (
            Link(server.port, network) as link,
            client_of(server.url(port=link.port), policy=RetryPolicy(attempts=5)) as client,
        ):
            got: list[bytes] = []

            async def read(number: int) -> None:
                got.append(await client.read(number * MiB, MiB))

            async with anyio.create_task_group() as tasks:
                with anyio.move_on_after(0.03):
                    await client.read(0, 8 * MiB)
                for number in range(4):
                    tasks.start_soon(read, number)
                with anyio.move_on_after(0.01):
                    await client.read(0, 8 * MiB)
            whole = disk.read_bytes()
            assert sorted(got) == sorted(whole[number * MiB : (number + 1) * MiB] for number in range(4))


# ---- a server that lies ----------------------------------------------------------------------------------------------


def _greeting() -> bytes:
    return wire.GREETING.pack(wire.INIT_MAGIC, wire.OPTION_MAGIC, wire.FIXED_NEWSTYLE | wire.NO_ZEROES)


def _answers(*, size: int = MiB) -> bytes:
    """To STRUCTURED_REPLY, SET_META_CONTEXT and GO."""
    info = wire.ExportInfo(size=size, flags=wire.HAS_FLAGS)
    return (
        wire.pack_option_reply(wire.Opt.STRUCTURED_REPLY, wire.Rep.ACK)
        + wire.pack_option_reply(
            wire.Opt.SET_META_CONTEXT, wire.Rep.META_CONTEXT, struct.pack(">I", 1) + wire.ALLOCATION.encode()
        )
        + wire.pack_option_reply(wire.Opt.SET_META_CONTEXT, wire.Rep.ACK)
        + wire.pack_option_reply(wire.Opt.GO, wire.Rep.INFO, wire.pack_export(info))
        + wire.pack_option_reply(wire.Opt.GO, wire.Rep.ACK)
    )


@contextlib.contextmanager
def lying(said: bytes) -> Iterator[str]:
    """A server that says this to everybody, whatever it is asked."""
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    with peer, contextlib.suppress(OSError):
                        peer.sendall(said)
                        while peer.recv(65536):
                            pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"nbd://127.0.0.1:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        wire.GREETING.pack(wire.INIT_MAGIC, 0x420281861253, 0) + bytes(200),
        wire.GREETING.pack(wire.INIT_MAGIC, wire.OPTION_MAGIC, 0),
        _greeting() + struct.pack(">QIII", wire.REPLY_MAGIC, 8, 1, 2**31),
        _greeting() + struct.pack(">QIII", wire.REPLY_MAGIC, 99, 1, 0),
        _greeting() + b"\xff" * 20,
        _greeting() + _answers(size=2**64 - 1),
        _greeting()
        + _answers().replace(wire.pack_export(wire.ExportInfo(size=MiB, flags=1)), b"\0\0" + bytes(9))
        + bytes(99),
    ],
)
async def test_nonsense_instead_of_a_handshake_is_said_so(said: bytes) -> None:
    with lying(said) as url, anyio.fail_after(10):
        with pytest.raises(StoreError, match=r"no NBD server|can't connect|protocol") as caught:
            async with client_of(url, patience=Patience(connect_s=1.0)):
                raise AssertionError
        assert url in str(caught.value)


def _chunk(kind: int, payload: bytes, *, handle: int = 1, length: int | None = None, done: bool = True) -> bytes:
    return wire.pack_chunk(handle, kind, len(payload) if length is None else length, done=done) + payload


LIES: dict[str, bytes] = {
    "another magic": b"\xff" * 64,
    "an answer to nothing": _chunk(wire.Chunk.NONE, b"", handle=77),
    "data beside the range": _chunk(wire.Chunk.OFFSET_DATA, struct.pack(">Q", 4096) + bytes(512)),
    "data before the range": _chunk(wire.Chunk.OFFSET_DATA, struct.pack(">Q", 0) + bytes(512)),
    "data of 4 GiB": _chunk(wire.Chunk.OFFSET_DATA, struct.pack(">Q", 512), length=2**32 - 1),
    "a hole of 4 GiB": _chunk(wire.Chunk.OFFSET_HOLE, struct.pack(">QI", 512, 2**32 - 1)),
    "too little": _chunk(wire.Chunk.OFFSET_DATA, struct.pack(">Q", 512) + bytes(100)),
    "nothing": _chunk(wire.Chunk.NONE, b""),
    "twice": _chunk(wire.Chunk.OFFSET_DATA, struct.pack(">Q", 512) + bytes(512), done=False) * 2,
    "a block status": _chunk(wire.Chunk.BLOCK_STATUS, struct.pack(">III", 1, 512, 0)),
    "a huge error": _chunk(wire.Chunk.ERROR, b"", length=2**31),
    "an error cut short": _chunk(wire.Chunk.ERROR, struct.pack(">IH", 5, 999)),
    "an unknown chunk": _chunk(77, b""),
    "hole chunks without end": _chunk(wire.Chunk.NONE, b"", done=False) * 70_000,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=list(LIES))
async def test_an_answer_that_breaks_the_protocol_is_an_error(lie: bytes) -> None:
    with lying(_greeting() + _answers() + lie) as url, anyio.fail_after(10):
        async with client_of(url, patience=Patience(connect_s=1.0, progress_s=1.0)) as client:
            with pytest.raises(StoreError, match="breaks the protocol"):
                await client.read(512, 512)


@pytest.mark.parametrize(
    "lie",
    [
        _chunk(wire.Chunk.BLOCK_STATUS, struct.pack(">III", 1, 0, 0)),
        _chunk(wire.Chunk.BLOCK_STATUS, struct.pack(">II", 1, 512)),
        _chunk(wire.Chunk.BLOCK_STATUS, struct.pack(">III", 9, 512, 0)),
        _chunk(wire.Chunk.BLOCK_STATUS, b"", length=2**30),
        _chunk(wire.Chunk.NONE, b""),
    ],
)
async def test_a_block_status_that_makes_no_sense_is_an_error(lie: bytes) -> None:
    with lying(_greeting() + _answers() + lie) as url, anyio.fail_after(10):
        async with client_of(url, patience=Patience(connect_s=1.0, progress_s=1.0)) as client:
            with pytest.raises(StoreError, match=r"breaks the protocol|without a block status"):
                await NbdReader(client).next_data(0)


async def test_a_server_that_knows_only_the_old_options_is_spoken_to() -> None:
    """No structured replies, no GO: the export's name at once, and simple replies."""
    said = (
        wire.GREETING.pack(wire.INIT_MAGIC, wire.OPTION_MAGIC, wire.FIXED_NEWSTYLE)
        + wire.pack_option_reply(wire.Opt.STRUCTURED_REPLY, wire.Rep.ERR_UNSUP)
        + wire.pack_option_reply(wire.Opt.GO, wire.Rep.ERR_UNSUP)
        + wire.EXPORT.pack(MiB, wire.HAS_FLAGS)
        + bytes(wire.EXPORT_ZEROES)
        + wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, 0, 1)
        + b"x" * 512
    )
    with lying(said) as url, anyio.fail_after(10):
        async with client_of(url) as client:
            assert client.info.size == MiB
            assert await client.read(512, 512) == b"x" * 512


async def test_a_server_that_dies_while_many_ask_fails_all_of_them(disk: Path) -> None:
    with NbdServer("nbdkit", "--filter=delay", "file", disk, "rdelay=5") as server:
        async with client_of(server.url()) as client:
            failed: list[StoreError] = []

            async def read(number: int) -> None:
                try:
                    await client.read(number * 4 * KiB, 4 * KiB)
                except StoreError as error:
                    failed.append(error)

            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    for number in range(10):
                        tasks.start_soon(read, number)
                    await anyio.wait_all_tasks_blocked()
                    await anyio.to_thread.run_sync(server.kill)
            assert len(failed) == 10
            assert all(error.temporary for error in failed)
