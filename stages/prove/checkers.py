"""The filesystems' own checkers, on what an image holds: a file through FUSE, on an overlay that goes with it.

Source: e2fsck(8), xfs_repair(8), btrfs-check(8), fsck.fat(8): exit codes; nbdfuse(1).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import anyio

from pipeline.errors import PipelineError
from pipeline.units import GiB
from stages.decode.image import Extent
from stages.prove.leash import leashed
from stages.prove.scratch import scratch_folder
from stages.serve.disk import ServedDisk, Span
from stages.serve.layer import open_layer
from stages.serve.server import NbdServer, listen_on_socket

# Where people's PATH does not lead, and these programs are.
_PATH: Final = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_FUSE: Final = "nbdfuse"
_START_S = 20.0
_CHECK_MEMORY = 8 * GiB
# Far more than any sound filesystem takes; a damaged one must not keep a checker busy for ever.
_CHECK_CPU_S = 4 * 3600
# What replaying a journal may write.
_OVERLAY_MAX = 4 * GiB
_SAID_MAX = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Checker:
    """How one kind of filesystem is checked.

    Attributes:
        program, package: what runs, and the Debian package that has it.
        commands: one after the other; the last one's exit code is the verdict. `{}` is the filesystem.
        clean: exit codes that mean that all is well.
        unknown: exit codes that mean that the checker could not do its work.
        replay: what it says of a log that only wants to be replayed: no damage, and not checked further.
    """

    program: str
    package: str
    commands: tuple[tuple[str, ...], ...]
    clean: frozenset[int] = frozenset({0})
    unknown: frozenset[int] = frozenset()
    replay: str = ""


_EXT: Final = Checker(
    program="e2fsck",
    package="e2fsprogs",
    # The journal is replayed into the overlay, as mounting does; only then is it to be clean.
    commands=(("e2fsck", "-y", "-E", "journal_only", "{}"), ("e2fsck", "-f", "-n", "{}")),
    unknown=frozenset({8, 16, 32, 128}),
)
_FAT: Final = Checker(program="fsck.fat", package="dosfstools", commands=(("fsck.fat", "-n", "{}"),))
CHECKERS: Final[dict[str, Checker]] = {
    "ext2": _EXT,
    "ext3": _EXT,
    "ext4": _EXT,
    "xfs": Checker(
        program="xfs_repair",
        package="xfsprogs",
        commands=(("xfs_repair", "-f", "-n", "{}"),),
        replay="valuable metadata changes in a log",
    ),
    "btrfs": Checker(
        program="btrfs", package="btrfs-progs", commands=(("btrfs", "check", "--readonly", "--force", "{}"),)
    ),
    **dict.fromkeys(("fat", "vfat", "fat12", "fat16", "fat32"), _FAT),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a checker found.

    Attributes:
        summary: one sentence.
        said: its output, cut; what a filesystem's names do to a terminal is taken out.
    """

    state: Literal["passed", "failed", "unknown"]
    summary: str
    hint: str = ""
    said: str = ""


class PartOfDisk:
    """A stretch of a disk as a disk of its own."""

    can_write = False

    def __init__(self, disk: ServedDisk, offset: int, size: int) -> None:
        self._disk = disk
        self._offset = offset
        self.size = size

    async def read(self, offset: int, length: int) -> Sequence[Span]:
        """As the whole."""
        return await self._disk.read(self._offset + offset, length)

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """As the whole."""
        async for one in self._disk.extents(self._offset + offset, length):
            yield Extent(one.offset - self._offset, one.length, one.is_zero)

    async def write(self, offset: int, data: memoryview) -> None:
        """Never: `open_layer` takes the writes."""
        raise AssertionError("a part of a disk is only read")

    async def zero(self, offset: int, length: int) -> None:
        """Never."""
        raise AssertionError("a part of a disk is only read")

    async def flush(self) -> None:
        """Nothing to do."""


async def check_filesystem(part: ServedDisk, kind: str) -> Checked | None:
    """Run the checker of a kind of filesystem; None where none is known.

    Args:
        part: the filesystem alone; borrowed, only read.
    Raises:
        StoreError: no overlay can be made.
    """
    checker = CHECKERS.get(kind)
    if checker is None:
        return None
    if missing := why_no_files() or _why_no(checker.program, checker.package):
        return Checked(state="unknown", summary=missing[0], hint=missing[1])
    try:
        async with _as_file(part) as path:
            return await _run(checker, path)
    except PipelineError as error:
        return Checked(state="unknown", summary=error.message, hint=error.hint)


def why_no_files() -> tuple[str, str] | None:
    """What is missing to show a filesystem as a file to its checker, and what to do; None where nothing is."""
    if missing := _why_no(_FUSE, "libnbd-bin"):
        return missing
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "this user can't use /dev/fuse", "Run it as root, or modprobe fuse."
    return None


def _why_no(program: str, package: str) -> tuple[str, str] | None:
    if shutil.which(program, path=_PATH) is None:
        return f"there is no {program}", f"Install it: apt install {package}."
    return None


async def _run(checker: Checker, path: Path) -> Checked:
    said, code = "", 0
    for command in checker.commands:
        words = [word.format(path) for word in command]
        code, output = await _outcome_of(
            leashed(words, signal=signal.SIGKILL, memory=_CHECK_MEMORY, cpu_s=_CHECK_CPU_S)
        )
        told = output.decode(errors="replace").replace(str(path), "it")
        said += "".join(char if char.isprintable() or char == "\n" else "?" for char in told)
    if code in checker.clean:
        return Checked(state="passed", summary=f"{checker.program} finds nothing", said=said)
    if checker.replay and re.search(checker.replay, said):
        return Checked(
            state="passed", summary=f"its log wants to be replayed, which mounting does ({checker.program})", said=said
        )
    if code < 0 or code in checker.unknown:
        return Checked(state="unknown", summary=f"{checker.program} could not do its work ({code})", said=said)
    return Checked(state="failed", summary=f"{checker.program} finds damage (exit {code})", said=said)


async def _outcome_of(words: Sequence[str]) -> tuple[int, bytes]:
    """Run a checker: its exit code and the end of what it said, however much a damaged filesystem makes it say."""
    process = await anyio.open_process(words, stdin=-3, stderr=-2, env={"PATH": _PATH, "LC_ALL": "C"})
    said = b""
    try:
        assert process.stdout is not None, "a pipe"
        async for data in process.stdout:
            said = (said + data)[-_SAID_MAX:]
        return await process.wait(), said
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            with anyio.move_on_after(_START_S):
                await process.aclose()


@asynccontextmanager
async def _as_file(part: ServedDisk) -> AsyncIterator[Path]:
    """The disk as a file that may be written, on an overlay that is gone afterwards."""
    layer = open_layer(part, None, limit=_OVERLAY_MAX)
    with scratch_folder() as folder, closing(layer):
        place = folder / "mnt"
        place.mkdir()
        server = NbdServer(layer)
        listener = listen_on_socket(folder / "s")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, listener)
            url = f"nbd+unix:///?socket={folder / 's'}"
            # It unmounts itself when it is asked to end: on SIGTERM, which it also gets when we are killed.
            command = leashed([_FUSE, str(place / "disk"), url], signal=signal.SIGTERM)
            process = await anyio.open_process(command, stdin=-3, stdout=-3, stderr=-1, env={"PATH": _PATH})
            try:
                with anyio.move_on_after(_START_S):
                    while process.returncode is None and not (place / "disk").exists():  # noqa: ASYNC110  # no event
                        await anyio.sleep(0.02)
                if not (place / "disk").exists():
                    raise PipelineError(
                        f"{_FUSE} could not show the filesystem as a file",
                        operation="filesystems",
                        hint="May this user mount with FUSE (fusermount3, /dev/fuse)?",
                    )
                yield place / "disk"
            finally:
                with anyio.CancelScope(shield=True):
                    if process.returncode is None:
                        process.terminate()
                    with anyio.move_on_after(_START_S):
                        await process.wait()
            tasks.cancel_scope.cancel()
