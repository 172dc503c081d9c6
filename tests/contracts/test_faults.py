"""Every fault, at every call, on every store of the catalog: mended, or ended with nothing left; never a false end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from _pytest.mark.structures import ParameterSet

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
from tests.contracts.targets import LETTERS, TAIL, TARGETS, WITHOUT_A_STORE, Target, target
from tests.disks.letters import write_disk
from tests.stores.faults import Delay, LoseReply, Nth, Reply, ResetRequest, Rule, StallRequest
from tests.stores.faults import Fault as WireFault
from tests.stores.proxy import FaultProxy
from tests.write.images import QuickClock

__all__ = ["target"]  # a fixture

REFUSED = Fails(StoreError("AccessDenied", operation="any", status=403))
GONE = Fails(StoreError("no route to host", operation="any", temporary=True))

# Stores by the shape of their uploads. Every fault meets the first of a shape in `make test`; the others meet those
# that they see anything of (a lost answer, a call that came twice): what is raised above them is the same for all.
IN_PARTS = [
    "write.s3 on SeaweedFS",
    "write.azure_block on Azurite",
    "write.gcs on SeaweedFS",
    "write.gcs in a session of the emulator",
    "write.s3 on Swift",
]
IN_RANGES = [
    "write.file",
    "write.sftp on OpenSSH",
    "write.azure_page on Azurite",
    "write.nbd on nbdkit",
    "write.device on a loop device",
]
STREAMED = ["write.http on nginx with WebDAV", "write.http on nginx without"]
# Share their writer with a store that all of it is shown on.
SECOND = {"write.gcs on SeaweedFS", "write.s3 on Swift"}
PARTS_CALLS: list[tuple[Operation, int | None]] = [("open", None), ("put_part", 2), ("seal", None)]
RANGES_CALLS: list[tuple[Operation, int | None]] = [("create", None), ("write", 2), ("seal", None)]


def test_every_store_of_the_catalog_has_a_place_in_this_suite() -> None:
    placed = {name.partition(" ")[0] for name in TARGETS}
    unplaced = {spec.name for spec in CATALOG if spec.role == "write"} - placed - WITHOUT_A_STORE
    assert not unplaced, "add them to TARGETS in tests/contracts/targets.py"


def test_every_place_is_of_a_known_shape() -> None:
    assert set(TARGETS) == {*IN_PARTS, *IN_RANGES, *STREAMED}


def case(store: str, *values: object, quick: bool) -> ParameterSet:
    """Parameters of one test; slow unless `quick`."""
    told = [str(one.__name__ if isinstance(one, type) else one) for one in values if one is not None]
    return pytest.param(store, *values, id="-".join([store, *told]), marks=() if quick else pytest.mark.slow)


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
    """An export with a hole."""
    if not (folder / "disk").exists():
        write_disk(folder / "disk", LETTERS, MiB, TAIL)
    toml = write_toml(
        folder / "export.toml",
        f'read.disk; path = "{folder / "disk"}"; block_size = "2 MiB"',
        "checksum.guest",
        "sparse.zeros",
        target.encoder,
        target.stage,
        "verify.readback",
    )
    with anyio.fail_after(60):
        return await export(toml, clock=QuickClock())


def has_struck(armed: list[Faulty | FaultyRanges]) -> bool:
    return any(one.fired for one in armed)


# ---- parts ---------------------------------------------------------------------------------------------------------

MENDED: dict[str, Fault] = {
    "error": GONE,
    "delay": Delays(30.0, QuickClock().sleep),
    "short": CutsShort(700 * KiB),
    "503": IsBusy(),
    "503 with a time": IsBusy(retry_after_s=7.0),
    "lost reply": LosesReply(),
    "duplicate": RepliesTwice(),
}


def _is_quick(store: str, fault: str, on: Operation) -> bool:
    if store in SECOND:
        return store == "write.gcs on SeaweedFS" and (fault, on) == ("lost reply", "seal")
    if fault in ("lost reply", "duplicate") or (fault, on) == ("short", "put_part"):
        return True
    return store == IN_PARTS[0] and (on == "put_part" or (fault == "error" and on == "seal"))


@pytest.mark.parametrize(
    "target, name, on, call",
    [
        case(store, name, on, call, quick=_is_quick(store, name, on))
        for store in IN_PARTS
        for name in MENDED
        for on, call in PARTS_CALLS
    ],
    indirect=["target"],
)
async def test_part_store_mends_what_is_over_soon(
    target: Target, tmp_path: Path, strike: Strike, name: str, on: Operation, call: int | None
) -> None:
    armed = strike(on, MENDED[name], call)
    assert (await run(target, tmp_path)).state == "identical"
    assert has_struck(armed)
    assert tuple(target.names()) == target.result


@pytest.mark.parametrize(
    "target, on, call",
    [
        case(store, on, call, quick=store not in SECOND and on != "open")
        for store in IN_PARTS
        for on, call in PARTS_CALLS
    ],
    indirect=["target"],
)
async def test_part_store_that_refuses_is_left_empty(
    target: Target, tmp_path: Path, strike: Strike, on: Operation, call: int | None
) -> None:
    armed = strike(on, REFUSED, call)
    with pytest.raises(StoreError, match="AccessDenied"):
        await run(target, tmp_path)
    assert has_struck(armed)
    assert target.names() == []


# ---- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, name",
    [
        case(store, name, quick=name == "duplicate" or store == IN_RANGES[0])
        for store in IN_RANGES
        for name in ("delay", "duplicate")
    ],
    indirect=["target"],
)
async def test_range_store_is_patient(target: Target, tmp_path: Path, strike: Strike, name: str) -> None:
    armed = strike("write", MENDED[name], 2)
    assert (await run(target, tmp_path)).state == "identical"
    assert has_struck(armed)
    assert tuple(target.names()) == target.result


def _is_quick_to_fail(store: str, fault: str, on: Operation) -> bool:
    return store == IN_RANGES[0] or fault == "lost reply" or (fault, on) == ("short", "write")


FINAL: dict[str, Fault] = {"refused": REFUSED, "gone": GONE, "lost reply": LosesReply(), "short": CutsShort(4 * KiB)}


@pytest.mark.parametrize(
    "target, name, on, call",
    [
        case(
            store,
            name,
            on,
            call,
            quick=store == IN_RANGES[0] or name == "lost reply" or (name, on) == ("short", "write"),
        )
        for store in IN_RANGES
        for name in FINAL
        for on, call in RANGES_CALLS
    ],
    indirect=["target"],
)
async def test_range_store_that_fails_for_good_is_left_empty(
    target: Target, tmp_path: Path, strike: Strike, name: str, on: Operation, call: int | None
) -> None:
    """What comes out of a range upload is final: it has tried again by itself."""
    armed = strike(on, FINAL[name], call)
    with pytest.raises(StoreError):
        await run(target, tmp_path)
    assert has_struck(armed)
    assert target.names() == []


# ---- streams -------------------------------------------------------------------------------------------------------

WIRE: dict[str, WireFault] = {
    "error": ResetRequest(after_bytes=0),
    "delay": Delay(seconds=0.05),
    "short": ResetRequest(after_bytes=4 * MiB),
    "503": Reply(status=503, when="body"),
    "503 with a time": Reply(status=503, headers={"Retry-After": "7"}, when="body"),
    "lost reply": LoseReply(),
}
# The image, its way to its place, and the manifest.
STREAM_CALLS = {STREAMED[0]: [("PUT", 1), ("MOVE", 1), ("PUT", 2)], STREAMED[1]: [("PUT", 1), ("PUT", 2)]}


async def run_behind(proxy: FaultProxy, target: Target, folder: Path) -> Outcome:
    """The run, with the proxy in place of the server."""
    return await run(replace(target, stage=target.stage.replace(f":{target.port}/", f":{proxy.port}/")), folder)


@pytest.mark.parametrize(
    "target, name, method, call",
    [
        case(store, name, method, call, quick=name == "lost reply" or (name in ("short", "503") and call == 1))
        for store in STREAMED
        for name in WIRE
        for method, call in STREAM_CALLS[store]
    ],
    indirect=["target"],
)
async def test_stream_is_sent_again_after_what_is_over_soon(
    target: Target, tmp_path: Path, name: str, method: str, call: int
) -> None:
    async with FaultProxy(target.port, rules=[Rule(WIRE[name], method=method, when=Nth(call))]) as proxy:
        assert (await run_behind(proxy, target, tmp_path)).state == "identical"
        assert any(seen.fault is not None for seen in proxy.seen)
    assert tuple(target.names()) == target.result


@pytest.mark.parametrize(
    "target, method, call",
    [case(store, method, call, quick=True) for store in STREAMED for method, call in STREAM_CALLS[store]],
    indirect=["target"],
)
async def test_stream_that_is_refused_leaves_nothing(target: Target, tmp_path: Path, method: str, call: int) -> None:
    async with FaultProxy(target.port, rules=[Rule(Reply(status=403), method=method, when=Nth(call))]) as proxy:
        with pytest.raises(StoreError, match=r"answered 403|connection was lost"):
            await run_behind(proxy, target, tmp_path)
    assert target.names() == []


# ---- all -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, at",
    [case(store, at, quick=at == 1 and store not in SECOND) for store in (*IN_PARTS, *IN_RANGES) for at in range(3)],
    indirect=["target"],
)
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


@pytest.mark.parametrize("target", STREAMED, indirect=True)
async def test_stalled_stream_leaves_nothing_when_the_run_is_cancelled(target: Target, tmp_path: Path) -> None:
    async with FaultProxy(target.port, rules=[Rule(StallRequest(after_bytes=4 * MiB), method="PUT")]) as proxy:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_behind, proxy, target, tmp_path)
            with anyio.fail_after(60):
                await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
            tasks.cancel_scope.cancel()
    assert target.names() == []
