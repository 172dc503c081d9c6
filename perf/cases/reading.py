"""Disk to nowhere: how fast it is read, digested and tested for zeros, against `dd` reading it with O_DIRECT."""

from __future__ import annotations

from perf.case import Attempt, Case, Contender, Goal, Ground
from perf.export import export_to_nothing
from perf.measure import one


def _dd(ground: Ground) -> Attempt:
    return Attempt(steps=(one("dd", f"if={ground.disk}", "of=/dev/null", "bs=4M", "iflag=direct", "status=none"),))


DD = Contender("dd direct to null", _dd)
READ = export_to_nothing("pipeline read to null", {"use": "encode.raw"})

# dd neither digests nor skips holes: on `incompressible` both read the same bytes, `system` is what a user sees.
CASES = tuple(
    Case(
        name=f"read-{disk}",
        summary=f"read, digest and zero test of the disk {disk}, to null",
        disk=disk,
        ours=READ,
        rival=DD,
        goals=(Goal("wall ratio", 0.95),),
    )
    for disk in ("incompressible", "system")
)
