"""The filesystems step: every filesystem of the image, walked by our readers and checked by its own checker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import anyio

from pipeline.errors import FormatError, PipelineError
from pipeline.flow.items import RangeReader
from pipeline.units import format_size
from stages.disk.tree import FileTree, Kind
from stages.disk.volumes import Volume, open_volumes
from stages.prove.checkers import CHECKERS, PartOfDisk, check_filesystem
from stages.prove.steps import StepResult
from stages.serve.cache import RUN_MAX
from stages.serve.disk import ServedDisk

# Names and folders that are looked at in one filesystem, and for how long: enough for a server's system, not for a mail
# store; the checkers look at all of it.
_NAMES_MAX = 200_000
_WALK_S = 30.0


class DiskReader:
    """A served disk as a RangeReader of its guest bytes."""

    def __init__(self, disk: ServedDisk) -> None:
        self._disk = disk
        self.size = disk.size

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly these guest bytes. Raises as the disk does."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError("the disk ends before this range", operation="read", offset=offset, size=self.size)
        pieces: list[bytes | memoryview] = []
        for start in range(offset, offset + length, RUN_MAX):
            for span in await self._disk.read(start, min(RUN_MAX, offset + length - start)):
                pieces.append(span.data if span.data is not None else bytes(span.length))  # noqa: PERF401  # two loops
        return b"".join(pieces)


@dataclass(slots=True)
class _Findings:
    """What was found so far."""

    states: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    log: str = ""


async def check_filesystems(disk: ServedDisk, *, on_note: Callable[[str], None] = lambda note: None) -> StepResult:
    """Check every filesystem of a disk.

    Args:
        disk: borrowed; only read.
    Raises:
        StoreError: it can't be read.
    """
    reader: RangeReader = DiskReader(disk)
    volumes = await open_volumes(reader)
    found = _Findings(lines=list(volumes.problems))
    for volume in volumes.volumes:
        on_note(f"checking {volume.title} ({volume.signature.kind})")
        await _check(disk, volume, found)
    evidence = {
        "filesystems": str(len(found.states)),
        "volumes": str(len(volumes.volumes)),
        "table": volumes.table.kind,
    }
    count = len(found.states)
    failed = found.states.count("failed")
    hint = " ".join(found.hints)
    if failed:
        state, summary = "failed", f"{failed} of {count} filesystems are damaged"
    elif "unknown" in found.states:
        state, summary = "unknown", "not every filesystem could be checked"
    elif not count:
        state, summary = "unknown", "there is no filesystem that can be checked"
        hint = "Is it a disk, or something that is encrypted? --skip filesystems."
    else:
        state, summary = "passed", f"{count} filesystems are clean" if count > 1 else "the filesystem is clean"
    return StepResult(
        name="filesystems",
        state=state,  # type: ignore[arg-type]  # a Literal
        summary=summary,
        hint=hint,
        details=tuple(found.lines),
        evidence=evidence,
        log=found.log,
    )


async def _check(disk: ServedDisk, volume: Volume, found: _Findings) -> None:
    kind = volume.signature.kind
    head = f"{volume.title}: {kind}, {format_size(volume.length)}"
    state = ""
    if volume.tree is not None:
        state, said = await _walked(volume.tree)
        found.lines.append(f"{head}; {said}")
    else:
        found.lines.append(f"{head}; {volume.problem}" if volume.problem else head)
    if kind in CHECKERS and volume.offset is not None:
        checked = await check_filesystem(PartOfDisk(disk, volume.offset, volume.length), kind)
        if checked is not None:
            state = "failed" if "failed" in (state, checked.state) else checked.state
            found.lines.append(f"{volume.title}: {checked.summary}")
            found.log += f"--- {volume.title} ({kind})\n{checked.said}\n"
            if checked.hint and checked.hint not in found.hints:
                found.hints.append(checked.hint)
    if state:
        found.states.append(state)


async def _walked(tree: FileTree) -> tuple[str, str]:
    """Go through every folder. What a log may still put right is no damage."""
    names = 0
    waiting = [tree.root]
    seen = set(waiting)
    try:
        with anyio.move_on_after(_WALK_S):
            while waiting and names < _NAMES_MAX:
                for entry in await tree.entries(waiting.pop()):
                    names += 1
                    if entry.kind is Kind.DIRECTORY and entry.number not in seen:
                        seen.add(entry.number)
                        waiting.append(entry.number)
    except FormatError as error:
        if tree.dirty:
            return "", f"its log wants to be replayed ({error.message})"
        return "failed", f"our reader finds damage: {error.message}"
    except PipelineError as error:
        return "unknown", f"could not be walked: {error.message}"
    part = "the first " if waiting else ""
    return "passed", f"{part}{names} names walked"
