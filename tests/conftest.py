"""Fixtures for every test."""

from __future__ import annotations

import signal
from collections.abc import Iterator

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
