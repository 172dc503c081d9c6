"""An emulator of Google Cloud Storage's JSON interface.

It knows resumable uploads (308, Range, `bytes */*`, unknown total), CRC32C and MD5 in its answers, ranges. It checks no
token, no `ifGenerationMatch`, no checksum of ours, answers 501 to a cancelled session, and holds objects in memory.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from tests.stores.install import programs
from tests.stores.process import Command, ProcessIdentity, ServerProcess, fresh_folder, kept_ports


@dataclass(frozen=True, slots=True, kw_only=True)
class GcsServer:
    """Where an emulator is, and what a test needs to arrange and look at things."""

    port: int

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(self.endpoint + path, data=body, headers=headers, method=method)
        with urllib.request.urlopen(asked) as reply:
            data: bytes = reply.read()
            return data

    def create_bucket(self, name: str) -> str:
        """Returns the name."""
        self._ask("POST", "/storage/v1/b?project=tests", json.dumps({"name": name}).encode())
        return name

    def names(self, bucket: str) -> list[str]:
        """Every object."""
        told: dict[str, Any] = json.loads(self._ask("GET", f"/storage/v1/b/{bucket}/o"))
        return sorted(item["name"] for item in told.get("items", ()))

    def get(self, bucket: str, name: str) -> bytes:
        """A whole object."""
        return self._ask("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media")


class GcsEmulator:
    """One emulator, in a folder and on a port of its own. As a context manager: runs from `with` to its end."""

    def __init__(self, folder: Path | None = None, *, owner: ProcessIdentity | None = None) -> None:
        """Prepare it; nothing is started, but it is installed where it is not."""
        self.folder = folder or fresh_folder("gcs", owner)
        self._is_folder_ours = folder is None
        (self._port,) = kept_ports(self.folder, 1)
        program = str(programs("gcp") / "gcp-storage-emulator")
        words = (program, "start", "--host", "127.0.0.1", "--port", str(self._port), "--in-memory")
        self._process = ServerProcess(
            folder=self.folder,
            commands=[Command(name="gcs", arguments=words)],
            is_ready=self._answers,
            owner=owner,
        )

    @property
    def server(self) -> GcsServer:
        """Where it is, whether it runs or not."""
        return GcsServer(port=self._port)

    def start(self) -> None:
        """Start it and wait until it answers; nothing happens when it runs."""
        self._process.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        if self._is_folder_ours:
            shutil.rmtree(self.folder)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/storage/v1/b?project=tests", timeout=5):
                return True
        except OSError:
            return False
