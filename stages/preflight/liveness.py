"""The rule about copying a disk that is in use."""

from __future__ import annotations

from collections.abc import AsyncIterator

from pipeline.units import format_size
from stages.preflight.findings import Evidence, Outcome, failed, passed, skipped
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import Subject


async def check_risk(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether filesystems are written to while they are copied."""
    if subject.live is None:
        yield skipped("nothing is mounted: this is an image, or a disk of another machine")
        return
    written = sorted(
        {one.point for one in subject.live.mounts if one.writable and any(map(subject.volumes.is_disk, one.disks))}
    )
    if not written:
        yield passed("nothing of this disk is mounted so that it can be written")
        return
    rate = subject.live.written_per_s
    busy = f" ({format_size(int(rate))} a second were written since the machine started)" if rate else ""
    shown = ", ".join(written[:4]) + (f" and {len(written) - 4} more" if len(written) > 4 else "")
    if target.consistency in ("freeze", "snapshot"):
        yield passed(f"{shown}: kept still by {target.consistency}")
    else:
        yield failed(
            "info" if target.consistency == "live" else "warn",
            f"{shown} mounted read-write: metadata in the copy may be torn{busy}",
            Evidence("/proc/self/mountinfo"),
            remedy='Say consistency = "freeze" or "snapshot" at read.disk, or stop what writes and run `sync`.',
        )


RULES = (
    Rule(
        id="live.risk",
        title="nothing writes to the disk while it is copied",
        why=(
            "A copy of a filesystem that changes meanwhile is one of many moments: its metadata may contradict itself. "
            "The guide warns of it."
        ),
        check=check_risk,
        for_data=True,
        needs="disk",
    ),
)
