"""Filesystems made by their own tools, filled and partly emptied; what a copy of their used bytes is held against."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.units import KiB, MiB
from stages.disk.filesystems import map_filesystem
from stages.disk.usage import Refusal, UsedMap
from stages.store.file import open_file_reader

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a filesystem needs root")


def need(*programs: str) -> None:
    """Skip where a program is missing."""
    for program in programs:
        if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
            pytest.skip(f"{program} is not installed")


def run(*command: str | Path, expect: tuple[int, ...] = (0,), text: str | None = None) -> str:
    """Run a tool; its output. Fails the test with that output where the exit code is another one."""
    environment = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, input=text, env=environment, check=False)
    output = done.stdout + done.stderr
    assert done.returncode in expect, f"{' '.join(map(str, command))}: exit {done.returncode}\n{output}"
    return output


def blank(path: Path, size: int) -> Path:
    """A sparse file."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


@contextmanager
def mounted(image: Path, options: str = "loop") -> Iterator[Path]:
    """Mount an image beside itself; unmounted, and its loop device free again, when the block ends."""
    folder = image.with_suffix(".mount")
    folder.mkdir(exist_ok=True)
    run("mount", "-o", options, image, folder)
    try:
        yield folder
    finally:
        run("umount", folder)
        folder.rmdir()


def fill(folder: Path, *, seed: int = 1, scale: int = 1) -> None:
    """Files of many sizes, folders, links and holes; every third file is deleted again."""
    dice = random.Random(seed)
    made: list[Path] = []
    for number in range(60 * scale):
        place = folder / f"folder{number % 7}"
        place.mkdir(exist_ok=True)
        path = place / f"file{number}"
        path.write_bytes(dice.randbytes(dice.choice([0, 1, 700, 5000, 70 * KiB, 700 * KiB])))
        made.append(path)
    big = folder / "big"
    big.write_bytes(dice.randbytes(6 * MiB))
    with (folder / "holes").open("wb") as file:
        for _ in range(20):
            file.seek(dice.randrange(4 * MiB))
            file.write(dice.randbytes(3000))
    run("sync", "-f", folder)
    for path in made[::3]:
        path.unlink()
    with big.open("r+b") as file:
        file.truncate(2 * MiB)
    (folder / "link").symlink_to("big")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "small").write_text("here")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, the target of every link, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


async def map_of(image: Path, *, frozen: bool = False) -> UsedMap | Refusal:
    """Map a filesystem that fills a file."""
    async with open_file_reader(image) as reader:
        return await map_filesystem(reader, 0, reader.size, frozen=frozen)


def copy_used(image: Path, used: UsedMap) -> Path:
    """A sparse file that has the used ranges of the image and nothing else."""
    copy = blank(image.with_suffix(".copy"), used.size)
    with image.open("rb") as source, copy.open("r+b") as target:
        for offset, length in used.ranges():
            source.seek(offset)
            target.seek(offset)
            target.write(source.read(length))
    return copy


def partclone_blocks(kind: str, image: Path) -> int:
    """How many blocks partclone says are in use."""
    log = image.with_suffix(".log")
    program = f"partclone.{kind}"
    environment = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "TERM": "dumb"}
    with Path(os.devnull).open("wb") as sink:
        subprocess.run(
            [program, "-c", "-F", "-f", "0", "-s", image, "-o", "-", "-L", log],
            stdout=sink,
            stderr=sink,
            env=environment,
        )
    match = re.search(r"Space in use:.*= (\d+) Blocks", log.read_text())
    assert match is not None, log.read_text()
    return int(match[1])
