"""Fixtures of whole exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.units import MiB
from tests.disks.letters import write_disk
from tests.end_to_end.places import Place, new_place
from tests.stores.s3 import S3Server


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk of 33 MiB with data, zeros, holes and an odd tail; 24 MiB of it are noise."""
    folder = tmp_path_factory.mktemp("letters")
    return write_disk(folder / "disk.raw", "ABCDEFGH0--IJKLMNOP000QRST---UVWX", tail=MiB // 2 + 512)


@pytest.fixture
def place(s3_server: S3Server, tmp_path: Path, letters: Path) -> Place:
    """A place on each store in turn."""
    return new_place(s3_server, tmp_path, letters)


@pytest.fixture
def one_place(seaweedfs: S3Server, tmp_path: Path, letters: Path) -> Place:
    """A place on one store, for what does not depend on the store."""
    return new_place(seaweedfs, tmp_path, letters)
