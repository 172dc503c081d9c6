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
        share = ground.folder / "share" if how == "timed" else None
        command = (sys.executable, "-m", "perf.events", str(share or "silent"), str(config), "--set", manifest)
        return Attempt(steps=(one(*command),), explained=explained, share=share)

    return Contender(f"pipeline, events {how}", prepare)


CASES = (
    Case(
        name="events",
        summary="which share of an export's processor time its events take, with every subscriber; and against none",
        disk="text",
        ours=_exporting("timed"),
        rival=_exporting("silent"),
        goals=(Goal("share", 0.01),),
    ),
)
