"""The engine's invariants, over the real planning and wiring, with stages made to misbehave."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from pipeline.config.parse import load_config
from pipeline.config.planning import plan_run
from pipeline.config.wiring import wire
from pipeline.errors import LeftBehindError, PlanError, StageError, VerificationError
from pipeline.events import Event, EventStream, ProgressSampled, RunFinished
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.engine import run_export
from pipeline.flow.items import Block, Piece, RangeReader, StoredImage, Verdict, weakest
from pipeline.flow.stage import Catalog, SinkPlan, SinkRequest, SourceInfo, StageContext
from pipeline.units import MiB
from stages.catalog import CATALOG
from stages.encode import raw
from stages.read import synthetic
from stages.verify import receipt
from stages.write import null
from tests.chains import export, write_toml

SIZE = 64 * MiB


@dataclass
class Watched:
    """What the misbehaving stages did."""

    loaded: int = 0
    published: int = 0
    withdrawn: int = 0
    ended: bool = False


def catalog(**replaced: Any) -> Catalog:
    """The real catalog with some SPECs' `build` replaced, by name with `_` for the dot."""
    specs = []
    for spec in CATALOG:
        build = replaced.get(spec.name.replace(".", "_"))
        specs.append(replace(spec, build=build, gives=_gives(spec)) if build else spec)
    return Catalog(specs)


def _gives(spec: Any) -> Any:
    return receipt.SPEC.takes if spec.name == "write.null" else spec.gives


def watching_source(watched: Watched, fail_at: int | None = None, stop_at: int | None = None) -> Callable[..., Any]:
    class Source(synthetic.SyntheticReader):
        async def windows(self, window: int, start: int = 0) -> AsyncIterator[Block]:
            async for block in super().windows(window, start):
                if stop_at is not None and block.offset >= stop_at:
                    return
                yield block

        def load(self, block: Block, buffer: memoryview) -> None:
            watched.loaded += 1
            if fail_at is not None and block.offset >= fail_at:
                raise OSError("the cable is out")
            super().load(block, buffer)

    return Source


def writer_that(
    watched: Watched, *, stuck: bool = False, drops: bool = False, fails: bool = False
) -> Callable[..., Any]:
    class Writer(null.NullWriter):
        async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
            if stuck:
                await anyio.sleep_forever()
            size = 0
            async for piece in inlet:
                if fails:
                    raise StageError("the writer gave up")
                size = max(size, piece.end)
                piece.release()
                if not (drops and piece.offset >= SIZE // 2):
                    self._context.progress.acknowledge(guest_bytes=piece.guest_bytes, image_bytes=piece.length)
            watched.ended = True
            await outlet.send(StoredImage("null:", size, _no_reader))

        async def publish(self, manifest: bytes) -> str:
            watched.published += 1
            return "null:"

        async def withdraw(self) -> None:
            watched.withdrawn += 1

    return Writer


@asynccontextmanager
async def _no_reader() -> AsyncIterator[RangeReader]:
    raise StageError("nothing to read")
    yield  # type: ignore[unreachable]


def verifier_that(state: Any) -> Callable[..., Any]:
    class Verifier:
        def __init__(self, options: Any, context: StageContext) -> None:
            pass

        async def verify(self, image: StoredImage) -> Verdict:
            return Verdict("test", state, 1.0, detail="byte 7 differs")

    return Verifier


def chain(folder: Path, *more: str, encoder: str = "encode.raw", memory: str = "32 MiB") -> Path:
    return write_toml(
        folder / "export.toml",
        f'read.synthetic; size = "{SIZE // MiB} MiB"',
        "checksum.guest",
        "sparse.zeros",
        encoder,
        "write.null",
        *more,
        memory=memory,
    )


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2", 'encode.qcow2; compression = "none"'])
async def test_whole_disk_passes_every_edge(tmp_path: Path, encoder: str, fuse: bool) -> None:
    events: list[Event] = []
    outcome = await export(chain(tmp_path, encoder=encoder), events=events, fuse=fuse)
    assert outcome.state == "stored"
    assert outcome.read_bytes == SIZE
    assert isinstance(events[-1], RunFinished)
    last = [event for event in events if isinstance(event, ProgressSampled)][-1]
    assert (last.read_bytes, last.skipped_bytes, last.acked_bytes) == (SIZE, 0, SIZE)


async def test_with_a_stuck_writer_as_many_windows_are_read_as_there_are_buffers(tmp_path: Path) -> None:
    watched = Watched()
    specs = catalog(read_synthetic=watching_source(watched), write_null=writer_that(watched, stuck=True))
    config = load_config(chain(tmp_path), specs)
    stream = EventStream()
    async with plan_run(config, wire(config), stream) as plan:
        buffers = plan.memory_plan.buffers
        assert 2 < buffers < SIZE // plan.context.window
        with anyio.move_on_after(5) as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run_export, plan, stream)
                while watched.loaded < buffers:
                    await anyio.sleep(0.005)
                for _ in range(20):  # were there room for one more, it would be read by now
                    await anyio.sleep(0.005)
                scope.cancel()
    assert watched.loaded == buffers


async def test_source_that_ends_early_is_never_published(tmp_path: Path) -> None:
    watched = Watched()
    specs = catalog(read_synthetic=watching_source(watched, stop_at=48 * MiB), write_null=writer_that(watched))
    with pytest.raises(StageError, match="50331648 of 67108864 guest bytes"):
        await export(chain(tmp_path), catalog=specs)
    assert watched.published == 0


def _twice(block: Block) -> list[Block]:
    return [block, block]


def _never(block: Block) -> list[Block]:
    return []


def _with_runs_that_end_early(block: Block) -> list[Block]:
    return [replace(block, runs=(replace(block.runs[0], length=block.length - 512),))]


@pytest.mark.parametrize("change", [_twice, _never, _with_runs_that_end_early])
async def test_blocks_that_do_not_tile_the_disk_are_never_published(
    tmp_path: Path, change: Callable[[Block], list[Block]]
) -> None:
    watched = Watched()

    class Source(synthetic.SyntheticReader):
        async def windows(self, window: int, start: int = 0) -> AsyncIterator[Block]:
            async for block in super().windows(window, start):
                for one in change(block) if block.offset == 8 * window else [block]:
                    yield one

    specs = catalog(read_synthetic=Source, write_null=writer_that(watched))
    with pytest.raises(StageError, match="blocks do not tile the disk"):
        await export(chain(tmp_path), catalog=specs)
    assert (watched.published, watched.ended) == (0, False)


async def test_writer_that_seals_two_images_is_never_published(tmp_path: Path) -> None:
    watched = Watched()
    base: Any = writer_that(watched)

    class Writer(base):  # type: ignore[misc]
        async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
            await super().run(inlet, outlet)
            await outlet.send(StoredImage("null:", 1, _no_reader))

    with pytest.raises(StageError, match="sealed 2 images"):
        await export(chain(tmp_path), catalog=catalog(write_null=Writer))
    assert (watched.published, watched.withdrawn) == (0, 1)


async def test_writer_that_loses_bytes_is_never_published(tmp_path: Path) -> None:
    watched = Watched()
    specs = catalog(write_null=writer_that(watched, drops=True))
    with pytest.raises(StageError, match="33554432 of 67108864 guest bytes"):
        await export(chain(tmp_path), catalog=specs)
    assert (watched.published, watched.withdrawn) == (0, 1)


async def test_bytes_lost_between_encoder_and_writer_are_found_whatever_the_writer_says(tmp_path: Path) -> None:
    """An encoder that forgets some, and a writer that acknowledges what it was told the disk has."""
    watched = Watched()
    base: Any = writer_that(watched)

    class Forgetful(raw.RawEncoder):
        def place(self, prepared: Any) -> list[Piece]:
            pieces = super().place(prepared)
            return [replace(piece, guest_bytes=0) if piece.offset == 4 * MiB else piece for piece in pieces]

    class Credulous(base):  # type: ignore[misc]
        async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
            await super().run(inlet, outlet)
            progress = self._context.progress
            progress.acknowledge(guest_bytes=SIZE - progress.acked_bytes, image_bytes=0)

    specs = catalog(encode_raw=Forgetful, write_null=Credulous)
    with pytest.raises(StageError, match=f"edge 0 carried 62914560 of {SIZE} guest bytes"):
        await export(chain(tmp_path), catalog=specs)
    assert (watched.published, watched.withdrawn) == (0, 1)


async def test_failing_read_cancels_the_writer_instead_of_ending_its_stream(tmp_path: Path) -> None:
    watched = Watched()
    specs = catalog(read_synthetic=watching_source(watched, fail_at=32 * MiB), write_null=writer_that(watched))
    with pytest.raises(OSError, match="the cable is out"):
        await export(chain(tmp_path), catalog=specs)
    assert not watched.ended


async def test_failing_writer_is_the_error_that_is_told(tmp_path: Path) -> None:
    watched = Watched()
    with pytest.raises(StageError, match="the writer gave up"):
        await export(chain(tmp_path), catalog=catalog(write_null=writer_that(watched, fails=True)))


@pytest.mark.parametrize(
    "state, published, withdrawn",
    [("identical", 1, 0), ("proven", 1, 0), ("unproven", 1, 0), ("differs", 0, 1), ("disproven", 0, 1)],
)
async def test_verdict_decides_between_publish_and_withdraw(
    tmp_path: Path, state: str, published: int, withdrawn: int
) -> None:
    watched = Watched()
    specs = catalog(write_null=writer_that(watched), verify_receipt=verifier_that(state))
    toml = chain(tmp_path, "verify.receipt")
    if state in ("differs", "disproven"):
        with pytest.raises(VerificationError, match="byte 7 differs") as caught:
            await export(toml, catalog=specs)
        assert ("not the disk" in str(caught.value)) == (state == "differs"), "only a comparison says so"
    else:
        assert (await export(toml, catalog=specs)).state == state
    assert (watched.published, watched.withdrawn) == (published, withdrawn)


@pytest.mark.parametrize(
    "states, weakest_of_all",
    [
        ([], "stored"),
        (["unproven", "identical"], "identical"),
        (["proven"], "proven"),
        (["identical", "proven"], "identical"),
        (["unproven", "proven"], "unproven"),
        (["identical", "unknown"], "unproven"),
    ],
)
def test_what_was_to_be_proven_and_could_not_be_is_never_a_pass(states: list[Any], weakest_of_all: str) -> None:
    assert weakest([Verdict("test", state, 1.0) for state in states]) == weakest_of_all


async def test_cancellation_during_verification_withdraws(tmp_path: Path) -> None:
    watched = Watched()

    class Forever:
        def __init__(self, options: Any, context: StageContext) -> None:
            pass

        async def verify(self, image: StoredImage) -> Verdict:
            scope.cancel()
            await anyio.sleep_forever()
            raise AssertionError

    specs = catalog(write_null=writer_that(watched), verify_receipt=Forever)
    with anyio.CancelScope() as scope:
        await export(chain(tmp_path, "verify.receipt"), catalog=specs)
    assert scope.cancelled_caught
    assert (watched.published, watched.withdrawn) == (0, 1)


async def test_withdrawal_that_fails_tells_what_is_left(tmp_path: Path) -> None:
    watched = Watched()
    base: Any = writer_that(watched)

    class Writer(base):  # type: ignore[misc]
        async def withdraw(self) -> None:
            raise LeftBehindError("no answer", cause=OSError(), commands=("rm -f it",))

    specs = catalog(write_null=Writer, verify_receipt=verifier_that("differs"))
    with pytest.raises(LeftBehindError) as caught:
        await export(chain(tmp_path, "verify.receipt"), catalog=specs)
    assert caught.value.commands == ("rm -f it",)
    assert isinstance(caught.value.cause, VerificationError)


async def test_memory_that_holds_no_window_is_refused_in_planning(tmp_path: Path) -> None:
    class Greedy(null.NullWriter):
        async def plan(self, request: SinkRequest) -> SinkPlan:
            return SinkPlan(own_bytes=28 * MiB)

    with pytest.raises(PlanError, match="not enough for windows"):
        await export(chain(tmp_path), catalog=catalog(write_null=Greedy))


async def test_empty_source_is_refused(tmp_path: Path) -> None:
    class Empty(synthetic.SyntheticReader):
        async def open(self) -> SourceInfo:
            return SourceInfo(size=0, mapped_bytes=0)

    with pytest.raises(PlanError, match="source is empty"):
        await export(chain(tmp_path), catalog=catalog(read_synthetic=Empty))
