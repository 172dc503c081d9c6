"""Run a command with a store beside it: `python perf/served.py nginx|azurite|nbdkit|openssh FOLDER -- COMMAND ...`.

For cases whose store the bench does not start by itself. Both contenders pay for starting the server; `{url}` in the
command's words is where the image goes, and other names in braces are what the client needs beside it. All but the
Azure emulator keep it as FOLDER/data/open/image, where it can be compared; nbdkit's has to be there, with its length.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.stores.azurite import Azurite
from tests.stores.nbd import NbdServer
from tests.stores.nginx import Nginx
from tests.stores.openssh import OpenSsh

CONTAINER = "perf"

# Words to put in, by name, and variables.
Way = tuple[Mapping[str, str], Mapping[str, str]]


@contextmanager
def _nginx(folder: Path) -> Iterator[Way]:
    with Nginx(folder) as nginx:
        yield {"url": nginx.server.url("open/image")}, {}


@contextmanager
def _azurite(folder: Path) -> Iterator[Way]:
    with Azurite(folder) as azurite:
        server = azurite.server
        server.create_container(CONTAINER)
        # By a signed URL: with account and key, rclone makes a host name of the account, which an address can't have.
        signed = f"{server.endpoint}/{CONTAINER}?{server.sas(CONTAINER)}"
        rclone = {"RCLONE_CONFIG_AZ_TYPE": "azureblob", "RCLONE_CONFIG_AZ_SAS_URL": signed}
        yield {"url": f"{CONTAINER}/image"}, {**server.environment(), **rclone}


@contextmanager
def _nbdkit(folder: Path) -> Iterator[Way]:
    with NbdServer("nbdkit", "file", folder / "data" / "open" / "image") as server:
        yield {"url": server.url()}, {}


@contextmanager
def _openssh(folder: Path) -> Iterator[Way]:
    with OpenSsh(folder) as openssh:
        server = openssh.server
        (server.data / "open").mkdir(exist_ok=True)
        scp = f"scp://{server.user}@127.0.0.1:{server.port}/{server.remote}/open/image"
        more = {"scp": scp, "identity": str(server.identity), "known_hosts": str(server.known_hosts)}
        yield {"url": server.url("open/image"), **more}, {}


_SERVERS = {"nginx": _nginx, "azurite": _azurite, "nbdkit": _nbdkit, "openssh": _openssh}


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    kind, folder, separator, *command = arguments
    if kind not in _SERVERS or separator != "--" or not command:
        print(f"served.py {'|'.join(_SERVERS)} FOLDER -- COMMAND ...", file=sys.stderr)
        return 2
    place = Path(folder).absolute()
    place.mkdir(parents=True, exist_ok=True)
    with _SERVERS[kind](place) as (known, environment):
        words = [reduce(lambda text, name: text.replace(f"{{{name}}}", known[name]), known, word) for word in command]
        return subprocess.run(words, env={**os.environ, **environment}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
