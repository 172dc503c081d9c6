"""Run an export up to its first byte: `python -m perf.first_read EXPORT.TOML ...`, as `pipeline run`.

The process ends with 0 as soon as the source has filled its first buffer, so the time it takes is the time from the
start of the program to the first byte read. Nothing is cleaned up: the target is a temporary file of the benchmark.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from pipeline.flow.items import Block


def main() -> None:
    """Stop at the first load; 1 when the run ended before."""
    from stages.read.disk import DiskReader

    load = DiskReader.load

    def load_and_end(self: DiskReader, block: Block, buffer: memoryview) -> None:
        load(self, block, buffer)
        os._exit(0)

    # A state of its own: the run that ended here before is not one to go on with.
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(dir=Path(sys.argv[1]).parent)
    DiskReader.load = load_and_end  # type: ignore[method-assign]  # the seam between program and disk
    from pipeline.__main__ import main as run_pipeline

    run_pipeline(["run", *sys.argv[1:]], prog_name="pipeline", standalone_mode=False)
    sys.exit("the run ended before anything was read")


if __name__ == "__main__":
    main()
