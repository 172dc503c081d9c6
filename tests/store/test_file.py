"""The file reader: exact ranges, honest ends, and what is no file."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import pytest

from pipeline.errors import FormatError, StoreError
from pipeline.units import MiB
from stages.store.file import local_path, open_file_reader


async def test_ranges_come_back_exactly_also_many_at_once(tmp_path: Path) -> None:
    content = os.urandom(3 * MiB)
    path = tmp_path / "image.raw"
    path.write_bytes(content)
    found: dict[int, bytes] = {}
    async with open_file_reader(path) as reader:
        assert reader.size == len(content)
        assert await reader.read(len(content), 0) == b""

        async def read(offset: int) -> None:
            found[offset] = await reader.read(offset, 100_000)

        async with anyio.create_task_group() as tasks:
            for offset in range(0, 2 * MiB, 65_537):
                tasks.start_soon(read, offset)
    assert all(content[offset : offset + 100_000] == data for offset, data in found.items())


async def test_a_range_behind_the_end_is_an_error_never_zeros(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(b"x" * 1000)
    async with open_file_reader(path) as reader:
        for offset, length in ((999, 2), (1000, 1), (1 << 40, 1)):
            with pytest.raises(FormatError, match="ends early"):
                await reader.read(offset, length)


async def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(b"x" * 1000)
    async with open_file_reader(path) as reader:
        os.truncate(path, 500)
        with pytest.raises(FormatError, match="ends early") as caught:
            await reader.read(400, 200)
    assert caught.value.context["got"] == 100


async def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "pipe", "."):
        with anyio.fail_after(5):
            with pytest.raises(StoreError) as caught:
                async with open_file_reader(tmp_path / name):
                    pass
        assert caught.value.context["path"] == tmp_path / name
        assert not caught.value.temporary


async def test_the_descriptor_is_closed_again(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(b"x")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyError):
        async with open_file_reader(path):
            raise KeyError
    assert len(set(os.listdir("/proc/self/fd"))) == len(before)


async def test_the_first_data_behind_an_offset_is_found(tmp_path: Path) -> None:
    path = tmp_path / "sparse.raw"
    path.touch()
    os.truncate(path, 8 * MiB)
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"x" * MiB, 4 * MiB)
    os.close(fd)
    async with open_file_reader(path) as reader:
        assert await reader.next_data(0) == range(4 * MiB, 5 * MiB)
        assert await reader.next_data(4 * MiB + 4096) == range(4 * MiB + 4096, 5 * MiB)
        assert await reader.next_data(6 * MiB) is None
        assert await reader.next_data(8 * MiB) is None


def test_file_urls_and_paths_name_the_same_file() -> None:
    assert local_path("file:///srv/my%20images/a.qcow2") == Path("/srv/my images/a.qcow2")
    assert local_path("images/100%25.raw") == Path("images/100%25.raw")
    assert local_path(Path("a.raw")) == Path("a.raw")
