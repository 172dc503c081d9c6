"""What it costs that a killed run can be resumed: an export with its journal, against one without."""

from __future__ import annotations

import sys
from typing import Literal

from perf.case import Attempt, Case, Contender, Goal, Ground, StoredFile
from perf.export import MEMORY, StageTable, export_toml
from perf.measure import one


def _exporting(how: Literal["timed", "off"]) -> Contender:
    def prepare(ground: Ground) -> Attempt:
        config, image = ground.folder / "export.toml", ground.folder / "image.qcow2"
        stages: list[StageTable] = [
            {"use": "read.disk", "path": str(ground.disk)},
            {"use": "checksum.guest"},
            {"use": "sparse.zeros"},
            {"use": "encode.qcow2"},
            {"use": "write.file", "path": str(image)},
        ]
        config.write_text(export_toml(stages, MEMORY))
        return Attempt(
            steps=(one(sys.executable, "-m", "perf.journal", how, str(config)),),
            image=StoredFile(path=image, format="qcow2"),
            environment={"XDG_STATE_HOME": str(ground.folder / "state")},
            explained="    export.toml: qcow2 into a file, which is brought to the medium now and then for the journal",
        )

    return Contender(f"pipeline, journal {how}", prepare)


CASES = (
    Case(
        name="journal",
        summary="an export with its journal (over 1 % of the run on the event loop fails), against none",
        disk="text",
        ours=_exporting("timed"),
        rival=_exporting("off"),
        # The share itself is measured inside; two runs of a virtual machine differ by more than it.
        goals=(Goal("wall ratio", 0.97),),
    ),
)
