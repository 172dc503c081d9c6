"""Filesystems of a running system held still (fsfreeze) while their disk is read.

A frozen filesystem has everything on its disk and lets every writer wait. A watchdog process holds it: it thaws when
this process ends in any way, and after a time at the latest.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from pipeline.errors import PlanError, SourceError
from pipeline.units import format_duration
from stages.disk import watchdog
from stages.disk.occupancy import filesystems_of

# A line of the watchdog is shorter than this.
_LINE_MAX = 100
# Letting go must not take longer: the watchdog thaws anyway when this process ends.
_END_DEADLINE_S = 30.0
# While one waits for its last writes, those that are frozen already stop the machine's services.
_FROZEN_WITHIN_S = 60.0


class Freeze:
    """Frozen filesystems. `end` lets go; so does the end of this process.

    Attributes:
        points: mount points that hold still.
        unable: mount points whose filesystem can't be frozen (vfat).
    """

    def __init__(self, process: Process, folders: list[int], points: tuple[str, ...], unable: tuple[str, ...]) -> None:
        """Use `begin` instead."""
        self._process = process
        self._folders = folders
        self.points = points
        self.unable = unable

    @classmethod
    async def begin(cls, points: Sequence[str], *, timeout_s: float) -> Freeze:
        """Freeze filesystems by their mount points, in this order.

        Args:
            timeout_s: after so long they are thawed whatever happens.
        Raises:
            PlanError: one can't be frozen; none is any more.
        Cancellation: all are thawed.
        """
        # A module that is imported while the disk of this program is frozen must not be compiled onto it.
        sys.dont_write_bytecode = True
        folders: list[int] = []
        process: Process | None = None
        try:
            folders.extend(os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for point in points)
            process = await anyio.open_process(
                [sys.executable, "-I", "-S", "-B", watchdog.__file__, str(timeout_s), *map(str, folders)],
                stdin=-1,
                stdout=-1,
                stderr=None,
                cwd="/",
                start_new_session=True,  # Ctrl-C in the terminal is not for it
                pass_fds=folders,
            )
            unable: list[str] = []
            with anyio.fail_after(min(timeout_s, _FROZEN_WITHIN_S)):
                await _wait_until_frozen(process, points, unable)
        except BaseException as error:
            if process is not None:
                await _let_go(process, folders)
            for folder in folders:
                os.close(folder)
            if isinstance(error, TimeoutError):
                raise _restless() from None
            if isinstance(error, OSError):
                raise PlanError(f"the disk can't be frozen: {error.strerror}", operation="freeze") from None
            raise
        return cls(process, folders, tuple(one for one in points if one not in unable), tuple(unable))

    @property
    def is_held(self) -> bool:
        """Whether the filesystems are still frozen."""
        return bool(self._folders) and self._process.returncode is None

    async def end(self) -> bool:
        """Thaw; whether everything held still up to now. Idempotent. Not to be cancelled: shield it."""
        if not self._folders:
            return False
        was_held = await _let_go(self._process, self._folders)
        for folder in self._folders:
            os.close(folder)
        self._folders = []
        return was_held


async def _wait_until_frozen(process: Process, points: Sequence[str], unable: list[str]) -> None:
    """Collects the points that can't be frozen. Raises PlanError where one could be, but is not."""
    assert process.stdout is not None, "it was opened with a pipe"
    lines = BufferedByteReceiveStream(process.stdout)
    while True:
        try:
            words = (await lines.receive_until(b"\n", _LINE_MAX)).decode().split()
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.DelimiterNotFound):
            words = ["ended"]
        if words[0] == "frozen":
            return
        if words[0] == "unable":
            unable.append(points[int(words[1])])
            continue
        if words[0] == "failed":
            number = int(words[2])
            raise PlanError(
                f"{points[int(words[1])]} can't be frozen: {os.strerror(number)}",
                operation="freeze",
                hint=_HINTS.get(number, 'Set consistency = "live" in read.disk, or stop what writes and unmount it.'),
            )
        raise _restless()


def _restless() -> PlanError:
    return PlanError(
        "the filesystems did not come to rest in time",
        operation="freeze",
        hint="Something writes faster than the disk takes it. Stop it, or set a longer freeze_timeout.",
    )


async def _let_go(process: Process, folders: list[int]) -> bool:
    """Tell the watchdog to thaw, and wait for it; thaw here where it has died. Whether it held until now."""
    was_held = process.returncode is None
    with anyio.CancelScope(shield=True):
        with anyio.move_on_after(_END_DEADLINE_S):
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
                if process.stdin is not None:
                    await process.stdin.send(b".")
                    await process.stdin.aclose()
            was_held = await process.wait() == 0 and was_held
        for folder in reversed(folders):
            watchdog.thaw(folder)
        if process.returncode is not None:
            await process.aclose()
    return was_held


_HINTS = {
    errno.EBUSY: "Somebody has frozen it already (fsfreeze, a backup agent). Wait until it is thawed.",
    errno.EPERM: "Freezing needs root: run it with sudo.",
}


def refuse_own_files(frozen: Sequence[tuple[str, str]], own: Sequence[Path]) -> None:
    """See that nothing that this run writes to lies on what is going to be frozen: it would wait for itself.

    Args:
        frozen: (device, mount point).
        own: paths that the run writes to; files that this process has open for writing are looked up.
    Raises:
        PlanError: with the first that does.
    """
    devices = dict(frozen)
    for path in (*own, *_open_for_writing()):
        for device in filesystems_of(path):
            if device in devices:
                raise PlanError(
                    f"{devices[device]} can't be frozen: this run itself writes to {path}, which lies on it",
                    operation="freeze",
                    hint="Put it on another disk: the target, journal in [export], log_file and prometheus in "
                    "[observe]. /run is in memory.",
                )


def _open_for_writing() -> list[Path]:
    """Regular files that this process has open for writing: logs, a redirected stderr."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            number = int(descriptor)
            flags = Path(f"/proc/self/fdinfo/{number}").read_text().partition("flags:")[2].split()[0]
            if stat.S_ISREG(os.fstat(number).st_mode) and int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                found.append(Path(os.readlink(f"/proc/self/fd/{number}")))
        except (OSError, IndexError):
            continue
    return found


def not_held(timeout_s: float, path: object) -> SourceError:
    """What to raise when a freeze was over before everything was read."""
    return SourceError(
        "the filesystems were thawed before everything was read",
        operation="freeze",
        path=path,
        hint=f"A freeze lasts {format_duration(timeout_s)} at most: set a longer freeze_timeout in read.disk, export "
        "from a snapshot, or make the target faster.",
    )
