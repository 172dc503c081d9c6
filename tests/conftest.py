"""Fixtures for every test."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["tests.stores.fixtures"]


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
