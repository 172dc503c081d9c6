"""A small disk that looks like a server's: `python -m tests.disks.demo PATH [--size 256MiB]`.

An MBR and one active ext4 partition: programs, a log, random bytes, a sparse file, blocks of a deleted file in the free
space, zeros that were written (inode tables, journal). It does not boot: it has no kernel. Needs e2fsprogs, not root.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.units import MiB, parse_size
from tests.disks.mbr import PARTITION_START, write_mbr

DEFAULT_SIZE = 256 * MiB
SMALLEST_SIZE = 32 * MiB
ROOT_UUID = "5eed0001-0000-4000-8000-000000000001"

_BUILT_AT = 1_700_000_000
"""The time on every file and in the superblock: the same disk comes out tomorrow."""

_SHARE_OF_TEXT = 0.08
_SHARE_OF_PROGRAMS = 0.12
_SHARE_OF_RANDOM = 0.06
_SHARE_OF_SPARSE = 0.25
_SHARE_OF_DELETED = 0.08

_FIRST_PROGRAMS = ("bash", "ls", "cp", "tar", "grep", "sed", "find", "perl", "openssl", "git", "python3")

_SMALL_FILES = {
    "etc/hostname": "demo\n",
    "etc/os-release": 'ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\nPRETTY_NAME="Demo Linux"\n',
    "etc/fstab": f"UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\n",
    "root/.profile": "umask 022\n",
}
_EMPTY_FOLDERS = ("dev", "proc", "sys", "tmp", "run", "mnt")

DELETED_RECORD = b"deleted customer record, must not travel\n"
"""In many places of the free space, and nowhere in a file."""


class DiskNotBuilt(Exception):
    """A tool is missing or failed."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the disk: where it stands there, and where its bytes are now."""

    inside: str
    source: Path
    mode: int = 0o100644


def build_demo_disk(path: Path, size: int = DEFAULT_SIZE) -> None:
    """Write the disk image to `path`, replacing what is there. The file is sparse.

    On one machine the same size gives the same bytes; the programs are this machine's own.

    Raises:
        DiskNotBuilt: e2fsprogs is missing or failed.
        ValueError: `size` is too small or not a multiple of 1 MiB.
    """
    if size < SMALLEST_SIZE or size % MiB:
        raise ValueError(f"a demo disk has at least {SMALLEST_SIZE} bytes and whole MiB, not {size}")
    unfinished = path.with_name(path.name + ".building")
    with tempfile.TemporaryDirectory(prefix="demo-disk-") as folder:
        try:
            with unfinished.open("wb") as image:
                image.truncate(size)
            write_mbr(unfinished, size)
            _make_filesystem(unfinished, size - PARTITION_START)
            kept = list(_files(Path(folder), size))
            records = _write(Path(folder, "deleted"), _old_records(int(size * _SHARE_OF_DELETED)))
            _fill(unfinished, kept, _File("var/tmp/deleted", records))
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _make_filesystem(image: Path, size: int) -> None:
    options = f"offset={PARTITION_START},hash_seed={ROOT_UUID},lazy_itable_init=0,nodiscard,root_owner=0:0"
    blocks = str(size // 4096)
    command = ["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "root", "-U", ROOT_UUID, "-E", options, str(image), blocks]
    _run("mke2fs", *command)


def _files(folder: Path, size: int) -> Iterator[_File]:
    """Make the files of the disk in `folder`, in the order in which they will be written."""
    for name, text in _SMALL_FILES.items():
        yield _File(name, _write(folder / name.replace("/", "_"), [text.encode()]))
    for program in _programs(int(size * _SHARE_OF_PROGRAMS)):
        yield _File(f"usr/bin/{program.name}", program, 0o100755)
    yield _File("var/log/syslog", _write(folder / "syslog", _log_lines(int(size * _SHARE_OF_TEXT))))
    yield _File("srv/random", _write(folder / "random", _random_bytes(int(size * _SHARE_OF_RANDOM))))
    yield _File("srv/sparse", _sparse_file(folder / "sparse", int(size * _SHARE_OF_SPARSE)))


def _programs(budget: int) -> Iterator[Path]:
    """Yield programs of this machine, the well-known ones first, until they fill the budget."""
    folder = Path("/usr/bin")
    others = sorted(file.name for file in folder.iterdir())
    for name in dict.fromkeys((*_FIRST_PROGRAMS, *others)):
        program = folder / name
        is_usable = name.isalnum() and program.is_file() and not program.is_symlink() and os.access(program, os.R_OK)
        if is_usable and program.stat().st_size <= budget:
            budget -= program.stat().st_size
            yield program


def _log_lines(size: int) -> Iterator[bytes]:
    source = random.Random(7)
    words = ["".join(source.choices("etaoinshrdlucmfwyp", k=source.randint(2, 10))) for _ in range(3000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    second = 0
    while size > 0:
        second += 1
        chosen = source.choices(words, weights, k=400)
        stamp = f"Nov {1 + second // 86400:2d} {second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d} demo"
        lines = (f"{stamp} daemon[{300 + second % 97}]: {' '.join(chosen[at : at + 8])}\n" for at in range(0, 400, 8))
        text = "".join(lines).encode()[:size]
        size -= len(text)
        yield text


def _random_bytes(size: int) -> Iterator[bytes]:
    source = random.Random(8)
    while size > 0:
        chunk = source.randbytes(min(MiB, size))
        size -= len(chunk)
        yield chunk


def _old_records(size: int) -> Iterator[bytes]:
    """Yield bytes that are easy to recognise: finding them in an image shows that free space was copied."""
    record = DELETED_RECORD.ljust(64, b".")
    while size > 0:
        chunk = record * min(MiB // 64, -(-size // 64))
        size -= len(chunk)
        yield chunk


def _sparse_file(path: Path, size: int) -> Path:
    """Make a file of which one 4 KiB block in every 256 KiB holds data."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size - 4096, 256 << 10):
            file.seek(offset)
            file.write(offset.to_bytes(8, "little") * 512)
    return path


def _write(path: Path, chunks: list[bytes] | Iterator[bytes]) -> Path:
    with path.open("wb") as file:
        file.writelines(chunks)
    return path


def _fill(image: Path, kept: list[_File], deleted: _File) -> None:
    """Write the files into the filesystem, the one to delete between the others, and then delete it.

    With debugfs and one by one, not with `mke2fs -d`: that takes them in the order in which this machine lists them.
    """
    folders = dict.fromkeys(folder for file in (*kept, deleted) for folder in _parents(file.inside))
    lines = [f"mkdir /{folder}" for folder in (*folders, *_EMPTY_FOLDERS)]
    middle = len(kept) - 2
    for file in (*kept[:middle], deleted, *kept[middle:]):
        lines.append(f'write "{file.source}" /{file.inside}')
        lines += [f"sif /{file.inside} {field}" for field in (f"mode 0{file.mode:o}", "uid 0", "gid 0")]
    lines.append(f"rm /{deleted.inside}")
    for name in ("", *folders, *_EMPTY_FOLDERS, *(file.inside for file in kept), "lost+found"):
        lines += [f"sif /{name} {stamp} @{_BUILT_AT}" for stamp in ("atime", "ctime", "mtime", "crtime")]
    said = _run("debugfs", "-w", "-f", "-", f"{image}?offset={PARTITION_START}", script="\n".join(lines) + "\n")
    # debugfs exits with 0 whatever its commands did: it echoes each, and says more only when one failed.
    expected = ("debugfs", "Allocated inode:")
    faults = [line for line in said.splitlines() if line and not line.startswith(expected)]
    if faults:
        raise DiskNotBuilt("debugfs: " + "; ".join(faults[:5]))


def _parents(inside: str) -> list[str]:
    parts = inside.split("/")[:-1]
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _run(tool: str, *arguments: str, script: str | None = None) -> str:
    # An ordinary user's PATH has no sbin.
    program = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise DiskNotBuilt(f"{tool} is missing: install the package e2fsprogs")
    done = subprocess.run(
        [program, *arguments],
        input=script,
        env={**os.environ, "LC_ALL": "C", "TZ": "UTC", "E2FSPROGS_FAKE_TIME": str(_BUILT_AT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DiskNotBuilt(f"{tool} exits {done.returncode}: {done.stdout.strip()[-500:]}")
    return done.stdout


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.disks.demo", description="Build the small demo disk.")
    parser.add_argument("path", type=Path, metavar="PATH", help="image file to write; replaced when it is there")
    parser.add_argument("--size", type=parse_size, default=DEFAULT_SIZE, help="whole MiB, default 256MiB")
    given = parser.parse_args(arguments)
    try:
        given.path.parent.mkdir(parents=True, exist_ok=True)
        build_demo_disk(given.path, given.size)
    except (DiskNotBuilt, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{given.path}: {given.size} bytes, {given.path.stat().st_blocks * 512} on disk")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
