"""Fixtures for every test."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["tests.stores.fixtures"]

# Begun first, so that no worker is alone with one of them at the end. Files keep their worker (`--dist loadfile`).
LONGEST_FILES = (
    "test_memory.py",
    "test_faults.py",
    "test_prove.py",
    "test_export.py",
    "test_resume.py",
    "test_kills.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the rest stays as it was."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A verb that has done its work ignores signals until its process ends; here the process goes on."""
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for one, handler in before.items():
        if signal.getsignal(one) != handler:
            signal.signal(one, handler)


@pytest.fixture(autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of the test's own: journals go by the export's name."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    return folder
