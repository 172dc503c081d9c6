"""Run the command line with a store that takes few parts: `python -m tests.end_to_end.small_limits PARTS ARGUMENTS...`.

Prints the peak memory of this process (VmHWM, bytes) as the last line on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.flow.orders import PartLimits


def main(arguments: list[str]) -> int:
    """Scale the limits down, run, tell the peak."""
    from pipeline.__main__ import main as run_pipeline
    from stages.store.s3 import S3Client

    limits = PartLimits(parts_max=int(arguments[0]))
    S3Client.limits = property(lambda client: limits)  # type: ignore[method-assign,assignment]
    try:
        sys.argv[1:] = arguments[1:]
        code = run_pipeline()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(peak, file=sys.stderr)
    return code or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
