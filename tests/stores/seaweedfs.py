"""SeaweedFS with its S3 interface, over http and over TLS with an authority of its own: one Go program.

What tests need it for: it knows CRC64NVME, full-object checksums and conditional writes, and `make demo` needs pip
alone for it.
"""

from __future__ import annotations

import http.client
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Self

from tests.stores.install import programs
from tests.stores.process import Command, ProcessIdentity, ServerProcess, fresh_folder, kept_ports, locked
from tests.stores.s3 import Credentials, S3Server
from tests.stores.tls import ServerCertificate, make_certificate

_ADMIN = Credentials(access_key="writer", secret_key="writer-secret")
_LIMITED = Credentials(access_key="reader", secret_key="reader-secret")

_IDENTITIES = {
    "identities": [
        {
            "name": "writer",
            "credentials": [{"accessKey": _ADMIN.access_key, "secretKey": _ADMIN.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": _LIMITED.access_key, "secretKey": _LIMITED.secret_key}],
            "actions": ["Read", "List"],
        },
    ]
}

# A bucket takes 7 volumes unless told; with one each, tests may have as many buckets as `-volume.max`.
_MASTER_TOML = "[master.volume_growth]\ncopy_1 = 1\n"
_VOLUMES = 1000

# The port of each listener, in the order of `kept_ports`; what is not given here would be a fixed port, or that plus
# 10000.
_LISTENERS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port.grpc",
    "s3.port",
    "s3.port.https",
)


class SeaweedFs:
    """One SeaweedFS, in a folder and on ports of its own. As a context manager: runs from `with` to its end.

    A folder that was not given is removed at that end, data and logs.
    """

    def __init__(
        self, folder: Path | None = None, *, owner: ProcessIdentity | None = None, with_tls: bool = True
    ) -> None:
        """Prepare a server; nothing is started, but SeaweedFS is installed where it is not.

        Args:
            folder: one in the cache where none is given.
            owner: the process that the server ends with; this one where none is given.
            with_tls: listen with TLS too; needs the openssl program.
        """
        self.folder = folder or fresh_folder("seaweedfs", owner)
        self._is_folder_ours = folder is None
        self._ports = dict(zip(_LISTENERS, kept_ports(self.folder, len(_LISTENERS)), strict=True))
        with locked(self.folder / "setup.lock"):
            self._certificate = make_certificate(self.folder / "tls") if with_tls else None
        # It makes these whatever it is told, and leaves them when it is killed.
        sockets = [
            Path(f"/tmp/seaweedfs-{name.partition('.')[0]}-grpc-{port}.sock")
            for name, port in self._ports.items()
            if name.endswith(".grpc")
        ]
        self._process = ServerProcess(
            folder=self.folder,
            commands=[self._command()],
            is_ready=self._answers,
            owner=owner,
            leftovers=sockets,
        )

    @property
    def server(self) -> S3Server:
        """Where the server is over http, whether it runs or not."""
        return S3Server(
            name="seaweedfs",
            endpoint=f"http://127.0.0.1:{self._ports['s3.port']}",
            region="us-east-1",
            credentials=_ADMIN,
            limited=_LIMITED,
        )

    @property
    def tls_server(self) -> S3Server:
        """The same server over https, with the `ca_file` that a client needs."""
        assert self._certificate is not None, "started without TLS"
        return replace(
            self.server, endpoint=f"https://127.0.0.1:{self._ports['s3.port.https']}", ca_file=self._certificate.ca
        )

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens when it runs."""
        with locked(self.folder / "setup.lock"):
            if not (self.folder / "data").exists():
                self._write_master_log()
                (self.folder / "master.toml").write_text(_MASTER_TOML)
                (self.folder / "identities.json").write_text(json.dumps(_IDENTITIES))
        self._process.start()

    def stop(self) -> None:
        """End the server; it is asked first, and killed after 3 s, because it takes 15."""
        self._process.stop()

    def kill(self) -> None:
        """End the server at once, as kill -9 does."""
        self._process.kill()

    def restart(self) -> None:
        """Kill the server when it runs and start it: same port, same data."""
        self._process.restart()

    def is_running(self) -> bool:
        """True while the server runs."""
        return self._process.is_running()

    def resident_bytes(self) -> int:
        """Memory that the server holds now."""
        return self._process.resident_bytes()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._is_folder_ours:
            shutil.rmtree(self.folder)

    def _command(self) -> Command:
        tls = _tls_arguments(self._certificate) if self._certificate else ()
        ports = tuple(f"-{name}={port}" for name, port in self._ports.items() if tls or name != "s3.port.https")
        arguments = (
            str(programs("seaweedfs") / "weed"),
            "server",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-dir=data",
            "-filer",
            "-s3",
            *ports,
            *tls,
            "-s3.config=identities.json",
            # Relative: a socket's path may not be longer than 107 bytes.
            "-filer.localSocket=filer.sock",
            "-s3.localSocket=s3.sock",
            "-s3.autoCreateBucket=false",  # A test of a missing bucket wants it missing.
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-volume.max={_VOLUMES}",
            "-volume.preStopSeconds=0",
            "-master.volumeSizeLimitMB=1024",
            "-master.telemetry=false",
            # See `_write_master_log`. With the default of 10 s a restarted store took 13 to 22 s to work again.
            "-master.electionTimeout=100ms",
        )
        # Without a memory limit it took 2.9 GiB under load.
        return Command(name="weed", arguments=arguments, environment={"GOMEMLIMIT": "768MiB"})

    def _write_master_log(self) -> None:
        """Write the raft log of a master that is its own and only peer, as a first start leaves it.

        A master without a log waits 1.5 to 1.9 s before it makes itself the leader. The volume server asks for the
        leader once at 1.8 s, and when it is too early again after 5 s: a first start took 3.3 or 7.0 s by chance. A
        master with a log leads after 0.2 s, and every start takes 2.4 s.

        Source: goraft log_entry.go: length in hexadecimal, then a protobuf of index (1), command name (3), command (4).
        """
        http, grpc = self._ports["master.port"], self._ports["master.port.grpc"]
        join = f'{{"name":"127.0.0.1:{http}.{grpc}","connectionString":"127.0.0.1:{grpc}"}}\n'.encode()
        entry = b"\x08\x01" + b"\x1a\x09raft:join" + b"\x22" + bytes([len(join)]) + join
        folder = self.folder / "data" / f"m{http}"
        (folder / "snapshot").mkdir(parents=True)
        (folder / "log").write_bytes(b"%8x\n" % len(entry) + entry)
        (folder / "conf").write_text('{"commitIndex":1,"peers":[]}')

    def _answers(self) -> bool:
        # The S3 port is open a second before the store works, and /healthz answers before a restarted store knows its
        # volumes: reads then fail with InternalError.
        if _get(self._ports["s3.port"], "/healthz") is None:
            return False
        status = _get(self._ports["master.port"], "/dir/status")
        return status is not None and json.loads(status)["Topology"]["Max"] > 0


def _tls_arguments(certificate: ServerCertificate) -> tuple[str, ...]:
    return f"-s3.cert.file={certificate.certificate}", f"-s3.key.file={certificate.key}"


def _get(port: int, path: str) -> bytes | None:
    """The body of a 200; None for any other answer, or none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
