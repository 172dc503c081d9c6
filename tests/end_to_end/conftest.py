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


# What both stores were seen to do alike; the second one is for `make test-slow`. Where they differ, both always run.
ALIKE = (
    "test_upload_that_cannot_be_aborted_is_told",
    "test_image_that_cannot_be_withdrawn_is_told",
    "test_object_that_was_replaced_before_it_was_verified",
    "test_object_that_appears_in_mid_upload",
    "test_object_that_appears_just_before_the_end",
    "test_manifest_that_appears_in_mid_upload",
    "test_open_upload_of_somebody_else",
    "test_stored_image_is_verified_any_time_later",
    "test_block_device_is_stored_verified_fetched",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the second store of what is alike to the slow tests."""
    for item in items:
        if item.name.startswith(ALIKE) and "[swift" in item.name:
            item.add_marker(pytest.mark.slow)
