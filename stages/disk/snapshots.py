"""A snapshot of a logical volume, made for one export and removed at its end.

Making it freezes the filesystem on the volume for a moment, so that the snapshot is of one moment and clean. The tools
of LVM do the work; the kernel needs device-mapper with its snapshot target.

Source: lvcreate(8), lvs(8), lvremove(8).
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import anyio

from pipeline.errors import LeftBehindError, PlanError

# What may be written to the volume meanwhile, as a share of its size. A full snapshot can't be read any more, and the
# export fails; a larger share needs more free space in the group.
_SHARE = "20%ORIGIN"
_DEADLINE_S = 120.0


class Snapshot:
    """A snapshot of a volume. `remove` it; it is of no use after the export.

    Attributes:
        device: where it is read.
        name: GROUP/VOLUME.
    """

    def __init__(self, name: str, device: Path) -> None:
        """Use `take` instead."""
        self.name = name
        self.device = device

    @classmethod
    async def take(cls, volume: Path) -> Snapshot:
        """Make one.

        Raises:
            PlanError: it is no logical volume, or LVM refuses; nothing is left.
        """
        group, origin, is_thin = await _volume(volume)
        name = f"{group}/{origin}-export-{os.getpid()}"
        room = ("--setactivationskip", "n") if is_thin else ("--extents", _SHARE)
        made = cls(name, Path())
        try:
            with anyio.CancelScope(shield=True):  # half made, it would stay
                await _lvm("lvcreate", "--snapshot", "--permission", "r", "--name", name.partition("/")[2], *room,
                           "--addtag", "disk-pipeline", f"{group}/{origin}")  # fmt: skip
            try:
                made.device = Path((await _lvm("lvs", "--noheadings", "--options", "lv_path", name)).strip())
            except BaseException:
                await made.remove()
                raise
        except _LvmError as error:
            raise PlanError(
                f"LVM makes no snapshot of {group}/{origin}: {error}",
                operation="snapshot",
                hint=f"The group needs room for {_SHARE.partition('%')[0]} % of the volume (vgs). Else set "
                'consistency = "freeze" in read.disk.',
            ) from None
        return made

    async def remove(self) -> None:
        """Remove it, also while the export is being cancelled. Raises LeftBehindError where LVM does not."""
        with anyio.CancelScope(shield=True):
            try:
                await _lvm("lvremove", "--force", "--yes", self.name)
            except _LvmError as error:
                command = f"lvremove --force {self.name}"
                raise LeftBehindError(
                    f"the snapshot {self.name} could not be removed: {error}", cause=error, commands=(command,)
                ) from None


async def _volume(path: Path) -> tuple[str, str, bool]:
    """(group, volume, whether it is a thin one). Raises PlanError for what is no logical volume."""
    fields = "vg_name,lv_name,lv_attr"
    told = ""
    with suppress(_LvmError):
        told = await _lvm("lvs", "--noheadings", "--separator", "|", "--options", fields, str(path))
    words = told.strip().split("|")
    if len(words) != 3 or not words[0]:
        raise PlanError(
            "a snapshot is made of a logical volume, and this is none",
            operation="snapshot",
            path=path,
            hint='Name the volume (lvs shows them). For a whole disk set consistency = "freeze" in read.disk; so for '
            "btrfs too: a snapshot of its own does not hold the blocks of the disk still.",
        )
    return words[0], words[1], words[2].startswith("V")


class _LvmError(Exception):
    """What the tool said."""


async def _lvm(*command: str) -> str:
    environment = {**os.environ, "LC_ALL": "C", "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    try:
        with anyio.fail_after(_DEADLINE_S):
            done = await anyio.run_process(command, check=False, env=environment, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise _LvmError("the tools of LVM are not installed") from None
    except TimeoutError:
        raise _LvmError(f"{command[0]} does not answer") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise _LvmError(lines[-1].strip())
    return done.stdout.decode(errors="replace")
