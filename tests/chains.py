"""Running whole chains in tests: an export.toml from a few words, and the real engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.continuing import Attempt
from pipeline.config.parse import load_config
from pipeline.config.planning import plan_run
from pipeline.config.wiring import wire
from pipeline.events import Event, EventStream
from pipeline.flow.engine import Outcome, run_export
from pipeline.flow.stage import Catalog, Clock
from stages.catalog import CATALOG


def write_toml(
    path: Path, *stages: str, memory: str = "96 MiB", name: str = "test", on_failure: str | None = None
) -> Path:
    """An export.toml; each stage is its name, then `option = value` lines separated by `;`."""
    lines = ["[export]", f'name = "{name}"', f'memory = "{memory}"']
    lines += [f'on_failure = "{on_failure}"'] if on_failure else []
    for stage in stages:
        use, *options = [part.strip() for part in stage.split(";")]
        lines += ["[[stage]]", f'use = "{use}"', *options]
    path.write_text("\n".join(lines) + "\n")
    return path


async def export(
    toml: Path,
    *,
    overrides: Sequence[str] = (),
    events: list[Event] | None = None,
    catalog: Catalog = CATALOG,
    clock: Clock | None = None,
    fuse: bool = True,
    attempt: Attempt | None = None,
) -> Outcome:
    """Run an export.toml as the command does; every event is appended to `events`.

    Args:
        attempt: for a run that keeps a journal.
    """
    config = load_config(toml, catalog, overrides)
    stream = EventStream()
    if events is not None:
        stream.subscribe(events.append)
    async with plan_run(config, wire(config), stream, clock=clock, fuse=fuse, attempt=attempt) as plan:
        outcome = await run_export(plan, stream)
    assert outcome.leaked_bytes == 0, "a stage kept a slice"
    return outcome
