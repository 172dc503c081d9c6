"""The command line with little patience for a dead store: `python -m tests.end_to_end.impatient ARGUMENTS...`.

A request that goes nowhere is given up after 1 s and not repeated later than 4 s after the last sign of life, instead
of 30 s and 100 s.
"""

from __future__ import annotations

import sys
from functools import partial


def main() -> int:
    """Shorten, and run."""
    from pipeline.__main__ import main as run_pipeline
    from pipeline.flow import retry
    from stages.store import http

    http.Timeouts = partial(http.Timeouts, connect_s=1.0, progress_s=1.0)  # type: ignore[misc,assignment]
    retry.RetryPolicy = partial(retry.RetryPolicy, deadline_s=4.0)  # type: ignore[misc,assignment]
    run_pipeline(prog_name="pipeline")
    return 0


if __name__ == "__main__":
    sys.exit(main())
