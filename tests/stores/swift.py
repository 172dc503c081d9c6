"""OpenStack Swift with its S3 interface: four small Python servers, one replica, data in plain files.

What tests need it for: an S3 implementation that shares nothing with SeaweedFS. It checks signatures and every checksum
of a request, keeps the order of parts as S3 says (any order, gaps, replaced parts), refuses parts under 5 MiB, and
forgets an upload once it is completed or aborted.
"""

from __future__ import annotations

import getpass
import http.client
import os
import shutil
import subprocess
from pathlib import Path
from typing import Self

from tests.stores.install import programs
from tests.stores.process import Command, ProcessIdentity, ServerError, ServerProcess, fresh_folder, kept_ports, locked
from tests.stores.s3 import Credentials, S3Server

# Parts of an upload; S3's own limit. Swift's defaults are 1000 in both places.
MAX_PARTS = 10_000

_ADMIN = Credentials(access_key="test:writer", secret_key="writer-secret")
_LIMITED = Credentials(access_key="test:stranger", secret_key="stranger-secret")
_BACKENDS = ("account", "container", "object")
# Without the usual `cache`: that is memcached on its standard port, where a developer's machine may run somebody
# else's.
_PIPELINE = (
    "catch_errors proxy-logging healthcheck listing_formats bulk s3api tempauth copy slo dlo proxy-logging proxy-server"
)

_SWIFT_CONF = """\
[swift-hash]
swift_hash_path_suffix = tests
"""

# workers = 0: with 1 a server forks, and the child survives a kill -9 of its parent.
_COMMON = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {folder}
workers = 0
log_level = WARNING
"""

_BACKEND_CONF = """\
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
disable_fallocate = true
eventlet_tpool_num_threads = 4

[pipeline:main]
pipeline = healthcheck {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}

[filter:healthcheck]
use = egg:swift#healthcheck
"""

_PROXY_CONF = """\

[pipeline:main]
pipeline = {pipeline}

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true

[filter:s3api]
use = egg:swift#s3api
location = us-east-1
max_upload_part_num = {max_parts}

[filter:slo]
use = egg:swift#slo
max_manifest_segments = {max_parts}

[filter:tempauth]
use = egg:swift#tempauth
user_{admin_user} = {admin_secret} .admin
user_{limited_user} = {limited_secret}

[filter:proxy-logging]
use = egg:swift#proxy_logging
access_log_name = access
"""

_PLAIN_FILTERS = {
    "catch_errors": "catch_errors",
    "healthcheck": "healthcheck",
    "listing_formats": "listing_formats",
    "bulk": "bulk",
    "copy": "copy",
    "dlo": "dlo",
}

# The part power of 4 makes 16 partitions on the one device: enough for any test, and few folders.
_MAKE_RINGS = """\
import sys
from swift.common.ring import RingBuilder
folder = sys.argv[1]
for kind, port in zip(("account", "container", "object"), sys.argv[2:]):
    builder = RingBuilder(4, 1, 0)
    builder.add_dev(dict(id=0, region=1, zone=1, ip="127.0.0.1", port=int(port), device="disk", weight=1))
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")
"""


class Swift:
    """One Swift, in a folder and on ports of its own. As a context manager: runs from `with` to its end.

    A folder that was not given is removed at that end, data and logs.
    """

    def __init__(self, folder: Path | None = None, *, owner: ProcessIdentity | None = None) -> None:
        """Prepare a server; nothing is started, but Swift is installed where it is not.

        Args:
            folder: on a file system with extended attributes; one in the cache where none is given.
            owner: the process that the server ends with; this one where none is given.
        """
        self.folder = folder or fresh_folder("swift", owner)
        self._is_folder_ours = folder is None
        self._programs = programs("swift")
        *self._backend_ports, self._port = kept_ports(self.folder, len(_BACKENDS) + 1)
        self._process = ServerProcess(
            folder=self.folder,
            commands=[self._command(kind) for kind in (*_BACKENDS, "proxy")],
            is_ready=self._answers,
            owner=owner,
        )

    @property
    def server(self) -> S3Server:
        """Where the server is, whether it runs or not."""
        return S3Server(
            name="swift",
            endpoint=f"http://127.0.0.1:{self._port}",
            region="us-east-1",
            credentials=_ADMIN,
            limited=_LIMITED,
        )

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens when it runs."""
        with locked(self.folder / "setup.lock"):
            if not (self.folder / "object.ring.gz").exists():
                self._write_configuration()
        self._process.start()

    def stop(self) -> None:
        """End the server in an orderly way."""
        self._process.stop()

    def kill(self) -> None:
        """End the server at once, as kill -9 does."""
        self._process.kill()

    def restart(self) -> None:
        """Kill the server when it runs and start it: same port, same data."""
        self._process.restart()

    def is_running(self) -> bool:
        """True while all four servers run."""
        return self._process.is_running()

    def resident_bytes(self) -> int:
        """Memory that the four servers hold now."""
        return self._process.resident_bytes()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._is_folder_ours:
            shutil.rmtree(self.folder)

    def _command(self, kind: str) -> Command:
        program = self._programs / f"swift-{kind}-server"
        return Command(name=kind, arguments=(str(program), str(self.folder / f"{kind}.conf"), "--verbose"))

    def _write_configuration(self) -> None:
        disk = self.folder / "devices" / "disk"
        disk.mkdir(parents=True, exist_ok=True)
        try:
            os.setxattr(disk, "user.test", b"")
        except OSError as error:
            raise ServerError(f"Swift needs extended attributes on {disk}; set PIPELINE_TEST_CACHE ({error})") from None
        (self.folder / "swift.conf").write_text(_SWIFT_CONF)
        for kind, port in zip(_BACKENDS, self._backend_ports, strict=True):
            text = self._common(port) + _BACKEND_CONF.format(folder=self.folder, kind=kind)
            (self.folder / f"{kind}.conf").write_text(text)
        proxy = self._common(self._port) + _PROXY_CONF.format(
            pipeline=_PIPELINE,
            max_parts=MAX_PARTS,
            admin_user=_ADMIN.access_key.replace(":", "_"),
            admin_secret=_ADMIN.secret_key,
            limited_user=_LIMITED.access_key.replace(":", "_"),
            limited_secret=_LIMITED.secret_key,
        )
        for name, entry in _PLAIN_FILTERS.items():
            proxy += f"\n[filter:{name}]\nuse = egg:swift#{entry}\n"
        (self.folder / "proxy.conf").write_text(proxy)
        python = self._programs / "python"
        subprocess.run(
            [python, "-c", _MAKE_RINGS, self.folder, *map(str, self._backend_ports)],
            check=True,
            stderr=subprocess.DEVNULL,
        )

    def _common(self, port: int) -> str:
        return _COMMON.format(port=port, user=getpass.getuser(), folder=self.folder)

    def _answers(self) -> bool:
        return all(_is_healthy(port) for port in (self._port, *self._backend_ports))


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
