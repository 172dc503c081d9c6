"""read.image: whole disks out of images, from files and servers, without opening what nobody named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from pipeline.errors import FormatError, PlanError, StoreError
from pipeline.events import Event, ImageOpened
from pipeline.flow.items import Block, Content, Why, tiles
from pipeline.flow.stage import SourceInfo, loader_of
from pipeline.units import GiB, KiB, MiB, Size
from stages.read.image import ImageReader, Options
from tests.chains import export, write_toml
from tests.decode.images import mixed_disk, run
from tests.decode.made import made_gce, made_ova
from tests.disks.letters import write_disk
from tests.stores.nginx import WebServer
from tests.stores.ranged import ranged_server
from tests.verify.context import make_context

WINDOW = 2 * MiB
SIZE = 7 * MiB + 512


def qemu(folder: Path, disk: bytes, format: str, *arguments: str, name: str = "image") -> Path:
    (folder / "disk.raw").write_bytes(disk)
    image = folder / f"{name}.{format}"
    run("qemu-img", "convert", "-f", "raw", "-O", format, *arguments, str(folder / "disk.raw"), str(image))
    return image


async def read_all(options: Options, events: list[Event] | None = None) -> tuple[bytes, SourceInfo, list[Block]]:
    """The disk as a run reads it."""
    source = ImageReader(options, make_context("read.image", disk_size=0, events=events))
    try:
        info = await source.open()
        made = bytearray(info.size)
        blocks = [block async for block in source.windows(WINDOW)]
        position = 0
        for block in blocks:
            assert block.offset == position
            assert tiles(block.runs, block.offset, block.length)
            position = block.end
            if any(run.is_data for run in block.runs):
                assert block.offset % WINDOW == 0
                assert block.length == min(WINDOW, info.size - block.offset)
                buffer = memoryview(bytearray(b"\xaa" * WINDOW))
                (await loader_of(source)(block))(buffer)
                made[block.offset : block.end] = buffer[: block.length]
        assert position == info.size
        return bytes(made), info, blocks
    finally:
        await source.close()


@pytest.mark.parametrize(
    "format, arguments",
    [
        ("raw", ()),
        ("qcow2", ()),
        ("qcow2", ("-c", "-o", "cluster_size=512")),
        ("qcow2", ("-c", "-o", "compression_type=zstd,cluster_size=2M")),
        ("vpc", ("-o", "force_size=on")),
        ("vmdk", ("-o", "subformat=streamOptimized")),
        ("vhdx", ()),
    ],
)
async def test_disk_is_what_qemu_put_into_the_image(tmp_path: Path, format: str, arguments: tuple[str, ...]) -> None:
    disk = mixed_disk(SIZE)
    image = qemu(tmp_path, disk, format, *arguments)
    events: list[Event] = []
    name = "vhd" if format == "vpc" else format
    for declared in (name, "auto"):
        read, _, _ = await read_all(Options(path=image, format=declared), events)
        assert read[:SIZE] == disk
        assert not any(read[SIZE:])
    opened = [event for event in events if isinstance(event, ImageOpened)]
    assert [event.format for event in opened] == [name, name]
    assert opened[0].how == "declared"
    assert opened[1].how != "declared"


async def test_archives_are_read_by_ranges(tmp_path: Path) -> None:
    disk = mixed_disk(4 * MiB)
    ova = tmp_path / "web.ova"
    ova.write_bytes(made_ova(qemu(tmp_path, disk, "vmdk", "-o", "subformat=streamOptimized").read_bytes()))
    gce = tmp_path / "web.tar.gz"
    gce.write_bytes(made_gce(disk))
    for path in (ova, gce):
        assert (await read_all(Options(path=path)))[0] == disk


async def test_zeros_are_long_skips_that_cost_nothing(tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk.raw", "A" + "-" * 60 + "B---").read_bytes()
    image = qemu(tmp_path, disk, "qcow2")
    read, info, blocks = await read_all(Options(path=image))
    assert read == disk
    assert info.mapped_bytes == 2 * MiB
    assert len(blocks) == 4, [block.length for block in blocks]
    assert all(run.content is Content.ZERO and run.why is Why.HOLE for run in blocks[1].runs)
    assert blocks[1].length == 58 * MiB


@pytest.mark.parametrize("format, subformat", [("vpc", "fixed,force_size=on"), ("vmdk", "monolithicFlat")])
async def test_holes_of_a_file_are_known_through_what_lies_around_it(
    tmp_path: Path, format: str, subformat: str
) -> None:
    disk = write_disk(tmp_path / "disk.raw", "A" + "-" * 60 + "B---").read_bytes()
    image = qemu(tmp_path, disk, format, "-o", f"subformat={subformat}")
    flat = (str(image.with_name("image-flat.vmdk")),) if format == "vmdk" else ()
    read, info, blocks = await read_all(Options(path=image, extents=flat))
    assert read[: len(disk)] == disk
    assert info.mapped_bytes < 4 * MiB
    assert max(block.length for block in blocks) > 50 * MiB


async def test_replay_begins_at_any_window(tmp_path: Path) -> None:
    disk = mixed_disk(SIZE)
    source = ImageReader(Options(path=qemu(tmp_path, disk, "qcow2")), make_context("read.image", disk_size=0))
    await source.open()
    whole = [(run.offset, run.end) async for block in source.windows(WINDOW) for run in block.runs]
    for start in range(0, SIZE, WINDOW):
        again = [(run.offset, run.end) async for block in source.windows(WINDOW, start) for run in block.runs]
        assert again == [one for one in whole if one[0] >= start]
    await source.close()


# What must not happen


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every path that is opened from now on."""
    opened: list[str] = []
    real: Callable[..., int] = os.open

    def watching(path: Any, *arguments: Any, **more: Any) -> int:
        opened.append(os.fspath(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", watching)
    return opened


async def test_raw_disk_that_begins_like_qcow2_stays_raw_when_declared(tmp_path: Path) -> None:
    """A guest can write any header onto its disk, to be shown files of the host."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"root" * KiB)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(tmp_path / "trap"), "8M")
    disk = (tmp_path / "trap").read_bytes()
    (tmp_path / "disk.raw").write_bytes(disk)
    assert (await read_all(Options(path=tmp_path / "disk.raw", format="raw")))[0] == disk
    with pytest.raises(FormatError, match="backing file"):
        await read_all(Options(path=tmp_path / "disk.raw"))


async def test_block_device_is_never_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = qemu(tmp_path, mixed_disk(MiB), "qcow2")
    monkeypatch.setattr("stages.decode.named.is_block_device", lambda place: True)
    events: list[Event] = []
    read, _, _ = await read_all(Options(path=image), events)
    assert read == image.read_bytes()
    assert [event.format for event in events if isinstance(event, ImageOpened)] == ["raw"]


async def test_backing_file_is_opened_only_when_the_user_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = write_disk(tmp_path / "lower.raw", "ABCD-E")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(lower), "-F", "raw", str(tmp_path / "upper"), "8M")
    commands = ["write -P 7 1M 100k", "write -z 2M 1M", "write -P 9 7M 64k", "write -P 5 1000k 4k"]
    run("qemu-io", *[word for one in commands for word in ("-c", one)], str(tmp_path / "upper"))
    run("qemu-img", "convert", "-O", "raw", str(tmp_path / "upper"), str(tmp_path / "flat.raw"))
    moved = lower.rename(tmp_path / "moved.raw")
    lower.write_bytes(b"never me" * MiB)

    opened = watched(monkeypatch)
    with pytest.raises(FormatError, match="backing file") as caught:
        await read_all(Options(path=tmp_path / "upper", format="qcow2"))
    assert "--backing" in caught.value.hint
    options = Options(path=tmp_path / "upper", format="qcow2", backing=(str(moved),), backing_format="raw")
    read, info, _ = await read_all(options)
    assert read == (tmp_path / "flat.raw").read_bytes()
    assert info.identity["backing"] == str(moved)
    assert str(lower) not in opened


async def test_chain_of_overlays_reads_as_qemu_reads_it(tmp_path: Path) -> None:
    write_disk(tmp_path / "0.raw", "ABCDEF")
    lower, format = tmp_path / "0.raw", "raw"
    for number in (1, 2):
        upper = tmp_path / f"{number}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(lower), "-F", format, str(upper), f"{6 + number}M")
        run("qemu-io", "-c", f"write -P {number} {number}M 200k", "-c", f"write -z {number + 2}M 128k", str(upper))
        lower, format = upper, "qcow2"
    run("qemu-img", "convert", "-O", "raw", str(lower), str(tmp_path / "flat.raw"))
    backing = (str(tmp_path / "1.qcow2"), str(tmp_path / "0.raw"))
    read, _, _ = await read_all(Options(path=lower, backing=backing))
    assert read == (tmp_path / "flat.raw").read_bytes()


async def test_backing_image_for_an_image_without_one_is_refused(tmp_path: Path) -> None:
    image = qemu(tmp_path, mixed_disk(MiB), "qcow2")
    with pytest.raises(FormatError, match="has none"):
        await read_all(Options(path=image, backing=(str(image),)))
    with pytest.raises(FormatError, match="not read with a backing image"):
        await read_all(Options(path=tmp_path / "disk.raw", format="raw", backing=(str(image),)))


async def test_extents_are_opened_only_when_the_user_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mixed_disk(SIZE)
    image = qemu(tmp_path, disk, "vmdk", "-o", "subformat=monolithicFlat")
    opened = watched(monkeypatch)
    with pytest.raises(FormatError, match="other files") as caught:
        await read_all(Options(path=image))
    assert "image-flat.vmdk" in caught.value.hint
    assert not any("flat" in path for path in opened)
    read, _, _ = await read_all(Options(path=image, extents=(str(tmp_path / "image-flat.vmdk"),)))
    assert read[:SIZE] == disk


def test_options_want_one_place_and_a_known_format() -> None:
    with pytest.raises(ValueError, match="either path"):
        Options()
    with pytest.raises(ValueError, match="either path"):
        Options(path=Path("a"), url="s3://b/c")
    with pytest.raises(ValueError, match='format: "qed" is not one of'):
        Options(path=Path("a"), format="qed")
    with pytest.raises(ValueError, match="backing_format"):
        Options(path=Path("a"), backing_format="x")


async def test_what_is_not_there_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        await read_all(Options(path=tmp_path / "none"))
    with pytest.raises(PlanError, match="nothing is stored under gopher"):
        await read_all(Options(url="gopher://a/b"))


# Whole runs


@pytest.mark.parametrize("fuse", [True, False])
async def test_run_from_an_image_verifies_against_the_image(tmp_path: Path, fuse: bool) -> None:
    image = qemu(tmp_path, mixed_disk(20 * MiB), "qcow2", "-c")
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.image; path = "{image}"; format = "qcow2"',
        "checksum.guest",
        "sparse.zeros",
        "encode.vmdk",
        f'write.file; path = "{tmp_path / "out.vmdk"}"',
        "verify.readback",
    )
    outcome = await export(toml, fuse=fuse)
    assert outcome.state == "identical"
    assert outcome.manifest.disk.identity["format"] == "qcow2"
    run("qemu-img", "compare", "-f", "qcow2", "-F", "vmdk", str(image), str(tmp_path / "out.vmdk"))


async def test_memory_of_the_source_counts(tmp_path: Path) -> None:
    image = qemu(tmp_path, mixed_disk(MiB), "qcow2")
    stages = (f'read.image; path = "{image}"', "encode.raw", "write.null")
    with pytest.raises(PlanError, match="by itself") as caught:
        await export(write_toml(tmp_path / "export.toml", *stages, memory="32 MiB"))
    assert "60 MiB" in caught.value.hint
    assert (await export(write_toml(tmp_path / "export.toml", *stages, memory="60 MiB"))).disk_size == MiB


async def test_only_what_is_stored_is_fetched(tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk.raw", "A" + "-" * 30 + "B").read_bytes()
    image = qemu(tmp_path, disk, "qcow2")
    with ranged_server(disk=image.read_bytes()) as server:
        assert (await read_all(Options(url=f"{server.url}/disk", format="qcow2")))[0] == disk
        assert server.sent_bytes < 3 * MiB
        secret = Options(url=f"{server.url.replace('//', '//u:pw@')}/disk?sig=deadbeef", format="qcow2")
        _, info, _ = await read_all(secret)
        assert "deadbeef" not in str(info.identity)
        assert "pw@" not in str(info.identity)
        assert info.identity["etag"]


async def test_rate_limit_holds_for_what_is_fetched(tmp_path: Path) -> None:
    disk = mixed_disk(8 * MiB)
    image = qemu(tmp_path, disk, "qcow2", "-c")
    raw = tmp_path / "disk.raw"
    for path, format in ((image, "qcow2"), (raw, "raw")):
        context = make_context("read.image", disk_size=0)
        source = ImageReader(Options(path=path, rate_limit=Size(MiB), format=format), context)
        await source.open()
        for block in [block async for block in source.windows(WINDOW)]:
            await loader_of(source)(block)
        await source.close()
        # The clock only moves while something waits for its turn: the last window of 2 MiB makes nobody wait.
        seconds = path.stat().st_size / MiB
        assert seconds - 3 < context.clock.now() < seconds + 2


async def test_slowed_file_still_knows_its_holes(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk.raw", "A------B")
    options = Options(path=tmp_path / "disk.raw", format="raw", rate_limit=Size(GiB))
    assert (await read_all(options))[1].mapped_bytes == 2 * MiB


async def test_server_with_a_certificate_of_its_own_is_trusted_where_the_user_says(
    tmp_path: Path, web_server: WebServer
) -> None:
    disk = mixed_disk(4 * MiB)
    (web_server.data / "open" / "ca.qcow2").write_bytes(qemu(tmp_path, disk, "qcow2").read_bytes())
    url = web_server.url("open/ca.qcow2", scheme="https")
    with pytest.raises(StoreError, match="certificate"):
        await read_all(Options(url=url))
    assert (await read_all(Options(url=url, ca_file=web_server.ca_file)))[0] == disk


async def test_fetching_ends_at_once_when_it_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread waits for the network: a dead server must not hold a cancelled run."""
    image = qemu(tmp_path, mixed_disk(4 * MiB), "qcow2")
    source = ImageReader(Options(path=image), make_context("read.image", disk_size=0))
    await source.open()
    blocks = [block async for block in source.windows(WINDOW)]

    async def stuck(offset: int, length: int) -> Any:
        await anyio.sleep_forever()

    monkeypatch.setattr(source._opened, "fetch", stuck)
    with anyio.fail_after(5):
        with anyio.move_on_after(0.01) as scope:
            await source.fetch(blocks[0])
    assert scope.cancelled_caught
    await source.close()
    await source.close()
