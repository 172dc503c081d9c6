"""Fixtures of real stores; `tests/conftest.py` names this module in `pytest_plugins`.

`swift`, `seaweedfs`, `seaweedfs_tls` and `s3_server` (a test runs once with each store) are shared by the whole
session, with pytest-xdist by all its workers: a test takes a bucket of its own (`s3_server.new_bucket()`) and leaves
the server alone. A test that kills its server takes `own_swift`, `own_seaweedfs` or `own_store` (once with each), which
costs 1 to 3 s.

Servers are started when the first test asks and end with the session, however that ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import pytest

from tests.stores.azurite import AzureServer, Azurite
from tests.stores.gcs import GcsEmulator, GcsServer
from tests.stores.nbd import NbdFolder, NbdServer
from tests.stores.nginx import Nginx, WebServer
from tests.stores.openssh import OpenSsh, SftpServer
from tests.stores.process import ProcessIdentity, end_run, run_folder, sweep, this_process
from tests.stores.s3 import S3Server, StoreProcess
from tests.stores.seaweedfs import SeaweedFs
from tests.stores.swift import Swift


def _session() -> ProcessIdentity:
    """The process that lives as long as the test session: with pytest-xdist the one that started the workers."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return this_process()
    controller = ProcessIdentity.of(os.getppid())
    assert controller is not None
    return controller


def pytest_configure() -> None:
    """Remove what sessions left that were killed."""
    sweep()


def pytest_unconfigure() -> None:
    """End the servers of this process: its own, and where it is the session's, the shared ones."""
    end_run()


class _Startable(Protocol):
    """A starter of a server in a folder."""

    def __init__(self, folder: Path, *, owner: ProcessIdentity) -> None: ...

    def start(self) -> None: ...


S = TypeVar("S", bound=_Startable)


def _shared(starter: type[S], name: str) -> S:
    """The session's server of a kind.

    Whoever comes first starts it. The others find it by its folder: the folder is the session's, and so is the server.
    """
    folder = run_folder(_session()) / name
    folder.mkdir(exist_ok=True)
    store = starter(folder, owner=_session())
    store.start()
    return store


def _shared_seaweedfs() -> SeaweedFs:
    return _shared(SeaweedFs, "seaweedfs")


@pytest.fixture(scope="session")
def swift() -> S3Server:
    """The session's Swift."""
    return _shared(Swift, "swift").server


@pytest.fixture(scope="session")
def seaweedfs() -> S3Server:
    """The session's SeaweedFS, over http."""
    return _shared_seaweedfs().server


@pytest.fixture(scope="session")
def seaweedfs_tls() -> S3Server:
    """The session's SeaweedFS, over https; the same store and buckets as `seaweedfs`."""
    return _shared_seaweedfs().tls_server


@pytest.fixture(scope="session", params=["swift", "seaweedfs"])
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    """Each of the session's stores in turn."""
    server: S3Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture(scope="session")
def sftp_server() -> SftpServer:
    """The session's OpenSSH; a test takes names of its own in it."""
    return _shared(OpenSsh, "openssh").server


@pytest.fixture
def own_openssh() -> Iterator[OpenSsh]:
    """An OpenSSH that the test has for itself."""
    with OpenSsh() as store:
        yield store


@pytest.fixture(scope="session")
def web_server() -> WebServer:
    """The session's nginx; a test takes names of its own in it."""
    return _shared(Nginx, "nginx").server


@pytest.fixture(scope="session")
def azure_server() -> AzureServer:
    """The session's Azurite; a test takes a container of its own."""
    return _shared(Azurite, "azurite").server


@pytest.fixture(scope="session")
def gcs_server() -> GcsServer:
    """The session's emulator of GCS; a test takes a bucket of its own."""
    return _shared(GcsEmulator, "gcs").server


@pytest.fixture(scope="session")
def nbd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NbdFolder]:
    """An nbdkit whose exports are files; a test makes files of its own."""
    folder = tmp_path_factory.mktemp("exports")
    with NbdServer("nbdkit", "file", f"dir={folder}") as server:
        yield NbdFolder(folder, server)


@pytest.fixture
def own_nginx() -> Iterator[Nginx]:
    """An nginx that the test has for itself."""
    with Nginx() as store:
        yield store


@pytest.fixture
def own_swift() -> Iterator[Swift]:
    """A Swift that the test has for itself."""
    with Swift() as store:
        yield store


@pytest.fixture
def own_seaweedfs() -> Iterator[SeaweedFs]:
    """A SeaweedFS that the test has for itself, without TLS."""
    with SeaweedFs(with_tls=False) as store:
        yield store


@pytest.fixture(params=["own_swift", "own_seaweedfs"])
def own_store(request: pytest.FixtureRequest) -> StoreProcess:
    """Each kind of store in turn, for the test alone."""
    store: StoreProcess = request.getfixturevalue(request.param)
    return store
