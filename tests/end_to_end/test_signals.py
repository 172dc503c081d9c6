"""SIGINT and SIGTERM at any moment: either the export is whole and exit code 0, or nothing is left and it is 130."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.chains import write_toml
from tests.end_to_end.command import Running, Said, running
from tests.end_to_end.places import CHAIN, Place, new_place
from tests.stores.faults import Delay, Rule
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import S3Server

BOTH = ["disk.image", "disk.image.manifest.json"]
# An export of this disk sends about 20 requests, and takes 0.5 to 2 s.
REQUESTS = 24
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_all_or_nothing(place: Place, said: Said) -> bool:
    """The only two ways in which an export may end here. Returns whether it was interrupted."""
    if not said.out and said.code in (-signal.SIGTERM, -signal.SIGINT, 130, 1):
        return place.nothing_is_left()  # before the program had a word to say about it
    assert "Traceback" not in said.err, said.err
    assert place.server.open_uploads(place.bucket) == []
    if said.code == 0:
        assert said.last("run_finished")["verified"] == "identical"
        assert place.server.keys(place.bucket) == BOTH
        assert (place.folder / "disk.image.manifest.json").exists()
        return False
    assert said.code == 130, f"{said.code}: {said.err}"
    assert "interrupted" in said.err
    return place.nothing_is_left()


async def interrupted(
    place: Place,
    strike: Callable[[FaultProxy, Running], Coroutine[Any, Any, None]],
    encoder: str = 'encode.qcow2; compression = "none"',
    rules: Sequence[Rule] = (),
) -> bool:
    """Run an export and strike; True when it was interrupted and has cleaned up."""
    async with FaultProxy(place.server.port, rules=rules) as proxy:
        async with running("run", place.toml(encoder), env=place.through(proxy.url)) as (program, end):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(strike, proxy, program)
                said: Said = await end()
                tasks.cancel_scope.cancel()
    return await anyio.to_thread.run_sync(is_all_or_nothing, place, said)


async def at_request(place: Place, count: int, numbers: tuple[signal.Signals, ...]) -> bool:
    """Strike when the store sees this many requests."""

    async def strike(proxy: FaultProxy, program: Running) -> None:
        await proxy.until(lambda: len(proxy.seen) >= count)
        for number in numbers:
            program.signal(number)

    return await interrupted(place, strike)


@pytest.mark.parametrize("count", [1, 3, 6, 9])
async def test_signal_while_the_store_is_asked_cleans_up(place: Place, count: int) -> None:
    assert await at_request(place, count, (SIGNALS[count % 2],))


async def test_signal_while_the_object_becomes_visible_removes_it(place: Place) -> None:
    """The store is let finish, so that it is known what there is to remove."""
    delayed = Rule(Delay(seconds=0.3), method="POST", query="^uploadId=")

    async def strike(proxy: FaultProxy, program: Running) -> None:
        await proxy.until(lambda: bool(proxy.requests("POST", query="^uploadId=")))
        program.signal(signal.SIGTERM)

    assert await interrupted(place, strike, rules=[delayed])


async def test_second_signal_does_not_break_the_clean_up(place: Place) -> None:
    assert await at_request(place, 7, (signal.SIGINT, signal.SIGTERM, signal.SIGINT))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", range(1, REQUESTS + 1))
async def test_signal_at_every_request_cleans_up(place: Place, count: int) -> None:
    for number in SIGNALS:
        place = new_place(place.server, place.folder, place.disk)
        await at_request(place, count, (number, number) if count % 3 == 0 else (number,))
        (place.folder / "disk.image.manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "kind", ["run_planned", "upload_opened", "image_sealed", "image_verified", "image_published", "run_finished"]
)
async def test_signal_at_each_phase_is_all_or_nothing(one_place: Place, kind: str) -> None:
    def strike(program: Running) -> None:
        if program.told[-1]["type"] == kind:
            program.signal(signal.SIGTERM)

    async with running("run", one_place.toml(), env=one_place.env, on_object=strike) as (_, end):
        said: Said = await end()
    assert is_all_or_nothing(one_place, said) or kind in ("image_published", "run_finished")


async def strike_at_random_times(server: S3Server, folder: Path, disk: Path, seed: int, times: int) -> None:
    chance = random.Random(seed)
    for _ in range(times):
        delay, number = chance.uniform(0, 2.0), chance.choice(SIGNALS)

        async def strike(
            _: FaultProxy, program: Running, delay: float = delay, number: signal.Signals = number
        ) -> None:
            await anyio.sleep(delay)  # the one place where the moment itself is what is tried
            program.signal(number)

        place = new_place(server, folder, disk)
        await interrupted(place, strike, chance.choice(["encode.raw", "encode.qcow2"]))
        (folder / "disk.image.manifest.json").unlink(missing_ok=True)


async def test_signal_at_random_times_is_all_or_nothing(seaweedfs: S3Server, tmp_path: Path, letters: Path) -> None:
    await strike_at_random_times(seaweedfs, tmp_path, letters, seed=1, times=6)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2, 8))
async def test_signal_at_many_random_times_is_all_or_nothing(
    s3_server: S3Server, tmp_path: Path, letters: Path, seed: int
) -> None:
    await strike_at_random_times(s3_server, tmp_path, letters, seed, times=20)


@pytest.mark.parametrize(
    "kind", ["run_planned", "upload_opened", "image_sealed", "image_verified", "image_published", "run_finished"]
)
async def test_signal_while_a_file_is_written_is_all_or_nothing(tmp_path: Path, letters: Path, kind: str) -> None:
    target = tmp_path / "disk.qcow2"
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.disk; path = "{letters}"',
        *CHAIN,
        "encode.qcow2",
        f'write.file; path = "{target}"',
        "verify.readback",
        on_failure="abort",
    )

    def strike(program: Running) -> None:
        if program.told[-1]["type"] == kind:
            program.signal(signal.SIGINT)

    async with running("run", toml, on_object=strike) as (_, end):
        said: Said = await end()
    left = sorted(path.name for path in tmp_path.iterdir())
    if said.code == 0:
        assert left == ["disk.qcow2", "disk.qcow2.manifest.json", "export.toml"]
    else:
        assert said.code == 130, said.err
        assert left == ["export.toml"]
