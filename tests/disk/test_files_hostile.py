"""Filesystems that real tools made and that were then changed: always an answer or one of our errors, soon, bounded."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from awscrt.checksums import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import FormatError
from pipeline.units import KiB, MiB
from stages.disk.ext import raw_crc32c
from stages.disk.files.opening import open_tree
from stages.disk.reading import CachedReader, Window
from stages.disk.tree import FileTree, HasSubvolumes, Kind
from stages.disk.view import DiskView, open_system
from stages.disk.volumes import open_volumes
from tests.disk.making import blank, mounted, need, needs_root, run
from tests.disk.memory import Memory
from tests.disk.test_view import SYSTEM, write

NODE = 16 * KiB
# A walk gives up here: a hostile tree may have more of everything than anybody wants to see.
NAMES_MAX = 3000
BYTES_MAX = 32 * MiB


def _fill(folder: Path) -> None:
    """Folders of every form, fragments, links."""
    dice = random.Random(2)
    write(folder, {**SYSTEM, "etc/fstab": "/dev/sda1 / auto\nLABEL=x /x auto\n"})
    (folder / "many").mkdir()
    for number in range(200):
        (folder / "many" / f"a name that takes some room {number}").touch()
    for name, size in (("small", 30), ("middle", 5000), ("large", 2 * MiB)):
        (folder / name).write_bytes(dice.randbytes(size))
    with (folder / "sieve").open("wb") as file:
        for number in range(300):
            file.seek(number * 8 * KiB)
            file.write(dice.randbytes(4 * KiB))
    (folder / "packed").write_bytes(b"word " * 50000)
    (folder / "link").symlink_to("middle")
    (folder / "long").symlink_to("t" * 300)


def _by_mount(*command: str) -> Callable[[Path], None]:
    def make(image: Path) -> None:
        run(*command, image)
        options = "loop,compress-force=lzo" if command[0] == "mkfs.btrfs" else "loop"
        with mounted(image, options) as folder:
            _fill(folder)

    return make


def _fat(image: Path) -> None:
    run("mkfs.fat", "-F", "16", "-s", "2", image)
    tree = image.with_suffix(".tree")
    write(tree, {"EFI/BOOT/BOOTX64.EFI": "x" * 50000, **{f"many/a long name {number}": "" for number in range(100)}})
    run("mcopy", "-s", "-i", image, *sorted(tree.iterdir()), "::/")


MAKERS: dict[str, tuple[Callable[[Path], None], int]] = {
    "ext2": (_by_mount("mke2fs", "-q", "-F", "-t", "ext2", "-b", "1024"), 24 * MiB),
    "ext4": (_by_mount("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^metadata_csum,inline_data", "-b", "1024"), 24 * MiB),
    "ext4 with checksums": (_by_mount("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024"), 24 * MiB),
    "xfs": (_by_mount("mkfs.xfs", "-q", "-f"), 320 * MiB),
    "btrfs": (_by_mount("mkfs.btrfs", "-q", "-f", "-m", "single"), 120 * MiB),
    "fat": (_fat, 24 * MiB),
}


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Memory]:
    """Filesystems by name, each made once."""
    made: dict[str, Memory] = {}

    def get(name: str) -> Memory:
        if name not in made:
            maker, size = MAKERS[name]
            need("mke2fs", "mkfs.xfs", "mkfs.btrfs", "mkfs.fat", "mcopy")
            image = blank(tmp_path_factory.mktemp("hostile") / "image", size)
            maker(image)
            made[name] = Memory.of(image)
            image.unlink()
        return made[name].clone()

    return get


def _sound_again(name: str, disk: Memory, offset: int) -> None:
    """Make the checksums right that cover a changed byte, so that what lies behind them is tested too."""
    if name == "btrfs":
        node = offset // NODE * NODE
        if 64 * KiB <= offset < 68 * KiB:
            disk.write(64 * KiB, struct.pack("<I", crc32c(disk.peek(64 * KiB + 32, 4096 - 32))))
        elif offset >= MiB and disk.peek(node + 32, 16) == disk.peek(64 * KiB + 32, 16):
            disk.write(node, struct.pack("<I", crc32c(disk.peek(node + 32, NODE - 32))))
    elif name == "xfs":
        inode, block = offset // 512 * 512, offset // 4096 * 4096
        if disk.peek(inode, 2) == b"IN":
            _xfs_sound(disk, inode, 512, 100)
        elif offset < 512:
            _xfs_sound(disk, 0, 512, 224)
        for magics, at in (((b"XDB3", b"XDD3"), 4), ((b"BMA3",), 64), ((b"XSLM",), 12)):
            if disk.peek(block, 4) in magics:
                _xfs_sound(disk, block, 4096, at)
    elif name == "ext4 with checksums" and 1024 <= offset < 2048:
        disk.write(2044, struct.pack("<I", raw_crc32c(0xFFFFFFFF, disk.peek(1024, 1020))))


def _xfs_sound(disk: Memory, start: int, length: int, at: int) -> None:
    disk.write(start + at, bytes(4))
    disk.write(start + at, struct.pack("<I", crc32c(disk.peek(start, length))))


async def _walk(tree: FileTree) -> int:
    """Look at everything as a curious person would; returns how many names there were. Raises only our errors."""
    names = total = 0
    waiting = [tree.root]
    seen = set(waiting)
    while waiting and names < NAMES_MAX and total < BYTES_MAX:
        number = waiting.pop()
        try:
            entries = await tree.entries(number)
        except (FormatError, OSError):
            continue
        for one in entries[:NAMES_MAX]:
            names += 1
            try:
                node = await tree.node(one.number)
                if node.kind is Kind.DIRECTORY and one.number not in seen:
                    seen.add(one.number)
                    waiting.append(one.number)
                elif node.kind is Kind.FILE:
                    for offset in {0, node.size // 2, max(0, node.size - 70 * KiB)}:
                        total += len(await tree.read(one.number, offset, 70 * KiB))
                elif node.kind is Kind.LINK:
                    await tree.target(one.number)
            except (FormatError, OSError):
                continue
    return names


VALUES = (0, 1, 2, *((1 << bits) + less for bits in (7, 8, 15, 16, 31, 32, 63, 64) for less in (0, -1)))


def _places(disk: Memory) -> list[int]:
    """Blocks that hold metadata, as far as one can tell from outside; of data there is too much to hit anything."""
    found = []
    for block in disk.filled():
        data = disk.peek(block, 4096)
        if len(set(data)) < 200:
            found.append(block)
    return found


@needs_root
@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_any_change_gives_an_answer_or_our_error(
    name: str, disks: Callable[[str], Memory], data: st.DataObject
) -> None:
    await _change(name, disks(name), data)


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_many_more_changes_give_an_answer_or_our_error(
    name: str, disks: Callable[[str], Memory], data: st.DataObject
) -> None:
    await _change(name, disks(name), data)


async def _change(name: str, disk: Memory, data: st.DataObject) -> None:
    """Change some bytes and look at everything."""
    blocks = _places(disk)
    for _ in range(data.draw(st.integers(1, 6))):
        block = data.draw(st.sampled_from(blocks[:5] if data.draw(st.integers(0, 3)) == 0 else blocks))
        offset = block + data.draw(st.integers(0, 4095))
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        value = data.draw(st.one_of(st.sampled_from(VALUES), st.integers(0, (1 << 64) - 1))) & ((1 << 8 * width) - 1)
        disk.write(offset, value.to_bytes(width, data.draw(st.sampled_from(["little", "big"]))))
        _sound_again(name, disk, offset)
    begun = time.process_time()
    try:
        tree = await open_tree(Window(CachedReader(disk), 0, disk.size))
    except FormatError:
        return
    await _walk(tree)
    try:
        await tree.space()
        if isinstance(tree, HasSubvolumes):
            await tree.subvolumes()
    except FormatError:
        pass
    assert time.process_time() - begun < 20
    assert disk.bytes_read < 1500 * MiB


@needs_root
@pytest.mark.parametrize("name", MAKERS)
async def test_unchanged_everything_is_read(name: str, disks: Callable[[str], Memory]) -> None:
    """So that the changes above start from something that works; and a walk costs little."""
    disk = disks(name)
    tree = await open_tree(Window(CachedReader(disk), 0, disk.size))
    assert await _walk(tree) >= 100
    if name == "fat":
        return
    view = await open_system(await open_volumes(disk))
    assert await view.read("/etc/os-release") == b"ID=test\n"


@needs_root
async def test_files_and_folders_of_absurd_sizes_take_no_memory(disks: Callable[[str], Memory]) -> None:
    disk = disks("ext2")
    plain = await open_tree(CachedReader(disk))
    many = await plain.lookup(plain.root, "many")
    sparse = await plain.lookup(plain.root, "sieve")
    per_group = struct.unpack("<I", disk.peek(1024 + 40, 4))[0]
    for number in (many, sparse):
        group, index = divmod(number - 1, per_group)
        table = struct.unpack("<I", disk.peek(2048 + 32 * group + 8, 4))[0]
        disk.write(table * 1024 + index * 256 + 4, b"\xff" * 4)
        disk.write(table * 1024 + index * 256 + 108, struct.pack("<I", 0xFFFF))
    tree = await open_tree(CachedReader(disk))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="larger than any real one"):
            await tree.entries(many)
        assert (await tree.node(sparse)).size > 1 << 47
        assert await tree.read(sparse, 1 << 46, 5000) == bytes(5000)
        view = DiskView(tree)
        with pytest.raises(OSError, match="too large"):
            await view.read("/sieve")
        assert tracemalloc.get_traced_memory()[1] < 4 * MiB
    finally:
        tracemalloc.stop()


@needs_root
async def test_a_folder_that_is_its_own_parent_and_child_is_bounded_by_the_path(disks: Callable[[str], Memory]) -> None:
    """A name of the root folder that means the root itself."""
    disk = disks("ext2")
    tree = await open_tree(CachedReader(disk))
    block = next(at for at in disk.filled() if all(word in disk.peek(at, 4096) for word in (b"middle", b"lost+found")))
    at = block + disk.peek(block, 4096).index(b"middle") - 8
    disk.write(at, struct.pack("<I", tree.root))
    disk.write(at + 7, b"\x02")
    view = DiskView(await open_tree(CachedReader(disk)))
    assert await view.resolve("/middle/middle/etc") == "/middle/middle/etc"
    with pytest.raises(OSError, match="too long"):
        await view.list("/middle" * 300)
