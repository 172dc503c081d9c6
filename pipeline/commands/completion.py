"""`pipeline completion`: what makes the Tab key work in a shell."""

from __future__ import annotations

import click

from pipeline.commands.console import Console, verb

_HOW = {
    "bash": 'Add to ~/.bashrc:  eval "$(pipeline completion bash)"',
    "zsh": 'Add to ~/.zshrc, behind compinit:  eval "$(pipeline completion zsh)"',
    "fish": "Once:  pipeline completion fish > ~/.config/fish/completions/pipeline.fish",
}


@click.command("completion", epilog="\n\n".join(("\b", *_HOW.values())))
@click.argument("shell", type=click.Choice(list(_HOW)))
@verb
def command(console: Console, shell: str) -> int:
    """Print the script that lets SHELL complete verbs, options, stage names, export files and disks."""
    from click.shell_completion import get_completion_class

    from pipeline.__main__ import main

    kind = get_completion_class(shell)
    assert kind is not None, "click knows the shells that are offered"
    script = kind(main, {}, "pipeline", "_PIPELINE_COMPLETE").source()
    console.say(f"# {_HOW[shell]}\n{script}")
    console.tell("completion", shell=shell, script=script)
    return 0
