"""Run a command with a web server or the Azure emulator beside it: `python perf/served.py nginx FOLDER -- COMMAND ...`.

For cases whose store the bench does not start by itself. Both contenders pay for starting the server; `{url}` in the
command's words is where the image goes. nginx keeps it as FOLDER/data/open/image, where it can be compared.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.stores.azurite import ACCOUNT, KEY, Azurite
from tests.stores.nginx import Nginx

CONTAINER = "perf"


@contextmanager
def _nginx(folder: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    with Nginx(folder) as nginx:
        yield nginx.server.url("open/image"), {}


@contextmanager
def _azurite(folder: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    with Azurite(folder) as azurite:
        server = azurite.server
        server.create_container(CONTAINER)
        rclone = {"TYPE": "azureblob", "ACCOUNT": ACCOUNT, "KEY": KEY, "ENDPOINT": server.endpoint.rpartition("/")[0]}
        given = {f"RCLONE_CONFIG_AZ_{name}": value for name, value in rclone.items()}
        yield f"{CONTAINER}/image", {**server.environment(), **given}


_SERVERS = {"nginx": _nginx, "azurite": _azurite}


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    kind, folder, separator, *command = arguments
    if kind not in _SERVERS or separator != "--" or not command:
        print(f"served.py {'|'.join(_SERVERS)} FOLDER -- COMMAND ...", file=sys.stderr)
        return 2
    place = Path(folder).absolute()
    place.mkdir(parents=True, exist_ok=True)
    with _SERVERS[kind](place) as (url, environment):
        words = [word.replace("{url}", url) for word in command]
        return subprocess.run(words, env={**os.environ, **environment}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
