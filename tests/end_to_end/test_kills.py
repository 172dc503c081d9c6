"""`kill -9` and `--resume`: the image is the one of an undisturbed run, nothing is sent twice, nothing is left."""

from __future__ import annotations

import os
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from tests.end_to_end.kills import Victim, write_large_letters
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import S3Server

KILLS = int(os.environ.get("KILLS", "30"))
SEED = int(os.environ.get("SEED", "1"))


@asynccontextmanager
async def _victim(folder: Path, target: S3Server | None, encoder: str) -> AsyncIterator[Victim]:
    if target is None:
        yield Victim(folder, encoder)  # type: ignore[arg-type]  # one of two
        return
    async with FaultProxy(target.port) as proxy:
        yield Victim(folder, encoder, server=target, proxy=proxy)  # type: ignore[arg-type]


def _sent_parts(victim: Victim) -> list[int]:
    if victim.proxy is None:
        return []
    numbers = [re.search(r"partNumber=(\d+)", seen.query) for seen in victim.proxy.requests("PUT", query="partNumber=")]
    return [int(found[1]) for found in numbers if found]


async def _kill_and_resume(victim: Victim, digest: str, *, kill_at: int) -> bool:
    """Whether the process lived long enough to be killed; then it was resumed, and everything is as it should be."""
    if victim.proxy is not None:
        victim.proxy.seen.clear()
    killed = await victim.run("--quiet", kill_at=kill_at)
    if not killed.was_killed:
        assert killed.code == 0, killed.err
        return False
    known = victim.journaled_parts() if victim.journal.exists() else set()
    before = len(_sent_parts(victim))
    resumed = await victim.run("--resume")
    assert resumed.code == 0, (kill_at, resumed.err)
    again = _sent_parts(victim)[before:]
    assert not known & set(again), f"record {kill_at}: parts {known & set(again)} were sent twice"
    assert victim.digest() == digest, f"record {kill_at}: another image"
    assert victim.left() == [], f"record {kill_at}: something is left"
    victim.clear()
    return True


async def _reference(victim: Victim) -> str:
    done = await victim.run("--quiet")
    assert done.code == 0, done.err
    digest = victim.digest()
    assert victim.left() == []
    victim.clear()
    return digest


@pytest.mark.timeout(300)
async def test_file_killed_at_some_records_is_resumed(tmp_path: Path) -> None:
    async with _victim(tmp_path, None, "encode.raw") as victim:
        digest = await _reference(victim)
        for kill_at in (3, 12):
            await _kill_and_resume(victim, digest, kill_at=kill_at)


@pytest.mark.timeout(300)
async def test_s3_upload_killed_at_some_records_is_resumed(seaweedfs: S3Server, tmp_path: Path) -> None:
    async with _victim(tmp_path, seaweedfs, "encode.qcow2") as victim:
        digest = await _reference(victim)
        for kill_at in (3, 16, 26):
            await _kill_and_resume(victim, digest, kill_at=kill_at)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
@pytest.mark.parametrize("target", ["file", "seaweedfs"])
async def test_export_killed_at_every_record_is_resumed(
    request: pytest.FixtureRequest, tmp_path: Path, target: str, encoder: str
) -> None:
    server = None if target == "file" else request.getfixturevalue(target)
    async with _victim(tmp_path, server, encoder) as victim:
        digest = await _reference(victim)
        kill_at = 1
        while await _kill_and_resume(victim, digest, kill_at=kill_at):
            kill_at += 1
        assert kill_at > 15, "the journal has hardly any records"


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_small_image_killed_at_every_record_is_exported_after_all(swift: S3Server, tmp_path: Path) -> None:
    """It goes up in one request: there is nothing to go on with, and nothing may be left of it either."""
    write_large_letters(tmp_path / "disk.raw", "AB-")
    async with _victim(tmp_path, swift, "encode.qcow2") as victim:
        digest = await _reference(victim)
        kill_at = 1
        while await _kill_and_resume(victim, digest, kill_at=kill_at):
            kill_at += 1
        assert kill_at > 4, "the journal has hardly any records"


@pytest.mark.slow
@pytest.mark.timeout(36000)
@pytest.mark.parametrize("target", ["file", "swift", "seaweedfs"])
async def test_export_killed_at_random_moments_is_resumed(
    request: pytest.FixtureRequest, tmp_path: Path, target: str
) -> None:
    """KILLS in all (`make soak KILLS=1000 SEED=7`), a third for each target; some runs are killed several times."""
    server = None if target == "file" else request.getfixturevalue(target)
    chance = random.Random(f"{SEED} {target}")
    encoder = chance.choice(["encode.raw", "encode.qcow2"])
    async with _victim(tmp_path, server, encoder) as victim:
        begun = anyio.current_time()
        digest = await _reference(victim)
        usual_s = anyio.current_time() - begun
        kills = 0
        while kills < -(-KILLS // 3):
            resuming: tuple[str, ...] = ()
            for _ in range(chance.choice([1, 1, 2, 3])):
                with anyio.move_on_after(chance.uniform(0.2, 1.0) * usual_s) as killed:
                    ended = await victim.run("--quiet", *resuming)
                    assert ended.code == 0, ended.err
                kills += killed.cancelled_caught
                resuming = ("--resume",)
            ended = await victim.run("--quiet", "--resume")
            assert ended.code == 0, ended.err
            assert victim.digest() == digest
            assert victim.left() == []
            victim.clear()
