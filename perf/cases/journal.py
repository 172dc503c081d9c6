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
        share = ground.folder / "share" if how == "timed" else None
        stages: list[StageTable] = [
            {"use": "read.disk", "path": str(ground.disk)},
            {"use": "checksum.guest"},
            {"use": "sparse.zeros"},
            {"use": "encode.qcow2"},
            {"use": "write.file", "path": str(image)},
        ]
        config.write_text(export_toml(stages, MEMORY))
        return Attempt(
            steps=(one(sys.executable, "-m", "perf.journal", str(share or "off"), str(config)),),
            image=StoredFile(path=image, format="qcow2"),
            environment={"XDG_STATE_HOME": str(ground.folder / "state")},
            share=share,
            explained="    export.toml: qcow2 into a file, which is brought to the medium now and then for the journal",
        )

    return Contender(f"pipeline, journal {how}", prepare)


CASES = (
    Case(
        name="journal",
        summary="for which share of an export its journal holds the event loop; and against none",
        disk="text",
        ours=_exporting("timed"),
        rival=_exporting("off"),
        goals=(Goal("share", 0.01),),
    ),
)
