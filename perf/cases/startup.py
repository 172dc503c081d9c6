"""How long a person waits before anything happens: help, and the first byte of an export."""

from __future__ import annotations

import sys

from perf.case import Attempt, Case, Contender, Goal, Ground
from perf.export import MEMORY, StageTable, export_toml
from perf.measure import one

# The page cache is cold for the first only; the figure is the median of the steps, so it is that of a second call.
_TIMES = 11


def _help(ground: Ground) -> Attempt:
    command = (*ground.product[:-1], "--help")  # the product takes an export.toml: without its verb
    return Attempt(steps=(one(*command),) * _TIMES)


def _first_byte(ground: Ground) -> Attempt:
    config = ground.folder / "export.toml"
    stages: list[StageTable] = [
        {"use": "read.disk", "path": str(ground.disk), "blocks": "all"},
        {"use": "checksum.guest"},
        {"use": "sparse.zeros"},
        {"use": "encode.qcow2"},
        {"use": "write.file", "path": str(ground.folder / "image.qcow2")},
    ]
    config.write_text(export_toml(stages, MEMORY))
    command = (sys.executable, "-m", "perf.first_read", str(config), "--quiet")
    return Attempt(steps=(one(*command),) * _TIMES, explained="    export.toml: the first buffer ends the run")


CASES = (
    Case(
        name="startup-help",
        summary="pipeline --help",
        disk="text",
        ours=Contender("pipeline --help", _help),
        goals=(Goal("step time", 0.25),),
    ),
    Case(
        name="startup-first-byte",
        summary="from the start of pipeline run to the first buffer read, disk to file",
        disk="text",
        ours=Contender("pipeline run, first byte", _first_byte),
        goals=(Goal("step time", 0.4),),
    ),
)
