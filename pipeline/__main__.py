"""The command line: `pipeline VERB`, also as `python -m pipeline`."""

from __future__ import annotations

import importlib
import os

import click

from pipeline import __version__

# numpy's linear algebra, which nothing here uses, starts a thread for every core when it is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Verb: (module that holds its `command`, summary). A module is imported when its verb is called, so that help is
# there at once: what a run needs takes longer to import than a person waits for help.
VERBS = {
    "run": ("pipeline.commands.run", "Export a disk as FILE says: read, encode, store, verify."),
    "check": ("pipeline.commands.check", "Check an export file; nothing is touched."),
    "plan": ("pipeline.commands.plan", "Say what run would do: sizes, parts, memory; nothing is sent."),
    "verify": ("pipeline.commands.verify", "Compare a stored image with its manifest, any time later."),
    "uploads": ("pipeline.commands.uploads", "Find and remove what runs left behind in a store."),
    "convert": ("pipeline.commands.convert", "Convert a disk or image into another image, over paths and URLs."),
    "inspect": ("pipeline.commands.inspect", "Look at an image of any format: info, check and map, by ranges."),
    "preflight": ("pipeline.commands.preflight", "Say before the upload whether a disk will boot over there."),
    "profiles": ("pipeline.commands.profiles", "List the targets: what each takes, and how it imports an image."),
    "ls": ("pipeline.commands.ls", "List files on a disk in an image, wherever it is stored."),
    "cat": ("pipeline.commands.cat", "Write one file of a disk in an image to stdout."),
    "disk": ("pipeline.commands.disk", "Show what is on a disk or image and what an export would copy."),
    "prove": ("pipeline.commands.prove", "Prove an image where it is stored: check it, and boot it."),
    "serve": ("pipeline.commands.serve", "Serve an image as an NBD disk, for other tools and for booting."),
    "init": ("pipeline.commands.init", "Write an export file for this machine."),
    "report": ("pipeline.commands.report", "Draw the page of a run from its manifest."),
    "stages": ("pipeline.commands.stages", "List the stages that can stand in a chain, with their options."),
    "completion": ("pipeline.commands.completion", "Print what makes the Tab key work in a shell."),
}


class Verbs(click.Group):
    """A group that knows its verbs by name and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every verb, in the order of use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module and take its `command`."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(VERBS[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a way out for a misspelt verb."""
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            from difflib import get_close_matches

            close = get_close_matches(args[0], VERBS, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"there are {', '.join(VERBS)}"
            ctx.fail(f'There is no verb "{args[0]}": {hint}')
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, summary) for name, (_, summary) in VERBS.items()])


@click.command(cls=Verbs)
@click.version_option(__version__, prog_name="pipeline")
def main() -> None:
    """Stream a Linux disk straight into network storage as a verified, cloud-importable image."""
    _occupy_standard_streams()


def _occupy_standard_streams() -> None:
    """Give closed standard streams to nobody.

    Else the next files that are opened get their numbers, and what a library or a child process says on stderr ends
    up inside the image.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one


if __name__ == "__main__":
    main(prog_name="pipeline")
