"""`pipeline plan`: open the source read-only and the target, say every number, send nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.console import (
    Console,
    check_observers,
    next_command,
    run_async,
    takes_export_file,
    until_interrupted,
    verb,
)

if TYPE_CHECKING:
    from pipeline.config.parse import ExportConfig
    from pipeline.config.wiring import WiredChain
    from stages.preflight.profile import Profile


@click.command("plan")
@takes_export_file
@verb
def command(console: Console, file: Path, overrides: tuple[str, ...]) -> int:
    """Say what `run` would do with FILE: sizes, parts, memory. Opens the source read-only and sends nothing."""
    from pipeline.config.wiring import load_chain
    from stages.catalog import CATALOG

    config, chain = load_chain(file, CATALOG, overrides)
    profile = None
    if config.target.profile:
        from stages.preflight.target import check_chain

        profile = check_chain(config, chain)
    return run_async(partial(_plan, console, config, chain, profile, next_command("run", file, overrides)))


async def _plan(
    console: Console, config: ExportConfig, chain: WiredChain, profile: Profile | None, following: str
) -> int:
    work = partial(_show, console, config, chain, profile, following)
    return await until_interrupted(work, console, cleaned="nothing was sent")


async def _show(
    console: Console, config: ExportConfig, chain: WiredChain, profile: Profile | None, following: str
) -> int:
    from pipeline.config.continuing import was_begun
    from pipeline.config.planning import plan_run
    from pipeline.events import EventStream
    from pipeline.flow.stage import Rounding

    events = EventStream()
    events.subscribe(console.open_log(config.observe))
    check_observers(config.observe)
    rounding = Rounding(alignment=profile.align) if profile is not None else None
    async with plan_run(config, chain, events, is_rehearsal=True, rounding=rounding) as plan:
        if profile is not None:
            from stages.preflight.target import check_plan

            check_plan(profile, plan)
        width = max(len(what) for what, _ in plan.summary)
        for what, how_much in plan.summary:
            console.say(f"{what:<{width}}  {how_much}")
        if profile is not None:
            console.say(
                f"The sizes suit {profile.title}. Will it boot there? pipeline preflight --profile {profile.name}"
            )
        is_begun = was_begun(config, chain)
        if is_begun:
            console.say(f"Nothing was sent. An earlier run is not finished. Go on with it: {following} --resume")
            console.say(f"Or remove what it sent and start anew: {following} --discard")
        else:
            console.say(f"Nothing was sent. The next step: {following}")
        console.tell(
            "plan",
            name=plan.name,
            chain=chain.names,
            order=chain.order.value,
            disk_bytes=plan.info.size,
            mapped_bytes=plan.info.mapped_bytes,
            image_bytes_max=plan.layout.image_bytes_max,
            target=plan.target_uri,
            unfinished=is_begun,
            summary=dict(plan.summary),
        )
    return 0
