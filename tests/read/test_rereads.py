"""Disks in use that are read again after the first pass, until nothing changes any more."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.continuing import Attempt, Mode
from pipeline.errors import KeptError
from pipeline.events import ChangesSent, Event, RunPlanned, RunResumed
from pipeline.flow.engine import Outcome
from pipeline.flow.items import Block
from pipeline.units import KiB, MiB
from stages.read.disk import DiskReader
from tests.chains import export, write_toml
from tests.disk.making import blank, hashes, need, needs_root, run
from tests.disks.mounts import loop_device, mounted
from tests.read.test_consistency import check, device_of, write_load

pytestmark = needs_root


async def exported(
    disk: Path,
    *options: str,
    folder: Path,
    encoder: str = "encode.raw",
    writer: str = "",
    events: list[Event] | None = None,
    on: Callable[[Event], None] | None = None,
    **more: Any,
) -> Outcome:
    seen = Watching(on) if on is not None else events
    toml = write_toml(
        folder / "x.toml",
        "; ".join([f'read.disk; path = "{disk}"', *options]),
        "checksum.guest",
        "sparse.zeros",
        encoder,
        writer or f'write.file; path = "{folder / "image"}"',
        "verify.readback",
        on_failure="keep",
    )
    return await export(toml, events=seen, **more)


class Watching(list[Event]):
    """Events that are looked at as they come."""

    def __init__(self, look: Callable[[Event], None]) -> None:
        super().__init__()
        self._look = look

    def append(self, event: Event) -> None:
        super().append(event)
        self._look(event)


def content(device: Path, length: int | None = None) -> bytes:
    """What the disk itself holds; the cache has what a journal has not yet brought to its place."""
    done = subprocess.run(
        ["dd", f"if={device}", "iflag=direct", "bs=1M", "status=none"], check=True, stdout=subprocess.PIPE
    )
    return done.stdout[:length]


def told(outcome: Outcome) -> Any:
    return outcome.manifest.facts["consistency"]


@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=pytest.mark.slow), "btrfs"])
async def test_under_write_load_that_ends_the_image_is_the_disk_at_rest(kind: str, tmp_path: Path) -> None:
    with device_of(kind, tmp_path) as (device, mount):
        load = write_load(mount)
        load.__enter__()

        def stop(event: Event) -> None:
            if isinstance(event, ChangesSent) and event.number == 1:
                load.__exit__(None, None, None)
                run("sync", "-f", mount)

        outcome = await exported(device, "rereads = 10", folder=tmp_path, on=stop)
        consistency = told(outcome)
        assert consistency["achieved"] == "settled"
        assert consistency["rereads"] >= 2
        assert consistency["changed_bytes"][0] > 0
        assert consistency["changed_bytes"][-1] == 0
        assert consistency["resent_bytes"] == sum(consistency["changed_bytes"])
        assert outcome.state == "identical"
        image = tmp_path / "image"
        assert image.read_bytes() == content(device)
        before = hashes(mount)
    (tmp_path / "disk").unlink()  # two filesystems with one UUID can't be mounted
    with mounted(tmp_path / "copy", kind, image, "loop,nouuid" if kind == "xfs" else "loop") as copy:
        assert hashes(copy) == before
    check(kind, image)
