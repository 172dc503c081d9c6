"""The disks that the cases read, built once into a cache folder: `python -m perf.disks NAME...` or `all`.

The folder is `$PIPELINE_PERF_CACHE`, else `.cache/perf` in the project. A JSON file beside each says what is in it.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One disk of the cache. `build` writes the image to a path that does not exist yet."""

    name: str
    summary: str
    build: Callable[[Path], None]

    @property
    def path(self) -> Path:
        return cache_folder() / f"{self.name}.raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What is in an image. Sizes are bytes."""

    size: int
    allocated: int
    extents: int
    nonzero_4k: int
    """Bytes in aligned 4 KiB blocks that hold anything but zeros."""
    nonzero_64k: int
    xxh3_128: str
    """Of the whole image, holes read as zeros: two reports that name the same digest measured the same disk."""


def cache_folder() -> Path:
    """Where disks and outputs are kept. Outputs must lie on a filesystem that takes O_DIRECT."""
    folder = os.environ.get("PIPELINE_PERF_CACHE")
    return Path(folder) if folder else Path(__file__).resolve().parent.parent / ".cache" / "perf"


def _build_system(path: Path) -> None:
    from perf import debian  # only this builder needs root and its tools

    debian.build(path)


def _build_incompressible(path: Path) -> None:
    import numpy as np

    # Seeded, so that every machine measures the same bytes; to a compressor they are as good as /dev/urandom.
    random = np.random.Generator(np.random.SFC64(20))
    with path.open("xb") as image:
        for _ in range(2 * GIB // (16 * MIB)):
            image.write(random.bytes(16 * MIB))


def _build_text(path: Path) -> None:
    from perf.text import write_log

    write_log(path, 2 * GIB)


def _build_mostly_empty(path: Path) -> None:
    from tests.disks.mbr import PARTITION_START, write_mbr

    size = 64 * GIB
    files = path.with_suffix(".files")
    files.mkdir()
    try:
        copied = 0
        for source in _files_of_this_machine():
            if copied >= GIB:
                break
            target = files / source.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            copied += target.stat().st_size
        with path.open("xb") as image:
            image.truncate(size)
        write_mbr(path, size)
        blocks = (size - PARTITION_START) // 4096
        options = f"offset={PARTITION_START},lazy_itable_init=0,nodiscard"
        make = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-L", "root", "-d", str(files), "-E", options]
        subprocess.run([*make, str(path), str(blocks)], check=True)
    finally:
        shutil.rmtree(files)


def _build_partly_deleted(path: Path) -> None:
    """Needs root: only the kernel deletes as the kernel does. No partition table: partclone wants a filesystem."""
    import random

    dice = random.Random(30)
    folder = path.with_suffix(".mnt")
    folder.mkdir()
    try:
        with path.open("xb") as image:
            image.truncate(4 * GIB)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-E", "nodiscard", str(path)], check=True)
        subprocess.run(["mount", "-o", "loop", str(path), str(folder)], check=True)
        try:
            made: list[tuple[Path, int]] = []
            total = 0
            while total < 3 * GIB:
                file = folder / f"{len(made) % 64}" / f"{len(made)}"
                file.parent.mkdir(exist_ok=True)
                # From a few KiB to some MiB, most of them small, as files of a system are.
                length = int(4096 * 2 ** dice.uniform(0, 11))
                file.write_bytes(dice.randbytes(length))
                made.append((file, length))
                total += length
            os.sync()
            deleted = 0
            for file, length in dice.sample(made, len(made)):
                if deleted >= total * 3 // 10:
                    break
                file.unlink()
                deleted += length
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    finally:
        folder.rmdir()


def _build_empty_ext4(path: Path) -> None:
    with path.open("xb") as image:
        image.truncate(100 * GIB)
    options = "lazy_itable_init=0,nodiscard"
    made = path.with_suffix(".files")
    made.mkdir()
    try:
        copied = 0
        for number, source in enumerate(_files_of_this_machine()):
            shutil.copyfile(source, made / str(number))
            copied += source.stat().st_size
            if copied >= GIB:  # a small server
                break
        make = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(made), "-E", options, str(path)]
        subprocess.run(make, check=True)
    finally:
        shutil.rmtree(made)


def _files_of_this_machine() -> Iterator[Path]:
    """Ordinary files of an ordinary system, in the order of their names."""
    for folder in ("/usr/bin", "/usr/share", "/usr/lib"):
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                file = Path(parent, name)
                if file.is_file() and not file.is_symlink():
                    yield file


DISKS = {
    disk.name: disk
    for disk in (
        Disk(
            name="system",
            summary="8 GiB, MBR + ext4, Debian with servers and compilers, deleted residue",
            build=_build_system,
        ),
        Disk(name="incompressible", summary="2 GiB of random bytes", build=_build_incompressible),
        Disk(name="text", summary="2 GiB of log lines", build=_build_text),
        Disk(
            name="mostly-empty",
            summary="64 GiB, MBR + ext4, 1 GiB of files, 1 GiB of written zeros (inode tables)",
            build=_build_mostly_empty,
        ),
        Disk(
            name="partly-deleted",
            summary="4 GiB, ext4 without a partition table, 3 GiB of random files, 30 % of them deleted again",
            build=_build_partly_deleted,
        ),
        Disk(
            name="empty-ext4",
            summary="100 GiB, ext4 without a partition table, 1 GiB of files",
            build=_build_empty_ext4,
        ),
    )
}


def ready(name: str) -> Disk:
    """Return the disk, built if the cache does not hold it."""
    disk = DISKS[name]
    if not disk.path.exists():
        disk.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = disk.path.with_suffix(".building")
        unfinished.unlink(missing_ok=True)
        started = time.monotonic()
        disk.build(unfinished)
        os.sync()
        unfinished.rename(disk.path)
        _contents_file(disk).unlink(missing_ok=True)
        print(f"built {disk.path} in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return disk


def contents(disk: Disk) -> Contents:
    """Say what is in a built disk: from the file beside it, or by reading the disk once."""
    known = _contents_file(disk)
    if known.exists():
        return Contents(**json.loads(known.read_text())["contents"])
    found = survey(disk.path)
    record = {"name": disk.name, "summary": disk.summary, "contents": asdict(found)}
    known.write_text(json.dumps(record, indent=2) + "\n")
    return found


def survey(path: Path) -> Contents:
    """Read the image window by window and count. Windows that are all hole are not read."""
    import numpy as np
    import xxhash

    window = 4 * MIB
    zeros = bytes(window)
    digest = xxhash.xxh3_128()
    nonzero_4k = nonzero_64k = 0
    size = path.stat().st_size
    with path.open("rb", buffering=0) as image:
        extents = list(_extents(image.fileno(), size))
        rest = iter(extents)
        extent = next(rest, None)
        for offset in range(0, size, window):
            length = min(window, size - offset)
            while extent is not None and extent.stop <= offset:
                extent = next(rest, None)
            if extent is None or extent.start >= offset + length:
                digest.update(zeros[:length])
                continue
            data = os.pread(image.fileno(), length, offset)
            if len(data) != length:
                raise SystemExit(f"{path}: {len(data)} of {length} bytes at {offset}")
            digest.update(data)
            whole = np.frombuffer(data.ljust(window, b"\0"), dtype=bool)
            blocks = whole.reshape(-1, 4096).any(axis=1)
            nonzero_4k += int(blocks.sum()) * 4096
            nonzero_64k += int(blocks.reshape(-1, 16).any(axis=1).sum()) * (64 << 10)
    return Contents(
        size=size,
        allocated=path.stat().st_blocks * 512,
        extents=len(extents),
        nonzero_4k=nonzero_4k,
        nonzero_64k=nonzero_64k,
        xxh3_128=digest.hexdigest(),
    )


def _extents(image: int, size: int) -> Iterator[range]:
    """Yield the ranges of the file that are not holes."""
    position = 0
    while position < size:
        try:
            start = os.lseek(image, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        position = os.lseek(image, start, os.SEEK_HOLE)
        yield range(start, position)


def _contents_file(disk: Disk) -> Path:
    return disk.path.with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.disks", description="Build the benchmark disks.")
    parser.add_argument("names", nargs="+", choices=[*DISKS, "all"], metavar="NAME", help=", ".join([*DISKS, "all"]))
    names = parser.parse_args().names
    for name in DISKS if "all" in names else names:
        disk = ready(name)
        print(json.dumps({"name": disk.name, "path": str(disk.path), **asdict(contents(disk))}))


if __name__ == "__main__":
    main()
