"""Azurite, the emulator of Azure Blob Storage, over http or TLS.

It checks Shared Key and SAS signatures, block lists, MD5s of blocks, conditions, page alignment. It does not check
the 4 MiB of a page write, nor block CRC64s (it has to be loose to take them at all). It saves its metadata every few
seconds only: after a kill, what was written within the last five is gone, the container too.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import http.client
import json
import shutil
import ssl
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

from stages.store.azure_access import AzureAccess
from tests.stores.install import azurite
from tests.stores.process import Command, ProcessIdentity, ServerError, ServerProcess, fresh_folder, kept_ports, locked
from tests.stores.tls import make_certificate

ACCOUNT = "devstoreaccount1"
# The emulator's own, as published in its documentation; nobody's secret.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
# It saves every 5 s.
_SAVE_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureServer:
    """Where an emulator is, and what a test needs to arrange and look at things."""

    endpoint: str
    ca_file: Path | None

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.endpoint.split(":")[2].partition("/")[0])

    def reached_at(self, origin: str) -> str:
        """The endpoint behind a proxy."""
        return f"{origin}/{ACCOUNT}"

    def connection_string(self, endpoint: str = "", key: str = KEY) -> str:
        """As Azure's portal shows one."""
        return f"AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={endpoint or self.endpoint};"

    def environment(self, endpoint: str = "") -> dict[str, str]:
        """What leads the program here."""
        return {"AZURE_STORAGE_CONNECTION_STRING": self.connection_string(endpoint)}

    def sas(self, container: str, permissions: str = "racwdl") -> str:
        """A signature for one container, for an hour. Source: "Create a service SAS", version 2020-12-06."""
        ends = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        fields = [permissions, "", ends, f"/blob/{ACCOUNT}/{container}", "", "", "", "2020-12-06", "c", *[""] * 7]
        signature = hmac.new(base64.b64decode(KEY), "\n".join(fields).encode(), hashlib.sha256).digest()
        query = {"sv": "2020-12-06", "sr": "c", "sp": permissions, "se": ends}
        text = "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
        return f"{text}&sig={quote(base64.b64encode(signature), safe='')}"

    def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """One signed request below the account: status and body."""
        access = AzureAccess(
            account=ACCOUNT, endpoint=self.endpoint, key=base64.b64decode(KEY), sas="", source="the test"
        )
        about = {"Content-Length": str(len(body)), "Content-Type": "application/octet-stream"}
        length = about if method in ("PUT", "POST") else {}
        url, signed = access.sign(method, f"{self.endpoint}/{path}", {**length, **(headers or {})})
        context = ssl.create_default_context(cafile=self.ca_file) if self.ca_file else None
        asked = urllib.request.Request(url, data=body or None, headers=signed, method=method)
        try:
            with urllib.request.urlopen(asked, context=context) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def create_container(self, name: str) -> str:
        """Returns the name."""
        status, text = self.request("PUT", f"{name}?restype=container")
        assert status == 201, text
        return name

    def put(self, container: str, name: str, body: bytes) -> None:
        """A block blob."""
        status, text = self.request("PUT", f"{container}/{quote(name)}", body, {"x-ms-blob-type": "BlockBlob"})
        assert status == 201, text

    def get(self, container: str, name: str) -> bytes:
        """A whole blob."""
        status, body = self.request("GET", f"{container}/{quote(name)}")
        assert status == 200, body
        return body

    def names(self, container: str, *, uncommitted: bool = True) -> list[str]:
        """Everything in a container; `uncommitted`: also what has blocks alone."""
        query = "restype=container&comp=list" + ("&include=uncommittedblobs" if uncommitted else "")
        text = self.request("GET", f"{container}?{query}")[1].decode()
        return [part.partition("</Name>")[0] for part in text.split("<Name>")[1:]]


class Azurite:
    """One emulator, in a folder and on a port of its own. As a context manager: runs from `with` to its end."""

    def __init__(
        self, folder: Path | None = None, *, with_tls: bool = False, owner: ProcessIdentity | None = None
    ) -> None:
        """Prepare a server; nothing is started, but Azurite is installed where it is not."""
        self.folder = folder or fresh_folder("azurite", owner)
        self._is_folder_ours = folder is None
        (self._port,) = kept_ports(self.folder, 1)
        with locked(self.folder / "setup.lock"):
            self._certificate = make_certificate(self.folder / "tls") if with_tls else None
        arguments = [
            shutil.which("node") or "node",
            str(azurite()),
            *("--silent", "--disableTelemetry", "--skipApiVersionCheck", "--loose"),
            *("--blobHost", "127.0.0.1", "--blobPort", str(self._port), "--location", str(self.folder / "data")),
        ]
        if self._certificate is not None:
            arguments += ["--cert", str(self._certificate.certificate), "--key", str(self._certificate.key)]
        self._process = ServerProcess(
            folder=self.folder,
            commands=[Command(name="azurite", arguments=tuple(arguments))],
            is_ready=self._answers,
            owner=owner,
        )

    @property
    def server(self) -> AzureServer:
        """Where the server is, whether it runs or not."""
        scheme = "https" if self._certificate else "http"
        return AzureServer(
            endpoint=f"{scheme}://127.0.0.1:{self._port}/{ACCOUNT}",
            ca_file=self._certificate.ca if self._certificate else None,
        )

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens when it runs."""
        self._process.start()

    def restart(self) -> None:
        """Kill the server when it runs and start it: same port, and the data that it had saved."""
        self._process.restart()

    def kill(self) -> None:
        """End the server at once."""
        self._process.kill()

    def wait_until_saved(self, count: int) -> None:
        """Wait until this many bytes of blocks that nobody committed would outlive a kill; blocks for up to 5 s."""
        ends = time.monotonic() + _SAVE_DEADLINE_S
        while min(self._saved("blob", "BLOCKS"), self._saved("blob_extent", "EXTENTS")) < count:
            if time.monotonic() > ends:
                raise ServerError(f"{count} bytes of blocks were not saved in {_SAVE_DEADLINE_S:.0f} s")
            time.sleep(0.1)

    def _saved(self, database: str, collection: str) -> int:
        """What the rows of a collection say of their sizes, together; as the last save left it."""
        told = json.loads((self.folder / "data" / f"__azurite_db_{database}__.json").read_text())
        rows = next(one["data"] for one in told["collections"] if one["name"] == f"${collection}_COLLECTION$")
        return sum(row["size"] for row in rows)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._is_folder_ours:
            shutil.rmtree(self.folder)

    def _answers(self) -> bool:
        connection: http.client.HTTPConnection
        if self._certificate:
            context = ssl.create_default_context(cafile=self._certificate.ca)
            connection = http.client.HTTPSConnection("127.0.0.1", self._port, timeout=5, context=context)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return True
