"""Every fault, at every call, on every store of the catalog: mended, or ended with nothing left; never a false end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from pipeline.errors import StoreError
from pipeline.flow.engine import Outcome
from pipeline.units import KiB, MiB
from stages.catalog import CATALOG
from stages.write import parts
from stages.write.faulty import (
    CutsShort,
    Delays,
    Fails,
    Fault,
    Faulty,
    FaultyRanges,
    IsBusy,
    LosesReply,
    Operation,
    RepliesTwice,
    Stalls,
)
from stages.write.paced import Paced
from stages.write.ranges import RangeDriver
from tests.chains import export, write_toml
from tests.contracts.targets import NAME, STREAMS, TARGETS, WAITING, Target, target
from tests.disks.letters import write_disk
from tests.write.images import QuickClock

__all__ = ["target"]  # a fixture

IN_PARTS = ["write.s3 on SeaweedFS", "write.azure_block on Azurite", "write.gcs on SeaweedFS"]
IN_RANGES = ["write.file", "write.sftp on OpenSSH"]
# A second server of the same kind of store is for the slow tests.
SECOND = ["write.s3 on Swift"]
ALL_IN_PARTS = [*IN_PARTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SECOND)]
REFUSED = Fails(StoreError("AccessDenied", operation="any", status=403))
GONE = Fails(StoreError("no route to host", operation="any", temporary=True))
BOTH = [NAME, f"{NAME}.manifest.json"]
PARTS_CALLS: list[tuple[Operation, int | None]] = [("open", None), ("put_part", 2), ("seal", None)]
RANGES_CALLS: list[tuple[Operation, int | None]] = [("create", None), ("write", 2), ("seal", None)]


def test_every_store_of_the_catalog_has_a_place_in_this_suite() -> None:
    placed = {name.partition(" ")[0] for name in TARGETS}
    unplaced = {spec.name for spec in CATALOG if spec.role == "write"} - placed - STREAMS - WAITING
    assert not unplaced, "add them to TARGETS in tests/contracts/targets.py"


def test_every_place_is_of_a_known_shape() -> None:
    assert set(TARGETS) == {*IN_PARTS, *IN_RANGES, *SECOND}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BASE_PART", 5 * MiB)


Strike = Callable[[Operation, Fault, int | None], list[Faulty | FaultyRanges]]


@pytest.fixture
def strike(monkeypatch: pytest.MonkeyPatch) -> Strike:
    """Arm a fault in the upload of whatever driver is made next: below retry and pacing where there are any."""

    def arm(on: Operation, fault: Fault, call: int | None) -> list[Faulty | FaultyRanges]:
        armed: list[Faulty | FaultyRanges] = []

        def wrapped(upload: Any) -> Faulty:
            armed.append(faulty := Faulty(upload, on=on, fault=fault, call=call))
            return faulty

        real_paced, real_ranges = Paced.__init__, RangeDriver.__init__

        def paced(one: Paced, upload: Any, *given: Any, **named: Any) -> None:
            real_paced(one, wrapped(upload), *given, **named)

        def ranges(driver: RangeDriver, upload: Any, *given: Any, **named: Any) -> None:
            armed.append(faulty := FaultyRanges(upload, on=on, fault=fault, call=call))
            real_ranges(driver, faulty, *given, **named)

        monkeypatch.setattr(Paced, "__init__", paced)
        monkeypatch.setattr(RangeDriver, "__init__", ranges)
        return armed

    return arm


async def run(target: Target, folder: Path) -> Outcome:
    """An export of 16 MiB with a hole: 4 parts, a head that comes last."""
    if not (folder / "disk").exists():
        write_disk(folder / "disk", "ABCDEFGH--IJKLMNO0P", MiB, 512)
    toml = write_toml(
        folder / "export.toml",
        f'read.disk; path = "{folder / "disk"}"; block_size = "2 MiB"',
        "checksum.guest",
        "sparse.zeros",
        'encode.qcow2; compression = "none"',
        target.stage,
        "verify.readback",
    )
    with anyio.fail_after(60):
        return await export(toml, clock=QuickClock())


def has_struck(armed: list[Faulty | FaultyRanges]) -> bool:
    return any(one.fired for one in armed)


MENDED: dict[str, Fault] = {
    "error": GONE,
    "delay": Delays(30.0, QuickClock().sleep),
    "short": CutsShort(700 * KiB),
    "503": IsBusy(),
    "503 with a time": IsBusy(retry_after_s=7.0),
    "lost reply": LosesReply(),
    "duplicate": RepliesTwice(),
}


@pytest.mark.parametrize("target", ALL_IN_PARTS, indirect=True)
@pytest.mark.parametrize("on, call", PARTS_CALLS, ids=lambda one: str(one))
@pytest.mark.parametrize("name", MENDED)
async def test_part_store_mends_what_is_over_soon(
    target: Target, tmp_path: Path, strike: Strike, name: str, on: Operation, call: int | None
) -> None:
    armed = strike(on, MENDED[name], call)
    assert (await run(target, tmp_path)).state == "identical"
    assert has_struck(armed)
    assert target.names() == BOTH


@pytest.mark.parametrize("target", ALL_IN_PARTS, indirect=True)
@pytest.mark.parametrize("on, call", PARTS_CALLS, ids=lambda one: str(one))
async def test_part_store_that_refuses_is_left_empty(
    target: Target, tmp_path: Path, strike: Strike, on: Operation, call: int | None
) -> None:
    armed = strike(on, REFUSED, call)
    with pytest.raises(StoreError, match="AccessDenied"):
        await run(target, tmp_path)
    assert has_struck(armed)
    assert target.names() == []


@pytest.mark.parametrize("target", IN_RANGES, indirect=True)
@pytest.mark.parametrize("name", ["delay", "duplicate"])
async def test_range_store_is_patient(target: Target, tmp_path: Path, strike: Strike, name: str) -> None:
    armed = strike("write", MENDED[name], 2)
    assert (await run(target, tmp_path)).state == "identical"
    assert has_struck(armed)
    assert target.names() == BOTH


@pytest.mark.parametrize("target", IN_RANGES, indirect=True)
@pytest.mark.parametrize("on, call", RANGES_CALLS, ids=lambda one: str(one))
@pytest.mark.parametrize("fault", [REFUSED, GONE, LosesReply(), CutsShort(4 * KiB)], ids=lambda one: type(one).__name__)
async def test_range_store_that_fails_for_good_is_left_empty(
    target: Target, tmp_path: Path, strike: Strike, fault: Fault, on: Operation, call: int | None
) -> None:
    """What comes out of a range upload is final: it has tried again by itself."""
    armed = strike(on, fault, call)
    with pytest.raises(StoreError):
        await run(target, tmp_path)
    assert has_struck(armed)
    assert target.names() == []


@pytest.mark.parametrize("target", [*ALL_IN_PARTS, *IN_RANGES], indirect=True)
@pytest.mark.parametrize("at", [0, 1, 2])
async def test_stalled_store_is_left_empty_when_the_run_is_cancelled(
    target: Target, tmp_path: Path, strike: Strike, at: int
) -> None:
    begun = anyio.Event()
    on, call = (PARTS_CALLS if target.shape == "parts" else RANGES_CALLS)[at]
    strike(on, Stalls(begun), call)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, target, tmp_path)
        with anyio.fail_after(60):
            await begun.wait()
        tasks.cancel_scope.cancel()
    assert target.names() == []
