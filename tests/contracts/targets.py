"""Where each writer of the catalog writes in the suites that run over all of them.

A new store adds one function here and its name to TARGETS; the suites (tests/contracts/test_faults.py) then run over
it. What it needs: a TOML stage, what lies in the store, and which shape its uploads have.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from stages.store.sftp import SftpUrl
from tests.stores.azurite import AzureServer
from tests.stores.openssh import SftpServer
from tests.stores.s3 import S3Server

NAME = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One place of a test's own in a store.

    Attributes:
        stage: of the TOML file: the writer, and its options behind semicolons.
        shape: of its uploads (stages/write/shapes.py).
        stored: the image, byte by byte.
        names: everything that lies there, also what is not visible yet (open uploads).
        environment: variables that lead to it.
    """

    stage: str
    shape: Literal["parts", "ranges"]
    stored: Callable[[], bytes]
    names: Callable[[], list[str]]
    environment: dict[str, str] = field(default_factory=dict)


def _file(request: pytest.FixtureRequest, folder: Path) -> Target:
    place = folder / "images"
    place.mkdir()
    return Target(
        stage=f'write.file; path = "{place / NAME}"',
        shape="ranges",
        stored=(place / NAME).read_bytes,
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
        stored=(place / NAME).read_bytes,
        names=lambda: sorted(one.name for one in place.iterdir()),
    )


def _s3(server: S3Server) -> Target:
    bucket = server.new_bucket()
    return Target(
        stage=f'write.s3; url = "s3://{bucket}/{NAME}"',
        shape="parts",
        stored=lambda: server.get(bucket, NAME),
        names=lambda: [*server.keys(bucket), *(str(one) for one in server.open_uploads(bucket))],
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


def _gcs(request: pytest.FixtureRequest, folder: Path) -> Target:
    """Its parts are S3's, so an S3 store takes them."""
    server: S3Server = request.getfixturevalue("seaweedfs")
    bucket = server.new_bucket()
    return Target(
        stage=f'write.gcs; url = "gs://{bucket}/{NAME}"; endpoint = "{server.endpoint}"',
        shape="parts",
        stored=lambda: server.get(bucket, NAME),
        names=lambda: [*server.keys(bucket), *(str(one) for one in server.open_uploads(bucket))],
        environment={
            "GS_ACCESS_KEY_ID": server.credentials.access_key,
            "GS_SECRET_ACCESS_KEY": server.credentials.secret_key,
        },
    )


# Writer and kind of server, to what makes a place there. Writers come before the first space.
TARGETS: dict[str, Callable[[pytest.FixtureRequest, Path], Target]] = {
    "write.file": _file,
    "write.sftp on OpenSSH": _sftp,
    "write.s3 on SeaweedFS": lambda request, folder: _s3(request.getfixturevalue("seaweedfs")),
    "write.azure_block on Azurite": _azure_block,
    "write.gcs on SeaweedFS": _gcs,
    "write.s3 on Swift": lambda request, folder: _s3(request.getfixturevalue("swift")),
}
# Neither parts nor ranges: nothing of what went out can be taken back, or nothing is stored at all.
STREAMS = {"write.null", "write.pipe"}
# Have suites of their own, and no place here yet.
WAITING = {
    "write.http",
    "write.nbd",
    "write.device",
    "write.azure_page",
}


@pytest.fixture
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The place that the test's parameter names."""
    made = TARGETS[request.param](request, tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made
