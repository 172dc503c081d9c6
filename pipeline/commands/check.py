"""`pipeline check`: configuration and wiring only; no disk and no network is touched."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.commands.console import Console, next_command, takes_export_file, verb


@click.command("check")
@takes_export_file
@verb
def command(console: Console, file: Path, overrides: tuple[str, ...]) -> int:
    """Check an export file: options and chain, with every fault at once. No disk and no network is touched."""
    from pipeline.config.wiring import load_chain
    from stages.catalog import CATALOG

    config, chain = load_chain(file, CATALOG, overrides)
    if config.target.profile:
        from stages.preflight.target import check_chain

        check_chain(config, chain)
    console.say(f"{file} is fine: {' -> '.join(chain.names)}")
    following = next_command("plan", file, overrides)
    console.say(f'Pieces travel in the order "{chain.order.value}". The next step: {following}')
    console.tell("checked", name=config.export.name, file=file, chain=chain.names, order=chain.order.value)
    return 0
