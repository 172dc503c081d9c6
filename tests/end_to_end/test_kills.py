"""`kill -9` and `--resume`: the image is the one of an undisturbed run, nothing is sent twice, nothing is left."""

from __future__ import annotations

import os
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from pipeline.units import MiB
from tests.end_to_end.kills import Victim, write_large_letters
from tests.stores.openssh import SftpServer
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import S3Server

KILLS = int(os.environ.get("KILLS", "30"))
SEED = int(os.environ.get("SEED", "1"))


# What a killed process may have to write again of a file: the window that the last point cuts, and its tables.
AGAIN_MAX = 5 * MiB
# A compressor and a check lag behind the encoder, by what is on its way: on a small disk much of it.
LAGGING = 12 * MiB
TARGETS = ["file", "sftp_server", "swift", "seaweedfs"]


def _server(request: pytest.FixtureRequest, target: str) -> S3Server | SftpServer | None:
    return None if target == "file" else request.getfixturevalue(target)


@asynccontextmanager
async def _victim(
    folder: Path, target: S3Server | SftpServer | None, encoder: str, *chain: str, **more: Any
) -> AsyncIterator[Victim]:
    if not isinstance(target, S3Server):
        yield Victim(folder, encoder, sftp=target, chain=chain, **more)
        return
    async with FaultProxy(target.port) as proxy:
        yield Victim(folder, encoder, server=target, proxy=proxy, chain=chain, **more)


def _sent_parts(victim: Victim) -> list[int]:
    if victim.proxy is None:
        return []
    numbers = [re.search(r"partNumber=(\d+)", seen.query) for seen in victim.proxy.requests("PUT", query="partNumber=")]
    return [int(found[1]) for found in numbers if found]


async def _kill_and_resume(victim: Victim, digest: tuple[str, dict[str, Any]], *, kill_at: int) -> bool:
    """Whether the process lived long enough to be killed; then it was resumed, and everything is as it should be."""
    if victim.proxy is not None:
        victim.proxy.seen.clear()
    killed = await victim.run("--quiet", kill_at=kill_at)
    if not killed.was_killed:
        assert killed.code == 0, killed.err
        return False
    known = victim.journaled_parts() if victim.journal.exists() else set()
    mark = victim.journaled_mark() if victim.journal.exists() else 0
    before = len(_sent_parts(victim))
    resumed = await victim.run("--resume")
    assert resumed.code == 0, (kill_at, resumed.err)
    again = _sent_parts(victim)[before:]
    assert not known & set(again), f"record {kill_at}: parts {known & set(again)} were sent twice"
    again_max = LAGGING if victim.chain else AGAIN_MAX
    assert victim.sent_below(mark) <= again_max, f"record {kill_at}: {victim.sent_below(mark)} bytes were sent twice"
    assert (victim.digest(), victim.told_digests()) == digest, f"record {kill_at}: another image"
    assert victim.left() == [], f"record {kill_at}: something is left"
    victim.clear()
    return True


async def _reference(victim: Victim) -> tuple[str, dict[str, Any]]:
    done = await victim.run("--quiet")
    assert done.code == 0, done.err
    digest = victim.digest(), victim.told_digests()
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
async def test_sftp_upload_killed_at_some_records_is_resumed(sftp_server: SftpServer, tmp_path: Path) -> None:
    async with _victim(tmp_path, sftp_server, "encode.qcow2") as victim:
        digest = await _reference(victim)
        for kill_at in (3, 20):
            assert await _kill_and_resume(victim, digest, kill_at=kill_at)


# Chains whose state is more than an encoder's. Sizes of compressed images depend on the letters: noise stays as long.
CHAINS: dict[str, tuple[str, ...]] = {
    "qcow2 with a map, gzip": ('encode.qcow2; compression = "none"', "compress.gzip"),
    "raw, zstd, checksum": ("encode.raw", "compress.zstd", "checksum.image"),
    "qcow2, checksum": ("encode.qcow2", "checksum.image"),
    "vmdk, lz4": ("encode.vmdk", "compress.lz4"),
    "vhd, checksum": ("encode.vhd", "checksum.image"),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["qcow2 with a map, gzip", "raw, zstd, checksum"])
async def test_chain_of_more_than_an_encoder_is_resumed(tmp_path: Path, name: str) -> None:
    encoder, *chain = CHAINS[name]
    async with _victim(tmp_path, None, encoder, *chain) as victim:
        digest = await _reference(victim)
        # How many records there are depends on the time that a run takes; the first few always are.
        assert await _kill_and_resume(victim, digest, kill_at=6)
        await _kill_and_resume(victim, digest, kill_at=14)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ["file", "seaweedfs"])
@pytest.mark.parametrize("name", CHAINS)
async def test_chain_of_more_than_an_encoder_killed_at_every_third_record_is_resumed(
    request: pytest.FixtureRequest, tmp_path: Path, target: str, name: str
) -> None:
    encoder, *chain = CHAINS[name]
    async with _victim(tmp_path, _server(request, target), encoder, *chain) as victim:
        digest = await _reference(victim)
        kill_at = 2
        while await _kill_and_resume(victim, digest, kill_at=kill_at):
            kill_at += 3
        assert kill_at > 15, "the journal has hardly any records"


@pytest.mark.timeout(300)
async def test_s3_upload_killed_at_some_records_is_resumed(seaweedfs: S3Server, tmp_path: Path) -> None:
    async with _victim(tmp_path, seaweedfs, "encode.qcow2") as victim:
        digest = await _reference(victim)
        for kill_at in (3, 26):
            await _kill_and_resume(victim, digest, kill_at=kill_at)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
@pytest.mark.parametrize("target", ["file", "sftp_server", "seaweedfs"])
async def test_export_killed_at_every_record_is_resumed(
    request: pytest.FixtureRequest, tmp_path: Path, target: str, encoder: str
) -> None:
    async with _victim(tmp_path, _server(request, target), encoder) as victim:
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
@pytest.mark.parametrize("target", TARGETS)
async def test_export_killed_at_random_moments_is_resumed(
    request: pytest.FixtureRequest, tmp_path: Path, target: str
) -> None:
    """KILLS in all (`make soak KILLS=1000 SEED=7`), a quarter for each target; some runs are killed several times."""
    chance = random.Random(f"{SEED} {target}")
    encoder = chance.choice(["encode.raw", "encode.qcow2"])
    async with _victim(tmp_path, _server(request, target), encoder) as victim:
        begun = anyio.current_time()
        digest = await _reference(victim)
        usual_s = anyio.current_time() - begun
        kills = 0
        while kills < -(-KILLS // len(TARGETS)):
            resuming: tuple[str, ...] = ()
            for _ in range(chance.choice([1, 1, 2, 3])):
                with anyio.move_on_after(chance.uniform(0.2, 1.0) * usual_s) as killed:
                    ended = await victim.run("--quiet", *resuming)
                    assert ended.code == 0, ended.err
                kills += killed.cancelled_caught
                resuming = ("--resume",)
            ended = await victim.run("--quiet", "--resume")
            assert ended.code == 0, ended.err
            assert (victim.digest(), victim.told_digests()) == digest
            assert victim.left() == []
            victim.clear()
