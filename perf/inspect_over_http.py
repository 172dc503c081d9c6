"""Inspect a large image over HTTP once: `python -m perf.inspect_over_http IMAGE COMMAND...`.

Serves IMAGE on a port of loopback and runs COMMAND with its URL. Fails when the command does, or when more than 32 MiB
were moved. The time of the process is that of the command and 0.1 to 0.2 s of the server's start.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MOVED_MAX = 32 << 20


def main() -> None:
    """Say what was moved on stderr."""
    from tests.stores.ranged import ranged_server

    image, *command = sys.argv[1:]
    with ranged_server(image=Path(image)) as server:
        done = subprocess.run([*command, f"{server.url}/image"], stdout=subprocess.PIPE, text=True, check=False)
        moved = server.sent_bytes
        asked = len(server.asked)
    print(f"moved {moved} bytes in {asked} requests", file=sys.stderr)
    if done.returncode or "clean" not in done.stdout:
        sys.exit(f"the command exits {done.returncode}: {done.stdout}")
    if moved >= MOVED_MAX:
        sys.exit(f"more than {MOVED_MAX} bytes were moved")


if __name__ == "__main__":
    main()
