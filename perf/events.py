"""The product with its events timed, or silent: `python -m perf.events timed|silent`, then arguments of `pipeline run`.

`timed` adds up what every event took with all its subscribers, says so in a line on stderr and fails when that was more
than 1 % of the processor time of the run. `silent` emits nothing: the same run without them.
"""

from __future__ import annotations

import sys
import time

from pipeline.events import Event, EventStream

LIMIT = 0.01


def main() -> int:
    """Run the export; 1 when it failed or its events took more than their share."""
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

    EventStream.emit = timed if how == "timed" else silent  # type: ignore[method-assign]  # the seam
    from pipeline.__main__ import main as run_pipeline

    code = 0
    try:
        code = run_pipeline(["run", *arguments], prog_name="pipeline", standalone_mode=False) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    used = time.process_time()
    if how == "timed":
        print(f"{emitted} events took {spent * 1000:.1f} ms, {spent / used:.3%} of {used:.2f} cpu s", file=sys.stderr)
        if spent > LIMIT * used:
            return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
