"""The command line in this process, with the small catalog and without disks or stores."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.config.parse import ExportConfig
from pipeline.config.wiring import WiredChain
from pipeline.events import (
    EventStream,
    ImagePublished,
    ImageSealed,
    ImageVerified,
    PartStored,
    ProgressSampled,
    RetryScheduled,
    RunFinished,
    RunPlanned,
    VerifyProgressed,
)
from pipeline.flow.items import Verdict
from pipeline.units import GiB, MiB
from tests.config.small_catalog import GOOD, SMALL_CATALOG


@dataclass(frozen=True, slots=True)
class Said:
    """What one call of the program said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        """stdout as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


Call = Callable[..., Said]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call("check", file)` with the small catalog in place of the real one."""
    module = ModuleType("stages.catalog")
    module.CATALOG = SMALL_CATALOG  # type: ignore[attr-defined]  # a module made here
    monkeypatch.setitem(sys.modules, "stages.catalog", module)

    def run(*arguments: object) -> Said:
        result = CliRunner().invoke(main, [str(one) for one in arguments], prog_name="pipeline")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return Said(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def export_file(tmp_path: Path) -> Path:
    """A good file."""
    file = tmp_path / "export.toml"
    file.write_text(GOOD)
    return file


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeOutcome:
    """How a run ended, without a run."""

    uri: str = "s3://images/web01.qcow2"
    state: str = "identical"
    verdicts: tuple[Verdict, ...] = (Verdict("readback", "identical", 1.0),)
    disk_size: int = 20 * GiB
    image_size: int = 5 * GiB + 1
    read_bytes: int = 6 * GiB
    stored_bytes: int = 5 * GiB + 1
    earlier_disk_bytes: int = 0
    earlier_read_bytes: int = 0
    earlier_stored_bytes: int = 0
    elapsed_s: float = 100.0
    bottleneck: str = "write.s3 was the bottleneck: busy 91% of the time."
    manifest_uri: str = "s3://images/web01.qcow2.manifest.json"
    manifest_path: Path | None = Path("web01.qcow2.manifest.json")
    keeps_manifest: bool = True
    manifest: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(facts={}))


@dataclass(slots=True)
class Seam:
    """Stands where planning and engine are: a test says what the run does.

    Attributes:
        work: called in place of the transfer, after some events.
        closed: whether the plan was left properly.
    """

    outcome: FakeOutcome = field(default_factory=FakeOutcome)
    work: Callable[[EventStream], Awaitable[None]] | None = None
    planning_fails: Exception | None = None
    planned: list[ExportConfig] = field(default_factory=list)
    closed: bool = False

    @asynccontextmanager
    async def plan_run(
        self, config: ExportConfig, chain: WiredChain, events: EventStream, **_: object
    ) -> AsyncIterator[Any]:
        """A plan with the attributes that the verbs look at."""
        self.planned.append(config)
        if self.planning_fails:
            raise self.planning_fails
        try:
            yield SimpleNamespace(
                name=config.export.name,
                summary=(("disk", "20 GiB"), ("to read", "6 GiB")),
                target_uri="s3://images/web01.qcow2",
                info=SimpleNamespace(size=20 * GiB, mapped_bytes=6 * GiB),
                layout=SimpleNamespace(image_bytes_max=21 * GiB),
                chain=chain,
            )
        finally:
            self.closed = True

    async def run_export(self, plan: Any, events: EventStream) -> FakeOutcome:
        """The events of a run."""
        out = self.outcome
        events.emit(
            RunPlanned(
                name=plan.name,
                chain=plan.chain.names,
                disk_bytes=out.disk_size,
                mapped_bytes=6 * GiB,
                image_bytes_max=21 * GiB,
                window_bytes=2 * MiB,
                memory_bytes=96 * MiB,
                target=plan.target_uri,
            )
        )
        for number in range(12):
            events.emit(sample(number / 4, number * GiB))
        retry = RetryScheduled(stage="write.s3", operation="put_part", attempt=2, wait_s=1.6, reason="503 SlowDown")
        events.emit(retry)
        events.emit(PartStored(stage="write.s3", number=1, length_bytes=1, guest_bytes=1, attempts=1, elapsed_s=0.1))
        if self.work:
            await self.work(events)
        events.emit(ImageSealed(uri=out.uri, size_bytes=out.image_size))
        events.emit(VerifyProgressed(stage="verify.readback", done_bytes=0, total_bytes=out.disk_size))
        events.emit(ImageVerified(stage="verify.readback", state=out.state, coverage=1.0, detail="all of it"))
        events.emit(ImagePublished(uri=out.uri, manifest_uri=out.manifest_uri))
        events.emit(
            RunFinished(
                name=plan.name,
                uri=out.uri,
                verified="identical",
                disk_bytes=out.disk_size,
                read_bytes=out.read_bytes,
                stored_bytes=out.stored_bytes,
                elapsed_s=out.elapsed_s,
                bottleneck=out.bottleneck,
                manifest_path=str(out.manifest_path),
            )
        )
        return out


def sample(elapsed_s: float, acked: int) -> ProgressSampled:
    """Counters at one moment of a 20 GiB disk."""
    return ProgressSampled(
        elapsed_s=elapsed_s,
        disk_bytes=20 * GiB,
        read_bytes=acked // 2,
        skipped_bytes=acked // 2,
        acked_bytes=acked,
        stored_bytes=acked // 4,
    )


@pytest.fixture
def seam(monkeypatch: pytest.MonkeyPatch) -> Seam:
    """Planning and engine, replaced."""
    fake = Seam()
    monkeypatch.setattr("pipeline.config.planning.plan_run", fake.plan_run)
    monkeypatch.setattr("pipeline.flow.engine.run_export", fake.run_export)
    return fake
