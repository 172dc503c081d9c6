"""Run the command line and be killed: `python -m tests.end_to_end.killed_run RECORD ARGUMENTS...`.

SIGKILL strikes right after the RECORD-th record of the journal was written, counting its rewriting as one too; with 0
it never does. Parts are as small as S3 allows, and the journal notes everything at every window, so that a disk of a
few MiB has what happens to a large one.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def main(arguments: list[str]) -> int:
    """Scale everything down, arm the kill, run."""
    from pipeline.__main__ import main as run_pipeline
    from pipeline.flow import resume
    from pipeline.flow.journal import RecordLog
    from stages.write import parts, ranges

    parts.BASE_PART = 5 << 20
    resume.POINT_EVERY_S = 0.0
    resume.POINT_SHARE = 0
    ranges._MARK_EVERY_S = 0.002
    ranges._MARK_SHARE = 0
    left = int(arguments[0])
    _tell_writes()

    def armed(call: Callable[..., None]) -> Callable[..., None]:
        def counted(log: RecordLog, *given: Any, **named: Any) -> None:
            nonlocal left
            call(log, *given, **named)
            if log.path.suffix == ".journal":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        return counted

    RecordLog.append = armed(RecordLog.append)  # type: ignore[method-assign]
    RecordLog.rewrite = armed(RecordLog.rewrite)  # type: ignore[method-assign]
    try:
        sys.argv[1:] = arguments[1:]
        code = run_pipeline()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    return code or 0


def _tell_writes() -> None:
    """Write down every write into a file: TEST_SENT names where."""
    path = os.environ.get("TEST_SENT")
    if not path:
        return
    from stages.write.file import FileWriter
    from stages.write.sftp import SftpWriter

    told = open(path, "a", buffering=1)  # noqa: SIM115  # until the process ends, which is a kill

    def telling(kind: Any) -> None:
        write = kind.write

        async def tell(self: Any, parts: Any) -> None:
            for offset, view in parts:
                told.write(f"{offset} {view.nbytes}\n")
            await write(self, parts)

        kind.write = tell

    telling(FileWriter)
    telling(SftpWriter)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
