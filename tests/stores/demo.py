"""Run a command with an S3 store beside it: `python -m tests.stores.demo [--folder DIR] -- COMMAND ARGUMENTS...`.

The store is SeaweedFS from PyPI with an empty bucket `images`; the command finds it by the AWS_* variables in its
environment. When the command ends the store ends, and the command's exit code is this one's.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tests.stores.process import end_run, sweep
from tests.stores.seaweedfs import SeaweedFs

BUCKET = "images"


def run_beside_store(command: Sequence[str], folder: Path | None) -> int:
    """Run a command with a store for it; returns its exit code, 128 + N where signal N ended it.

    Args:
        folder: keeps the store's data from one run to the next; without one they are gone when the command ended.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with SeaweedFs(folder and folder.absolute(), with_tls=False) as store:
        store.server.create_bucket(BUCKET)
        process = subprocess.Popen(command, env=os.environ | store.server.environment())

        def pass_on(number: int, _: FrameType | None) -> None:
            # A Ctrl-C on the terminal reaches the command by itself; the store must stay until it has cleaned up.
            if number != signal.SIGINT:
                process.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        code = process.wait()
        return code if code >= 0 else 128 - code


def main(arguments: list[str]) -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.stores.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep the store's data here")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --, with its arguments")
    given = parser.parse_args(arguments)
    sweep()
    try:
        return run_beside_store(given.command, given.folder)
    except FileNotFoundError as error:
        print(f"cannot run {error.filename}: not found", file=sys.stderr)
        return 127
    finally:
        end_run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
