from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import PlanError, SourceError
from pipeline.events import Event, FallbackTaken
from pipeline.flow.buffers import Ledger, Pool
from pipeline.flow.facts import Facts
from pipeline.flow.items import Block, Why, tiles
from pipeline.flow.meter import StageMeter
from pipeline.flow.stage import Progress, StageContext
from pipeline.units import KiB, MiB, TiB
from stages.read.disk import DiskReader, Options
from tests.disks.letters import write_disk

WINDOW = 2 * MiB


def reader(path: Path, events: list[Event] | None = None) -> DiskReader:
    context = StageContext(
        name="read.disk",
        emit=(events if events is not None else []).append,
        facts=Facts(),
        progress=Progress(),
        meter=StageMeter("read.disk"),
        ledger=Ledger(0),
        threads=anyio.CapacityLimiter(4),
        workers=4,
    )
    return DiskReader(Options(path=path), context)


async def read_all(path: Path, start: int = 0) -> tuple[list[Block], bytes]:
    """Every block of the map, and the bytes from `start` as blocks and skips describe them."""
    source = reader(path)
    info = await source.open()
    pool = Pool(WINDOW, 1)
    blocks, content = [], bytearray()
    async for block in source.windows(WINDOW, start):
        blocks.append(block)
        assert tiles(block.runs, block.offset, block.length)
        if any(run.is_data for run in block.runs):
            lease = await pool.lease()
            lease.buffer[:] = b"\xee" * WINDOW
            source.load(block, lease.buffer)
            content += lease.buffer[: block.length]
            lease.release()
        else:
            content += bytes(block.length)
    await source.close()
    assert start + len(content) == info.size
    return blocks, bytes(content)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    letters=st.text("AB0-", min_size=0, max_size=40),
    tail=st.integers(0, 9000),
    block=st.sampled_from([4096, 65536, MiB]),
)
async def test_blocks_tile_the_disk_and_hold_its_bytes(tmp_path: Path, letters: str, tail: int, block: int) -> None:
    if not letters and not tail:
        letters = "A"
    path = write_disk(tmp_path / "disk", letters, block, tail)
    blocks, content = await read_all(path)
    assert content == path.read_bytes()
    position = 0
    for one in blocks:
        assert one.offset == position
        assert one.offset % WINDOW == 0
        assert one.length <= WINDOW or not any(run.is_data for run in one.runs)
        position = one.end


async def test_map_can_start_at_any_window(tmp_path: Path) -> None:
    path = write_disk(tmp_path / "disk", "AB--0A----B-A", MiB, 700)
    whole = path.read_bytes()
    for start in range(0, len(whole), WINDOW):
        _, content = await read_all(path, start)
        assert content == whole[start:]


async def test_two_tebibytes_of_hole_are_one_skip(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.truncate(2 * TiB)
        file.seek(TiB + 5 * MiB)
        file.write(b"x" * 4096)
    source = reader(path)
    info = await source.open()
    blocks = [block async for block in source.windows(WINDOW)]
    await source.close()
    assert info.mapped_bytes <= 64 * KiB
    assert [(block.offset, block.length) for block in blocks] == [
        (0, TiB + 4 * MiB),
        (TiB + 4 * MiB, WINDOW),
        (TiB + 6 * MiB, TiB - 6 * MiB),
    ]
    assert {run.why for run in blocks[1].runs} == {Why.READ, Why.HOLE}


@pytest.fixture
def loop_device(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, bytes]]:
    """A loop device over a small disk with the sector size of the parameter."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    backing = write_disk(tmp_path / "backing", "AB0A", MiB)
    device = subprocess.run(
        ["losetup", "-f", "--show", "-r", "-b", str(request.param), backing], check=True, capture_output=True, text=True
    ).stdout.strip()
    yield Path(device), backing.read_bytes()
    subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.parametrize("loop_device", [512, 4096], indirect=True)
async def test_block_device_is_read_whole(loop_device: tuple[Path, bytes]) -> None:
    device, content = loop_device
    source = reader(device)
    info = await source.open()
    await source.close()
    assert info.identity["kind"] == "block device"
    assert info.sector_size in (512, 4096)
    assert source._alignment >= info.sector_size
    _, got = await read_all(device)
    assert got == content


@pytest.mark.parametrize("loop_device", [4096], indirect=True)
async def test_direct_io_takes_the_alignment_of_the_sectors(loop_device: tuple[Path, bytes]) -> None:
    source = reader(loop_device[0])
    await source.open()
    assert source._alignment == 4096
    await source.close()


async def test_filesystem_without_direct_io_is_read_buffered_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_disk(tmp_path / "disk", "AB", MiB)
    real = os.open

    def refusing(name: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(name, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    events: list[Event] = []
    source = reader(path, events)
    await source.open()
    assert [event.what for event in events if isinstance(event, FallbackTaken)] == [
        "buffered reads instead of O_DIRECT"
    ]
    await source.close()
    _, content = await read_all(path)
    assert content == path.read_bytes()


async def test_source_that_shrinks_is_an_error_with_its_offset(tmp_path: Path) -> None:
    path = write_disk(tmp_path / "disk", "ABAB", MiB)
    source = reader(path)
    await source.open()
    blocks = [block async for block in source.windows(WINDOW)]
    os.truncate(path, 3 * MiB)
    lease = await Pool(WINDOW, 1).lease()
    with pytest.raises(SourceError, match="shorter than it said") as caught:
        source.load(blocks[1], lease.buffer)
    assert caught.value.context["offset"] == 3 * MiB
    await source.close()


async def test_read_error_names_the_first_bad_sector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_disk(tmp_path / "disk", "ABAB", MiB)
    source = reader(path)
    await source.open()
    blocks = [block async for block in source.windows(WINDOW)]
    real = os.preadv
    bad = 2 * MiB + 300 * KiB

    def failing(fd: int, buffers: Any, offset: int) -> int:
        if offset <= bad < offset + buffers[0].nbytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    lease = await Pool(WINDOW, 1).lease()
    with pytest.raises(SourceError, match="could not be read") as caught:
        source.load(blocks[1], lease.buffer)
    assert caught.value.context["offset"] == bad
    await source.close()


@pytest.mark.parametrize(
    "name, message",
    [("absent", "No such file"), (".", "neither a block device nor a file"), ("/dev/null", "neither")],
)
async def test_what_is_no_disk_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        await reader(tmp_path / name).open()


async def test_source_is_opened_read_only(tmp_path: Path) -> None:
    path = write_disk(tmp_path / "disk", "A", MiB)
    source = reader(path)
    await source.open()
    for fd in (source._fd, source._map_fd):
        flags = Path(f"/proc/self/fdinfo/{fd}").read_text()
        assert int(flags.split("flags:")[1].split()[0], 8) & os.O_ACCMODE == os.O_RDONLY
    await source.close()


async def test_file_that_is_cut_short_is_never_taken_for_a_hole(tmp_path: Path) -> None:
    """SEEK_DATA says the same for both."""
    path = write_disk(tmp_path / "disk", "ABAB", MiB)
    source = reader(path)
    await source.open()
    os.truncate(path, 2 * MiB)
    with pytest.raises(SourceError, match="shorter than it said"):
        async for _ in source.windows(WINDOW, WINDOW):
            pass
    await source.close()
