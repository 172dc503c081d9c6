"""The product with its events timed, or silent: `python -m perf.events SHARE|silent`, then arguments of `pipeline run`.

With the name of a file it adds up what every event took with all its subscribers, says so in a line on stderr and
writes its share of the run's processor time there. `silent` emits nothing: the same run without them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pipeline.events import Event, EventStream


def main() -> int:
    """Run the export; returns its exit code."""
    how, *arguments = sys.argv[1:]
    spent = 0.0
    emitted = 0
    emit = EventStream.emit

    def timed(self: EventStream, event: Event) -> None:
        nonlocal spent, emitted
        # Processor time of this thread: on the wall it would also wait for the interpreter lock that workers hold.
        begun = time.thread_time()
        emit(self, event)
        spent += time.thread_time() - begun
        emitted += 1

    def silent(self: EventStream, event: Event) -> None:
        pass

    EventStream.emit = silent if how == "silent" else timed  # type: ignore[method-assign]  # the seam
    from pipeline.__main__ import main as run_pipeline

    code = 0
    try:
        code = run_pipeline(["run", *arguments], prog_name="pipeline", standalone_mode=False) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    used = time.process_time()
    if how != "silent":
        print(f"{emitted} events took {spent * 1000:.1f} ms, {spent / used:.3%} of {used:.2f} cpu s", file=sys.stderr)
        Path(how).write_text(repr(spent / used))
    return code


if __name__ == "__main__":
    sys.exit(main())
