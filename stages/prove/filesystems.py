"""The filesystems step: every filesystem of the image, by our readers and by its own checker."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.errors import PipelineError
from pipeline.units import format_size
from stages.disk.mapping import Region, map_disk
from stages.disk.usage import Refusal, UsedMap
from stages.prove.checkers import CHECKERS, PartOfDisk, check_filesystem
from stages.prove.steps import StepResult
from stages.serve.cache import RUN_MAX
from stages.serve.disk import ServedDisk


class DiskReader:
    """A served disk as a RangeReader of its guest bytes."""

    def __init__(self, disk: ServedDisk) -> None:
        self._disk = disk
        self.size = disk.size

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly these guest bytes. Raises as the disk does."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise PipelineError("the disk ends before this range", operation="read", offset=offset, size=self.size)
        pieces: list[bytes | memoryview] = []
        for start in range(offset, offset + length, RUN_MAX):
            for span in await self._disk.read(start, min(RUN_MAX, offset + length - start)):
                pieces.append(span.data if span.data is not None else bytes(span.length))  # noqa: PERF401  # two loops
        return b"".join(pieces)


async def check_filesystems(disk: ServedDisk, *, on_note: Callable[[str], None] = lambda note: None) -> StepResult:
    """Check every filesystem of a disk.

    Args:
        disk: borrowed; only read.
    Raises:
        StoreError: it can't be read.
    """
    found = await map_disk(DiskReader(disk), disk.size)
    regions = [one for one in found.regions if one.kind != "gap" and one.signature is not None]
    lines: list[str] = []
    states: list[str] = []
    hints: list[str] = []
    log = ""
    for region in regions:
        kind = region.signature.kind if region.signature is not None else ""
        lines.append(f"{region.name}: {_described(region, kind)}")
        if kind not in CHECKERS:
            continue
        on_note(f"checking {region.name} ({kind})")
        checked = await check_filesystem(PartOfDisk(disk, region.offset, region.length), kind)
        if checked is None:
            continue
        states.append(checked.state)
        lines.append(f"{region.name}: {checked.summary}")
        log += f"--- {region.name} ({kind})\n{checked.said}\n"
        if checked.hint and checked.hint not in hints:
            hints.append(checked.hint)
    evidence = {"filesystems": str(len(states)), "partitions": str(len(regions)), "table": found.table.kind}
    details = tuple(lines)
    failed = states.count("failed")
    if failed:
        summary = f"{failed} of {len(states)} filesystems are damaged"
        return StepResult(
            name="filesystems", state="failed", summary=summary, details=details, evidence=evidence, log=log
        )
    if "unknown" in states:
        return StepResult(
            name="filesystems",
            state="unknown",
            summary="not every filesystem could be checked",
            hint=" ".join(hints),
            details=details,
            evidence=evidence,
            log=log,
        )
    if not states:
        return StepResult(
            name="filesystems",
            state="unknown",
            summary="there is no filesystem that can be checked",
            hint="Is it a disk, or something inside of volumes or encryption? --skip filesystems.",
            details=details,
            evidence=evidence,
        )
    summary = f"{len(states)} filesystems are clean" if len(states) > 1 else "the filesystem is clean"
    return StepResult(name="filesystems", state="passed", summary=summary, details=details, evidence=evidence, log=log)


def _described(region: Region, kind: str) -> str:
    outcome = region.outcome
    if isinstance(outcome, UsedMap):
        return f"{kind}, {format_size(region.copied)} of {format_size(region.length)} in use"
    if isinstance(outcome, Refusal):
        return f"{kind or 'nothing known'} ({outcome.reason})"
    return kind or "nothing known"
