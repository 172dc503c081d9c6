"""What it costs to tell what happens: events with every subscriber that there is, against a silent run."""

from __future__ import annotations

import sys
from typing import Literal

from perf.case import Attempt, Case, Contender, Goal, Ground
from perf.export import MEMORY, StageTable, export_toml
from perf.measure import one


def _exporting(how: Literal["timed", "silent"]) -> Contender:
    def prepare(ground: Ground) -> Attempt:
        config = ground.folder / "export.toml"
        stages: list[StageTable] = [
            {"use": "read.disk", "path": str(ground.disk), "blocks": "all"},
            {"use": "checksum.guest"},
            {"use": "sparse.zeros"},
            {"use": "encode.qcow2"},
            {"use": "write.null"},
        ]
        observers = {"report": "x.html", "prometheus": "x.prom", "log_file": "x.log"}
        lines = [f'{name} = "{ground.folder / file}"' for name, file in observers.items()]
        observe = "\n".join(["", "[observe]", *lines, 'log_level = "debug"', ""])
        config.write_text(export_toml(stages, MEMORY) + observe)
        explained = "    export.toml: qcow2 into nothing; report, metrics and a log of everything"
        manifest = f"export.manifest={ground.folder / 'manifest.json'}"
        command = (sys.executable, "-m", "perf.events", how, str(config), "--set", manifest)
        return Attempt(steps=(one(*command),), explained=explained)

    return Contender(f"pipeline, events {how}", prepare)


CASES = (
    Case(
        name="events",
        summary="every event with every subscriber (over 1 % of the processor time fails), against none",
        disk="text",
        ours=_exporting("timed"),
        rival=_exporting("silent"),
        # The share itself is measured inside; two runs of a virtual machine differ by more than it.
        goals=(Goal("cpu ratio", 0.97),),
    ),
)
