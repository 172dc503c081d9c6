"""nginx as a web server that takes files: WebDAV, bare PUT, basic and bearer authentication, limits, TLS.

What tests need it for: the server that most plain HTTP and WebDAV targets are. It stores a PUT only once it has all of
it, does not know `If-None-Match` on PUT, and answers a PUT below a missing folder with 409.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.stores.process import Command, ProcessIdentity, ServerError, ServerProcess, fresh_folder, kept_ports, locked
from tests.stores.tls import ServerCertificate, make_certificate

USER, PASSWORD, TOKEN = "writer", "it's s/e:cret", "token-of-a-writer"
_MODULE = "/usr/lib/nginx/modules/ngx_http_dav_ext_module.so"

# One process: a worker would outlive a master that is killed. Bodies wait beside the files, so that finishing one is a
# rename.
_CONFIG = """\
load_module {module};
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 200; }}
http {{
    access_log off;
    root {data};
    client_body_temp_path {data}/.bodies;
    client_max_body_size 0;
    server {{
        listen 127.0.0.1:{port};
        listen 127.0.0.1:{tls_port} ssl;
        ssl_certificate {certificate.certificate};
        ssl_certificate_key {certificate.key};
        dav_methods PUT DELETE MKCOL COPY MOVE;
        dav_ext_methods PROPFIND OPTIONS;
        location / {{ }}
        location /private/ {{
            auth_basic "files";
            auth_basic_user_file {folder}/users;
        }}
        location /token/ {{
            if ($http_authorization != "Bearer {token}") {{ return 401; }}
        }}
        location /plain/ {{
            dav_methods PUT DELETE;
            dav_ext_methods off;
        }}
        location /put/ {{
            dav_methods PUT;
            dav_ext_methods off;
        }}
        location /read/ {{
            dav_methods off;
            dav_ext_methods off;
        }}
        location /small/ {{ client_max_body_size 1m; }}
        location /labelled/ {{
            if ($http_x_label != "a label") {{ return 403; }}
        }}
    }}
}}
"""
FOLDERS = ("open", "private", "token", "plain", "put", "read", "small", "labelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class WebServer:
    """Where a server is.

    Attributes:
        data: its files, one folder below for each of FOLDERS: `private` wants USER and PASSWORD, `token` the bearer's
            TOKEN, `plain` knows PUT and DELETE alone, `put` only PUT, `read` neither, `small` takes 1 MiB.
        ca_file: what a client has to trust.
    """

    port: int
    tls_port: int
    data: Path
    ca_file: Path

    def url(self, path: str, scheme: str = "http", port: int = 0) -> str:
        """Of a file; over TLS for https and davs."""
        own = self.tls_port if scheme.endswith("s") else self.port
        return f"{scheme}://127.0.0.1:{port or own}/{path}"


class Nginx:
    """One server, in a folder and on ports of its own. As a context manager: runs from `with` to its end."""

    def __init__(
        self, folder: Path | None = None, *, data: Path | None = None, owner: ProcessIdentity | None = None
    ) -> None:
        """Prepare a server; nothing is started.

        Args:
            data: where its files are, a small disk for example.
        """
        self.folder = folder or fresh_folder("nginx", owner)
        self._is_folder_ours = folder is None
        self._data = data or self.folder / "data"
        self._port, self._tls_port = kept_ports(self.folder, 2)
        with locked(self.folder / "setup.lock"):
            self._certificate = make_certificate(self.folder / "tls")
        program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if program is None or not Path(_MODULE).exists():
            raise ServerError("there is no nginx with dav-ext: python -m tests.tools")
        arguments = (program, "-p", str(self.folder), "-e", "stderr", "-c", str(self.folder / "nginx.conf"))
        self._process = ServerProcess(
            folder=self.folder,
            commands=[Command(name="nginx", arguments=arguments)],
            is_ready=self._answers,
            owner=owner,
        )

    @property
    def server(self) -> WebServer:
        """Where the server is, whether it runs or not."""
        return WebServer(port=self._port, tls_port=self._tls_port, data=self._data, ca_file=self._certificate.ca)

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens when it runs."""
        with locked(self.folder / "setup.lock"):
            if not (self.folder / "nginx.conf").exists():
                self._write_configuration()
        self._process.start()

    def kill(self) -> None:
        """End the server and every connection at once."""
        self._process.kill()

    def restart(self) -> None:
        """Kill the server when it runs and start it: same ports, same files."""
        self._process.restart()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._is_folder_ours:
            shutil.rmtree(self.folder)

    def _write_configuration(self) -> None:
        for name in FOLDERS:
            (self._data / name).mkdir(parents=True, exist_ok=True)
        # Whoever nginx runs as: root's children become "nobody" without a user directive, and have to write here.
        for folder in (self._data, *self._data.iterdir()):
            if folder.is_dir():
                folder.chmod(0o777)
        hashed = base64.b64encode(hashlib.sha1(PASSWORD.encode(), usedforsecurity=False).digest()).decode()
        (self.folder / "users").write_text(f"{USER}:{{SHA}}{hashed}\n")
        certificate: ServerCertificate = self._certificate
        text = _CONFIG.format(
            module=_MODULE,
            folder=self.folder,
            data=self._data,
            port=self._port,
            tls_port=self._tls_port,
            certificate=certificate,
            token=TOKEN,
        )
        (self.folder / "nginx.conf").write_text(text)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=2):
                return True
        except OSError:
            return False
