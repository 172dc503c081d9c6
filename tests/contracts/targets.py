"""Where each writer of the catalog writes in the suites that run over all of them.

A new store adds one function here and its name to TARGETS; the suites (tests/contracts/test_faults.py) then run over
it. What it needs: a TOML stage, what lies in the store, and which shape its uploads have. A store without a place fails
the suite.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pytest

from pipeline.units import MiB
from stages.store.sftp import SftpUrl
from tests.disks.mounts import loop_device
from tests.stores.azurite import AzureServer
from tests.stores.gcs import GcsServer
from tests.stores.nbd import NbdFolder
from tests.stores.nginx import WebServer
from tests.stores.openssh import SftpServer
from tests.stores.s3 import S3Server

NAME = "image"
BOTH = (NAME, f"{NAME}.manifest.json")
# The disk of these suites, a letter a MiB (tests/disks/letters.py): as qcow2 three parts of 5 MiB, and a head.
LETTERS, TAIL = "ABCDE--FGHIJ0KL", 512
_DISK_BYTES = len(LETTERS) * MiB + TAIL


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One place of a test's own in a store.

    Attributes:
        stage: of the TOML file: the writer, and its options behind semicolons.
        shape: of its uploads (stages/write/shapes.py); a stream is one request whose faults are those of the wire.
        stored: the image, byte by byte; a disk to its end.
        names: everything that lies there, also what is not visible yet (open uploads). A disk that is written in place
            is there as long as its begin or end, which hold the partition tables, are not zero.
        encoder: of what it takes.
        result: the names after a run that worked.
        environment: variables that lead to it.
        port: of the server, for streams: a proxy takes its place in `stage`.
    """

    stage: str
    shape: Literal["parts", "ranges", "stream"]
    stored: Callable[[], bytes]
    names: Callable[[], list[str]]
    encoder: str = 'encode.qcow2; compression = "none"'
    result: tuple[str, ...] = BOTH
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0


def _file(request: pytest.FixtureRequest, folder: Path) -> Target:
    place = folder / "images"
    place.mkdir()
    return Target(
        stage=f'write.file; path = "{place / NAME}"',
        shape="ranges",
        stored=lambda: (place / NAME).read_bytes(),
        names=lambda: sorted(one.name for one in place.iterdir()),
    )


def _sftp(request: pytest.FixtureRequest, folder: Path) -> Target:
    server: SftpServer = request.getfixturevalue("sftp_server")
    place = server.data / f"target of {folder.name}"
    place.mkdir()
    url = SftpUrl.parse(server.url("x")).at(f"{server.remote}/{place.name}/{NAME}")
    return Target(
        stage=f'write.sftp; url = "{url}"; identity_files = ["{server.identity}"]; agent = false; '
        f'known_hosts = "{server.known_hosts}"',
        shape="ranges",
        stored=lambda: (place / NAME).read_bytes(),
        names=lambda: sorted(one.name for one in place.iterdir()),
    )


@lru_cache
def _bucket(server: S3Server) -> str:
    """One for all of these tests: in a new one, SeaweedFS takes half a second for its first objects."""
    return server.new_bucket()


def _place_in(server: S3Server) -> tuple[str, Callable[[], list[str]]]:
    """Bucket and folder of a test's own, and what lies in there."""
    bucket, folder = _bucket(server), f"{uuid.uuid4().hex}/"

    def names() -> list[str]:
        keys = [*server.keys(bucket), *(f"{key} as upload {upload}" for key, upload in server.open_uploads(bucket))]
        return [key.removeprefix(folder) for key in keys if key.startswith(folder)]

    return f"{bucket}/{folder}{NAME}", names


def _s3(server: S3Server) -> Target:
    place, names = _place_in(server)
    return Target(
        stage=f'write.s3; url = "s3://{place}"',
        shape="parts",
        stored=lambda: server.get(*place.split("/", 1)),
        names=names,
        environment=server.environment(),
    )


def _azure_block(request: pytest.FixtureRequest, folder: Path) -> Target:
    server: AzureServer = request.getfixturevalue("azure_server")
    container = server.create_container(f"c{uuid.uuid4().hex}")
    return Target(
        stage=f'write.azure_block; url = "az://{container}/{NAME}"',
        shape="parts",
        stored=lambda: server.get(container, NAME),
        # Blobs alone: a block that was on its way when the upload was aborted may come after it. The store removes such
        # blocks within a week; that what came before is removed at once, tests/write/test_azure.py shows.
        names=lambda: server.names(container, uncommitted=False),
        environment=server.environment(),
    )


def _azure_page(request: pytest.FixtureRequest, folder: Path) -> Target:
    server: AzureServer = request.getfixturevalue("azure_server")
    container = server.create_container(f"c{uuid.uuid4().hex}")
    return Target(
        stage=f'write.azure_page; url = "az://{container}/{NAME}"',
        shape="ranges",
        stored=lambda: server.get(container, NAME),
        names=lambda: server.names(container),
        encoder='encode.vhd; variant = "fixed"',
        environment=server.environment(),
    )


def _names_of_disk(disk: Path) -> list[str]:
    with disk.open("rb") as file:
        begin = file.read(MiB)
        file.seek(_DISK_BYTES - MiB)
        return [NAME] if any(begin) or any(file.read(MiB)) else []


def _blank(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(_DISK_BYTES + MiB)
    return path


def _nbd(request: pytest.FixtureRequest, folder: Path) -> Target:
    server: NbdFolder = request.getfixturevalue("nbd_server")
    disk = _blank(server.folder / f"target-of-{uuid.uuid4().hex}")
    request.addfinalizer(disk.unlink)
    return Target(
        stage=f'write.nbd; url = "{server.url(disk.name)}"',
        shape="ranges",
        stored=disk.read_bytes,
        names=lambda: _names_of_disk(disk),
        encoder="encode.raw",
        result=(NAME,),
    )


def _device(request: pytest.FixtureRequest, folder: Path) -> Target:
    if os.geteuid() != 0:
        pytest.skip("loop devices are root's")
    disk = _blank(folder / "target")
    attached = loop_device(disk, read_only=False)
    device = attached.__enter__()
    request.addfinalizer(lambda: attached.__exit__(None, None, None))
    return Target(
        stage=f'write.device; path = "{device}"',
        shape="ranges",
        stored=device.read_bytes,
        names=lambda: _names_of_disk(device),
        encoder="encode.raw",
        result=(NAME,),
    )


def _http(request: pytest.FixtureRequest, kind: str, scheme: str) -> Target:
    server: WebServer = request.getfixturevalue("web_server")
    place = server.data / kind / f"target-of-{uuid.uuid4().hex}"
    place.mkdir()
    place.chmod(0o777)  # nginx runs as nobody
    return Target(
        stage=f'write.http; url = "{server.url(f"{kind}/{place.name}/{NAME}", scheme)}"',
        shape="stream",
        stored=lambda: (place / NAME).read_bytes(),
        names=lambda: sorted(one.name for one in place.iterdir()),
        port=server.port,
    )


def _gcs(request: pytest.FixtureRequest, folder: Path) -> Target:
    """Its parts are S3's, so an S3 store takes them."""
    server: S3Server = request.getfixturevalue("seaweedfs")
    place, names = _place_in(server)
    return Target(
        stage=f'write.gcs; url = "gs://{place}"; endpoint = "{server.endpoint}"',
        shape="parts",
        stored=lambda: server.get(*place.split("/", 1)),
        names=names,
        environment={
            "GS_ACCESS_KEY_ID": server.credentials.access_key,
            "GS_SECRET_ACCESS_KEY": server.credentials.secret_key,
        },
    )


def _gcs_session(request: pytest.FixtureRequest, folder: Path) -> Target:
    """Parts one at a time in ascending order, so every fault of a part can come; an image whose head is last cannot."""
    server: GcsServer = request.getfixturevalue("gcs_server")
    bucket = server.create_bucket(f"b{uuid.uuid4().hex}")
    return Target(
        stage=f'write.gcs; url = "gs://{bucket}/{NAME}"; upload = "resumable"; endpoint = "{server.endpoint}"',
        shape="parts",
        stored=lambda: server.get(bucket, NAME),
        # Objects alone: no call lists sessions. tests/write/test_gcs.py shows that a cancelled run ends its own.
        names=lambda: server.names(bucket),
        encoder="encode.raw",
        environment={
            "STORAGE_EMULATOR_HOST": server.endpoint,
            "GS_ACCESS_KEY_ID": "",
            "GOOGLE_APPLICATION_CREDENTIALS": "",
        },
    )


# Writer and kind of server, to what makes a place there. Writers come before the first space.
TARGETS: dict[str, Callable[[pytest.FixtureRequest, Path], Target]] = {
    "write.file": _file,
    "write.sftp on OpenSSH": _sftp,
    "write.s3 on SeaweedFS": lambda request, folder: _s3(request.getfixturevalue("seaweedfs")),
    "write.azure_block on Azurite": _azure_block,
    "write.gcs on SeaweedFS": _gcs,
    "write.gcs in a session of the emulator": _gcs_session,
    "write.s3 on Swift": lambda request, folder: _s3(request.getfixturevalue("swift")),
    "write.azure_page on Azurite": _azure_page,
    "write.nbd on nbdkit": _nbd,
    "write.device on a loop device": _device,
    "write.http on nginx with WebDAV": lambda request, folder: _http(request, "open", "dav"),
    "write.http on nginx without": lambda request, folder: _http(request, "plain", "http"),
}
# No server, but a command's stdin, whose faults are the command's: tests/write/test_pipe.py; or nothing is stored.
WITHOUT_A_STORE = {"write.pipe", "write.null"}


@pytest.fixture
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The place that the test's parameter names."""
    made = TARGETS[request.param](request, tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made
