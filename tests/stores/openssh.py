"""OpenSSH's server with nothing but SFTP: own configuration, own host key, one login by key.

What tests need it for: the server that nearly every SFTP target is, with its extensions (limits@, fsync@,
posix-rename@, statvfs@), its refusal to rename over a file, and connections that can be killed.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.stores.process import Command, ProcessIdentity, ServerError, ServerProcess, fresh_folder, kept_ports, locked

# UsePAM no and StrictModes no: neither the machine's logins nor the modes of the test's folders matter.
# MaxStartups: clean-up tests connect often. ForceCommand: sessions are SFTP, whatever the client asks for.
_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 100
LogLevel VERBOSE
Subsystem sftp internal-sftp -d {data}
{more}
"""

_CHROOTED = """\
ChrootDirectory {root}
ForceCommand internal-sftp -d /data
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SftpServer:
    """Where a server is, and how to get in.

    Attributes:
        data: its folder for files, as this machine sees it; `remote` as the client does.
        identity: a private key that opens it; `stranger` is one that does not.
        known_hosts: has its host key.
    """

    port: int
    user: str
    data: Path
    remote: str
    identity: Path
    stranger: Path
    known_hosts: Path
    host_key: Path

    def url(self, name: str, *, port: int = 0) -> str:
        """Of a file in its folder."""
        return f"sftp://{self.user}@127.0.0.1:{port or self.port}{self.remote}/{name}"

    def knows(self, port: int, path: Path) -> Path:
        """A known_hosts file that has its key for another port, as behind a proxy."""
        key = self.host_key.with_suffix(".pub").read_text().split()
        path.write_text(f"[127.0.0.1]:{port} {key[0]} {key[1]}\n")
        return path


class OpenSsh:
    """One server, in a folder and on a port of its own. As a context manager: runs from `with` to its end."""

    def __init__(
        self, folder: Path | None = None, *, chroot: Path | None = None, owner: ProcessIdentity | None = None
    ) -> None:
        """Prepare a server; nothing is started.

        Args:
            chroot: all that clients see, root's alone; files are in `data` inside of it.
        """
        self.folder = folder or fresh_folder("openssh", owner)
        self._is_folder_ours = folder is None
        (self._port,) = kept_ports(self.folder, 1)
        self._chroot = chroot
        self._data = chroot / "data" if chroot else self.folder / "data"
        program = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if program is None:
            raise ServerError("there is no sshd: python -m tests.tools")
        # -D: stay in the foreground; -e: log to stderr. By its full path, which it wants to start itself again.
        self._process = ServerProcess(
            folder=self.folder,
            commands=[Command(name="sshd", arguments=(program, "-D", "-e", "-f", str(self.folder / "sshd_config")))],
            is_ready=self._answers,
            owner=owner,
        )

    @property
    def server(self) -> SftpServer:
        """Where the server is, whether it runs or not."""
        return SftpServer(
            port=self._port,
            user=getpass.getuser(),
            data=self._data,
            remote="/data" if self._chroot else str(self._data),
            identity=self.folder / "identity",
            stranger=self.folder / "stranger",
            known_hosts=self.folder / "known_hosts",
            host_key=self.folder / "host_key",
        )

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens when it runs."""
        with locked(self.folder / "setup.lock"):
            if not (self.folder / "sshd_config").exists():
                self._write_configuration()
        # Where sshd keeps its privilege separation; a package's service makes it, and here is no service.
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self._process.start()

    def kill(self) -> None:
        """End the server and every connection at once, as kill -9 of all of it does."""
        self._process.kill()
        self.cut()

    def restart(self) -> None:
        """Kill the server when it runs and start it: same port, same data."""
        self.kill()
        self._process.start()

    def cut(self) -> int:
        """Kill every connection, but not the server; returns how many. They are sshd's children, and outlive it."""
        cut = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "comm").read_text().strip() != "sshd" or not _serves(process, self._port):
                    continue
                os.kill(int(process.name), 9)
                cut += 1
            except (OSError, ValueError):
                continue
        return cut

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._is_folder_ours:
            shutil.rmtree(self.folder)

    def _write_configuration(self) -> None:
        self._data.mkdir(parents=True, exist_ok=True)
        for name in ("host_key", "identity", "stranger"):
            key = self.folder / name
            if not key.exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", key], check=True)
        shutil.copy(self.folder / "identity.pub", self.folder / "authorized_keys")
        self.server.knows(self._port, self.folder / "known_hosts")
        more = _CHROOTED.format(root=self._chroot) if self._chroot else ""
        text = _CONFIG.format(port=self._port, folder=self.folder, data=self.server.remote, more=more)
        (self.folder / "sshd_config").write_text(text)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=2) as connection:
                return connection.recv(8).startswith(b"SSH-2.0")
        except OSError:
            return False


def _serves(process: Path, port: int) -> bool:
    """Whether the process has an established connection on this local port."""
    inodes = set()
    for line in (process / "net" / "tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "01":
            inodes.add(fields[9])
    for descriptor in (process / "fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:[") and target[8:-1] in inodes:
            return True
    return False
