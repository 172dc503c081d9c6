"""`pipeline report`: the page of a run from its manifest, any time later."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.candidates import manifests
from pipeline.commands.console import Console, run_async, until_interrupted, verb
from pipeline.errors import EXIT_OK, PlanError, StoreError
from stages.store.file import local_path
from stages.store.stored import read_manifest, scheme_of

if TYPE_CHECKING:
    from pipeline.observe.record import Record


@click.command("report")
@click.argument("manifest", metavar="MANIFEST", shell_complete=manifests)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page to write; default: the image's name and .html, in this folder. One that exists is replaced.",
)
@click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store.")
@verb
def command(console: Console, manifest: str, output: Path | None, endpoint: str) -> int:
    """Draw the page of a run: what the disk held, where the time went, what was proven, every option and version.

    MANIFEST is a path or URL, or that of the image beside it. The page is one file that loads nothing from elsewhere.
    """
    return run_async(partial(_report, console, manifest, output, endpoint))


async def _report(console: Console, manifest: str, output: Path | None, endpoint: str) -> int:
    from pipeline.flow.manifest import MANIFEST_SUFFIX, manifest_uri
    from pipeline.observe.page import page
    from pipeline.observe.whole_files import replace_file

    image = manifest.removesuffix(MANIFEST_SUFFIX)
    where = manifest_uri(image)
    record = await until_interrupted(partial(_read, image, where, endpoint), console, cleaned="nothing was written")
    path = output or Path(image.rstrip("/").rpartition("/")[2] + ".html")
    try:
        replace_file(path, page(record, origin=where))
    except OSError as error:
        raise PlanError(
            f"the page can't be written: {(error.strerror or str(error)).lower()}",
            operation="report",
            path=path,
            hint="Name another place with -o FILE.",
        ) from None
    console.say(f"{path}: {record.name}, {record.state}")
    console.tell("reported", file=path, manifest=where, name=record.name, state=record.state)
    return EXIT_OK


async def _read(image: str, where: str, endpoint: str) -> Record:
    from pipeline.observe.record import record_of

    if scheme_of(image) == "file" and all(_is_missing(local_path(one)) for one in (image, where)):
        raise StoreError(
            f"{image} does not exist, and neither does {where}",
            operation="report",
            hint="Name the image, or the manifest beside it.",
        )
    return record_of(await read_manifest(image, endpoint), where=where)


def _is_missing(path: Path) -> bool:
    """Whether nothing is there. What can't be looked at may be there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        pass
    return False
