"""`pipeline convert`: from any image or disk to any image, over paths and URLs; all blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from pipeline.commands.console import Console, run_async, verb
from pipeline.config.conversion import STDOUT, Conversion, conversion_text, is_url
from pipeline.config.proposal import path_of_file_url


@click.command("convert")
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="TARGET")
@click.option(
    "-f", "source_format", default="auto", metavar="FMT", help="Of SOURCE; else told once by its first bytes."
)
@click.option("-O", "format", default="", metavar="FMT", help="Of TARGET; else as its name says.")
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the encoder: `pipeline stages encode.FMT` lists them. May be given many times.",
)
@click.option("-c", "compress", is_flag=True, help="Compress, where the format can.")
@click.option(
    "--extent", "extents", multiple=True, metavar="FILE", help="A VMDK's other file; in the order of its descriptor."
)
@click.option("--member", default="", metavar="NAME", help="The disk inside of an OVA that has several.")
@click.option("--backing", multiple=True, metavar="FILE", help="What a qcow2 overlay lies on, the next below it first.")
@click.option("--backing-format", default="auto", metavar="FMT", help="Of the --backing images.")
@click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store.")
@click.option("--ca-file", default="", metavar="FILE", help="PEM certificates to trust instead of the system's.")
@click.option("--overwrite", is_flag=True, help="Replace a TARGET that is there already.")
@click.option("--verify/--no-verify", default=True, help="Read TARGET back and compare every byte. The default.")
@click.option("--print-config", is_flag=True, help="Print the export file that does the same, and do nothing.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
@verb
def command(console: Console, quiet: bool, print_config: bool, **asked: object) -> int:
    """Convert SOURCE, a disk or an image of any format, into the image TARGET. Both are paths or URLs.

    TARGET may be `-` for stdout. Runs the same chain as `pipeline run`; exit codes are the same.
    """
    from pipeline.commands.run import run_chain
    from pipeline.config.wiring import load_chain
    from stages.catalog import CATALOG

    wanted = Conversion(**asked)  # type: ignore[arg-type]  # the names and types of the click options above
    wanted = settle_source(console, wanted)
    if print_config:
        console.say(conversion_text(wanted, CATALOG, masked=True).rstrip())
        console.tell("config", text=conversion_text(wanted, CATALOG, masked=True))
        return 0
    # The manifest's local copy lies beside the image where that is a file, as after `qemu-img convert`.
    is_file = not is_url(wanted.target) and wanted.target != STDOUT
    target = path_of_file_url(wanted.target) if wanted.target.startswith("file://") else wanted.target
    folder = Path(target).parent if is_file else Path()
    config, chain = load_chain(folder / "convert", CATALOG, text=conversion_text(wanted, CATALOG))
    writer = chain.writer
    if writer.spec.holds_stdout and writer.spec.holds_stdout(writer.options):
        console.leave_stdout()
    return run_async(partial(run_chain, console, config, chain, quiet))


def settle_source(console: Console, wanted: Conversion) -> Conversion:
    """Settle how the source is read: a local disk or raw file as it is, anything else as an image."""
    from pipeline.config.options import without_secrets
    from stages.decode.named import is_block_device

    alone = not (wanted.extents or wanted.member or wanted.backing)
    is_local = "://" not in wanted.source or wanted.source.startswith("file://")
    if not is_local or not alone:
        return wanted
    if wanted.source_format == "raw" or (wanted.source_format == "auto" and is_block_device(wanted.source)):
        return replace(wanted, is_disk=True)
    if wanted.source_format != "auto":
        return wanted
    found: list[tuple[str, str]] = []
    run_async(partial(_probe, wanted, found))
    format, note = found[0]
    if format == "raw" or "declare" in note:
        console.note(f"{without_secrets(wanted.source)}: taken for {format}, {note}; -f says it for certain")
    return replace(wanted, is_disk=format == "raw", source_format=format)


async def _probe(wanted: Conversion, found: list[tuple[str, str]]) -> int:
    from stages.decode.named import NamedImage, open_files

    async with open_files(NamedImage(place=wanted.source)) as files:
        found.append((files.format, files.note))
    return 0
