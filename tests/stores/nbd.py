"""NBD servers: nbdkit with its plugins and filters, and qemu-nbd, on a port or a Unix socket of their own.

What tests need them for: two servers that share no code, one that forgets everything when it is killed (memory), one
with images behind it, errors and delays on demand, TLS by certificates.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from tests.stores.process import Command, ProcessIdentity, ServerError, ServerProcess, free_ports, fresh_folder
from tests.stores.tls import make_certificate


@dataclass(frozen=True, slots=True)
class NbdFolder:
    """A server whose exports are the files of a folder, by their names."""

    folder: Path
    server: NbdServer

    def url(self, export: str) -> str:
        """Of a file."""
        return self.server.url(export)


class NbdServer:
    """One server, in a folder of its own. As a context manager: runs from `with` to its end."""

    def __init__(
        self,
        kind: Literal["nbdkit", "qemu-nbd"],
        *arguments: str | Path,
        on: Literal["port", "socket"] = "port",
        with_tls: bool = False,
        with_client_certificates: bool = False,
        owner: ProcessIdentity | None = None,
    ) -> None:
        """Prepare a server; nothing is started.

        Args:
            arguments: plugin, filters and their settings; for qemu-nbd its options and the image.
            with_client_certificates: who has none is refused.
        """
        self.folder = fresh_folder(kind, owner)
        (self.port,) = free_ports(1)
        # A path of a socket has 107 bytes at most.
        self.socket = self.folder / "s"
        self._on = on
        self._with_tls = with_tls
        if with_tls:
            self._make_certificates()
        program = shutil.which(kind)
        if program is None:
            raise ServerError(f"there is no {kind}: python -m tests.tools")
        own: Sequence[str | Path]
        if kind == "nbdkit":
            place: tuple[str | Path, ...] = ("-i", "127.0.0.1", "-p", str(self.port))
            place = place if on == "port" else ("-U", self.socket)
            tls = ("--tls=require", f"--tls-certificates={self.folder / 'tls'}") if with_tls else ()
            verify = ("--tls-verify-peer",) if with_client_certificates else ()
            own = ("-f", "--exit-with-parent", *place, *tls, *verify)
        else:
            place = ("-b", "127.0.0.1", "-p", str(self.port)) if on == "port" else ("-k", self.socket)
            own = ("-t", "-e", "16", "--discard=unmap", *place)
        words = (program, *(str(word) for word in (*own, *arguments)))
        self.process = ServerProcess(
            folder=self.folder,
            commands=[Command(name=kind, arguments=words)],
            is_ready=self._answers,
            owner=owner,
        )

    @property
    def certificates(self) -> Path:
        """A folder as `tls-certificates` names one, for clients that the server trusts."""
        return self.folder / "tls"

    def url(self, export: str = "", *, port: int = 0) -> str:
        """Of an export."""
        scheme = "nbds" if self._with_tls else "nbd"
        tls = f"tls-certificates={self.certificates}" if self._with_tls else ""
        if self._on == "socket":
            return f"{scheme}+unix:///{export}?socket={self.socket}" + (f"&{tls}" if tls else "")
        return f"{scheme}://127.0.0.1:{port or self.port}/{export}" + (f"?{tls}" if tls else "")

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()

    def restart(self) -> None:
        """Kill it when it runs and start it again: same place, and the data that it did not keep in memory."""
        self.process.kill()
        self.socket.unlink(missing_ok=True)
        self.process.start()

    def __enter__(self) -> Self:
        self.process.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and not self.process.is_running():
            error.add_note(f"the server had ended by itself; {self.process.log_tail()}")
        self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_certificates(self) -> None:
        made = make_certificate(self.folder / "made")
        self.certificates.mkdir()
        for source, name in (
            (made.ca, "ca-cert.pem"),
            (made.certificate, "server-cert.pem"),
            (made.key, "server-key.pem"),
            (made.certificate, "client-cert.pem"),
            (made.key, "client-key.pem"),
        ):
            shutil.copy(source, self.certificates / name)

    def _answers(self) -> bool:
        family = socket.AF_INET if self._on == "port" else socket.AF_UNIX
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.settimeout(2)
                probe.connect(("127.0.0.1", self.port) if self._on == "port" else str(self.socket))
                return probe.recv(8) == b"NBDMAGIC"
        except OSError:
            return False
