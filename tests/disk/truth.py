"""What the kernel says about a mounted tree, and what our readers say: name by name, both in one form."""

from __future__ import annotations

import os
import random
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.units import KiB, MiB
from stages.disk.files.opening import open_tree
from stages.disk.live import LiveView
from stages.disk.reading import CachedReader, Window
from stages.disk.tree import FileTree, Kind
from stages.store.file import open_file_reader
from tests.disk.making import run

_CHUNK = 3 * MiB + 77  # odd, so that reads begin and end inside of blocks


@dataclass(frozen=True, slots=True)
class Seen:
    """All that is compared of a file. `content` is a digest, a target, or empty."""

    kind: Kind
    mode: int
    uid: int
    gid: int
    size: int
    modified_s: int
    immutable: bool | None
    append_only: bool | None
    content: str


async def seen_by_kernel(folder: Path) -> dict[str, Seen]:
    """Every name below a mounted folder, and "" for the folder itself."""
    found = {}
    view = LiveView(folder)
    for path in ["", *(str(one.relative_to(folder)) for one in sorted(folder.rglob("*")))]:
        node = await view.stat("/" + path, follow=False)
        content = ""
        if node.kind is Kind.LINK:
            content = os.readlink(folder / path)
        elif node.kind is Kind.FILE:
            content = _digest(folder / path)
        found[path] = _seen(node, content)
    return found


def _digest(path: Path) -> str:
    made = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(4 * MiB):
            made.update(data)
    return made.hexdigest()


def _seen(node: object, content: str) -> Seen:
    values = {name: getattr(node, name) for name in Seen.__slots__ if name != "content"}
    if values["kind"] is Kind.DIRECTORY:
        values["size"] = 0  # of no meaning, and not the same from one kernel to the next
    if values["kind"] not in (Kind.FILE, Kind.DIRECTORY):
        values["immutable"] = values["append_only"] = None  # the kernel does not tell of all
    return Seen(**values, content=content)


async def seen_by_us(tree: FileTree, number: int | None = None) -> dict[str, Seen]:
    """The same, walked by our reader."""
    found: dict[str, Seen] = {}
    waiting = [("", tree.root if number is None else number)]
    while waiting:
        path, inode = waiting.pop()
        node = await tree.node(inode)
        content = ""
        if node.kind is Kind.LINK:
            content = await tree.target(inode)
        elif node.kind is Kind.FILE:
            content = await digest_of(tree, inode, node.size)
        elif node.kind is Kind.DIRECTORY:
            for one in await tree.entries(inode):
                below = await tree.node(one.number)
                assert one.kind in (below.kind, Kind.UNKNOWN), (path, one)
                assert await tree.lookup(inode, one.name) == one.number
                waiting.append((f"{path}/{one.name}".lstrip("/"), one.number))
        assert path not in found
        found[path] = _seen(node, content)
    return found


async def digest_of(tree: FileTree, inode: int, size: int) -> str:
    """A digest of a file, read in parts."""
    made = xxhash.xxh3_128()
    for offset in range(0, size, _CHUNK):
        made.update(await tree.read(inode, offset, _CHUNK))
    assert await tree.read(inode, size, 100) == b""
    return made.hexdigest()


def difference(ours: dict[str, Seen], truth: dict[str, Seen]) -> list[str]:
    """What differs, in words; empty where nothing does."""
    found = [f"missing: {path}" for path in truth.keys() - ours.keys()]
    found += [f"too much: {path}" for path in ours.keys() - truth.keys()]
    found += [
        f"{path}: {name} is {getattr(ours[path], name)}, should be {getattr(truth[path], name)}"
        for path in ours.keys() & truth.keys()
        for name in Seen.__slots__
        if getattr(ours[path], name) != getattr(truth[path], name)
    ]
    return sorted(found)


@asynccontextmanager
async def opened(image: Path, offset: int = 0, length: int | None = None) -> AsyncIterator[FileTree]:
    """The filesystem in an image, by our reader, as a disk's reader opens it."""
    async with open_file_reader(image) as reader:
        size = reader.size - offset if length is None else length
        yield await open_tree(Window(CachedReader(reader), offset, size))


def populate(folder: Path, *, names: int = 300, flags: bool = True, seed: int = 1) -> None:
    """A tree with something of everything: sizes, holes, fragments, links, devices, owners, times, flags, odd names."""
    dice = random.Random(seed)
    for size in (0, 1, 59, 60, 61, 100, 159, 160, 161, 500, 4095, 4096, 4097, 12 * 4096, 12 * 4096 + 1, 300 * KiB):
        (folder / f"size{size}").write_bytes(dice.randbytes(size))
    (folder / "large").write_bytes(dice.randbytes(5 * MiB))
    many = folder / "many"
    many.mkdir()
    for number in range(names):
        (many / f"a name that is not so short, number {number}").touch()
    for number in range(0, names, 3):
        (many / f"a name that is not so short, number {number}").unlink()
    (many / ("x" * 255)).write_text("long")
    odd = folder / "odd"
    odd.mkdir()
    for raw in ("späße 😀".encode(), b"caf\xe9", b"new\nline", b"back\\slash", b" ", b"\x01", b"..."):
        (odd / os.fsdecode(raw)).write_bytes(raw)
    holes = folder / "holes"
    with holes.open("wb") as file:
        for place in (0, 100 * KiB, 5 * MiB, 40 * MiB + 77, 90 * MiB):
            file.seek(place)
            file.write(dice.randbytes(dice.randrange(1, 9000)))
        file.truncate(91 * MiB)
    with (folder / "sieve").open("wb") as file:
        for number in range(1500):
            file.seek(number * 8 * KiB)
            file.write(dice.randbytes(4 * KiB))
    # Fragments: two files that grow in turn.
    with (folder / "left").open("wb") as left, (folder / "right").open("wb") as right:
        for _ in range(150):
            for file in (left, right):
                file.write(dice.randbytes(4096))
                file.flush()
    with (folder / "punched").open("wb") as file:
        file.write(dice.randbytes(3 * MiB))
    # Not every filesystem can; the files are there all the same.
    run("fallocate", "--punch-hole", "-o", "8192", "-l", "1M", folder / "punched", expect=(0, 1))
    run("fallocate", "-l", "300K", folder / "reserved", expect=(0, 1))
    with (folder / "reserved").open("r+b") as reserved:
        reserved.seek(50000)
        reserved.write(b"written")
    links = folder / "links"
    links.mkdir()
    for length in (1, 20, 58, 59, 60, 61, 100, 159, 160, 500, 900, 2000, 4000):
        with suppress(OSError):  # as long as a block, or 1 KiB, is the most that some take
            (links / f"link{length}").symlink_to("t" * length)
    (links / "odd").symlink_to(os.fsdecode(b"/caf\xe9"))
    os.link(folder / "large", links / "hard")
    deep = folder
    for number in range(20):
        deep = deep / f"deep{number}"
        deep.mkdir()
    (deep / "bottom").write_text("here")
    special = folder / "special"
    special.mkdir()
    os.mkfifo(special / "fifo")
    os.mknod(special / "character", stat.S_IFCHR | 0o620, os.makedev(5, 1))
    os.mknod(special / "block", stat.S_IFBLK | 0o660, os.makedev(8, 1))
    for mode in (0o000, 0o400, 0o640, 0o4755, 0o2755, 0o1777, 0o7777):
        path = special / f"mode{mode:o}"
        path.write_text("x")
        os.chown(path, 1000, 70000)
        path.chmod(mode)
    os.chown(special / "mode640", 4000000000, 4000000001)
    for when in (0, 1, 1_000_000_000, (1 << 31) - 1):
        path = special / f"time{when}"
        path.touch()
        os.utime(path, (when, when))
    if flags:
        for name, flag in (("immutable", "+i"), ("append", "+a")):
            (special / name).write_text("flag")
            run("chattr", flag, special / name)
        (special / "folder").mkdir()
        run("chattr", "+i", special / "folder")
    subprocess.run(["sync", "-f", folder], check=True)
