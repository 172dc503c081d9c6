"""The product with its journal timed, or without one: `python -m perf.journal SHARE|off`, then arguments of `run`.

With the name of a file it adds up what every call of the journal took on the event loop, and what bringing it to the
medium took in threads, says so in a line on stderr and writes there for which share of the run the loop was held up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.flow.resume import RunJournal

_ON_THE_LOOP = (
    "take_point",
    "take_outer_point",
    "note_upload",
    "note_part",
    "note_mark",
    "drop_parts",
    "note_published",
)


def main() -> int:
    """Run the export; returns its exit code, 1 when it had no journal."""
    how, *arguments = sys.argv[1:]
    spent = {"loop": 0.0, "threads": 0.0}
    calls = 0

    def timed(call: Callable[..., Any], where: str) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            begun = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                spent[where] += time.perf_counter() - begun

        return run

    for name in _ON_THE_LOOP:
        setattr(RunJournal, name, timed(getattr(RunJournal, name), "loop"))
    RunJournal._sync = timed(RunJournal._sync, "threads")  # type: ignore[method-assign]  # the seam
    from pipeline.__main__ import main as run_pipeline

    begun = time.perf_counter()
    options = [] if how != "off" else ["--set", "export.journal=off"]
    code = 0
    try:
        code = run_pipeline(["run", *arguments, *options], prog_name="pipeline", standalone_mode=False) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    took = time.perf_counter() - begun
    if how != "off":
        share = spent["loop"] / took
        print(
            f"{calls} calls of the journal held the loop for {spent['loop'] * 1000:.1f} ms, "
            f"{share:.3%} of {took:.2f} s; the medium took {spent['threads'] * 1000:.1f} ms in threads",
            file=sys.stderr,
        )
        if not calls:
            return 1
        Path(how).write_text(repr(share))
    return code


if __name__ == "__main__":
    sys.exit(main())
