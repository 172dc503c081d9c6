"""`pipeline verify`: the stored image against its manifest, any time later."""

from __future__ import annotations

import sys
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Literal

import click

from pipeline.commands.console import Console, JsonEvents, run_async, until_interrupted, verb
from pipeline.errors import EXIT_DIFFERS, EXIT_FAILED, EXIT_OK, FormatError, PlanError, StoreError
from pipeline.units import MiB, format_exact

if TYPE_CHECKING:
    from pipeline.events import EventStream
    from pipeline.flow.items import RangeReader, Verdict
    from pipeline.flow.manifest import Manifest

Level = Literal["receipt", "readback"]

# A manifest has 22 bytes for each MiB of a full disk: this is one of 10 TiB.
_MANIFEST_MAX = 256 * MiB
_EXIT_CODES = {"identical": EXIT_OK, "differs": EXIT_DIFFERS, "unproven": EXIT_FAILED}


@click.command("verify")
@click.argument("image", metavar="FILE|URL")
@click.option(
    "--level",
    type=click.Choice(["receipt", "readback"]),
    default="readback",
    show_default=True,
    help="receipt: compare the store's checksums. readback: read and decode all of the image.",
)
@click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store.")
@verb
def command(console: Console, image: str, level: Level, endpoint: str) -> int:
    """Compare a stored image with its manifest, which lies beside it under the same name and `.manifest.json`.

    Exits 0 when it is the disk that was exported, 3 when it is not, 1 when that could not be told.
    """
    return run_async(partial(_verify, console, image, level, endpoint))


async def _verify(console: Console, image: str, level: Level, endpoint: str) -> int:
    from pipeline.events import EventStream
    from pipeline.flow.manifest import MANIFEST_SUFFIX
    from pipeline.observe.progress import make_display

    image = image.removesuffix(MANIFEST_SUFFIX)
    events = EventStream()
    display = None
    if console.as_json:
        events.subscribe(JsonEvents(console))
    elif sys.stderr.isatty():
        display = make_display(sys.stderr)
        events.subscribe(display)
    try:
        verdict = await until_interrupted(
            partial(_compare, image, level, endpoint, events), console, cleaned="nothing was changed"
        )
    finally:
        if display is not None:
            display.close()
    _tell(console, image, verdict)
    return _EXIT_CODES[verdict.state]


async def _compare(image: str, level: Level, endpoint: str, events: EventStream) -> Verdict:
    """Raises FormatError for a manifest that is none, StoreError where image or manifest can't be read."""
    from stages.verify.receipt import judge, receipt_of

    manifest = await _read_manifest(image, endpoint)
    async with _open(image, endpoint) as reader:
        if level == "readback":
            return await _read_back(reader, manifest, events)
        return judge(receipt_of(reader, manifest.receipt), size=manifest.image.size)


async def _read_back(reader: RangeReader, manifest: Manifest, events: EventStream) -> Verdict:
    from pipeline.flow.items import Verdict
    from pipeline.flow.stage import RealClock
    from stages.checksum.leaves import GuestDigest
    from stages.verify.comparison import ProgressReport, verify_image

    if manifest.digest is None:
        reason = "the export had no checksum.guest stage, so there is nothing to compare with; use --level receipt"
        return Verdict("readback", "unproven", 0.0, detail=reason)
    digest = GuestDigest.from_json(manifest.digest)
    if digest.size != manifest.disk.size:
        raise FormatError(
            "the manifest contradicts itself: its digest is of another disk size",
            operation="read manifest",
            digest=digest.size,
            disk=manifest.disk.size,
            hint="It was damaged or changed by hand; fetch it again.",
        )
    return await verify_image(
        reader,
        manifest.image.format,
        digest,
        virtual_size=manifest.image.virtual_size,
        image_size=manifest.image.size,
        progress=ProgressReport("verify.readback", events.emit, RealClock()),
    )


async def _read_manifest(image: str, endpoint: str) -> Manifest:
    from pipeline.flow.manifest import Manifest, manifest_uri

    where = manifest_uri(image)
    try:
        async with _open(where, endpoint) as reader:
            if reader.size > _MANIFEST_MAX:
                raise FormatError(
                    "this is too large for a manifest",
                    operation="read manifest",
                    size=reader.size,
                    limit=_MANIFEST_MAX,
                    manifest=where,
                )
            text = await reader.read(0, reader.size)
    except StoreError as error:
        raise StoreError(
            f"the manifest can't be read: {error}",
            temporary=error.temporary,
            status=error.status,
            hint=f"{error.hint} It belongs beside the image, as {where}.".lstrip(),
        ) from error
    made = Manifest.from_json(text, where=where)
    if not _is_usable(made):
        raise FormatError(
            "the manifest does not say what the image is",
            operation="read manifest",
            manifest=where,
            hint="It was damaged or changed by hand; fetch it again.",
        )
    return made


def _is_usable(manifest: Manifest) -> bool:
    """Whether what is used here has the types that it should have: the file may come from anywhere."""
    numbers = (manifest.disk.size, manifest.image.size, manifest.image.virtual_size)
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and isinstance(manifest.image.format, str)
        and isinstance(manifest.facts, dict)
        and all(len(proof) == 3 and all(isinstance(text, str) for text in proof) for proof in manifest.receipt)
    )


def _open(url: str, endpoint: str) -> AbstractAsyncContextManager[RangeReader]:
    """Open a path or URL for reading, by the writer that stores under its scheme."""
    from stages.catalog import CATALOG

    scheme = url.partition("://")[0] if "://" in url else "file"
    for spec in CATALOG:
        if scheme in spec.schemes and spec.open_reader is not None:
            opened: AbstractAsyncContextManager[RangeReader] = spec.open_reader(url, endpoint=endpoint)
            return opened
    known = sorted({scheme for spec in CATALOG for scheme in spec.schemes if spec.open_reader is not None})
    raise PlanError(
        f"nothing is stored under {scheme}: URLs here",
        operation="open",
        url=url,
        hint=f"A path, or a URL that begins with {', '.join(f'{one}://' for one in known)}.",
    )


def _tell(console: Console, image: str, verdict: Verdict) -> None:
    console.tell(
        "verified",
        uri=image,
        level=verdict.level,
        state=verdict.state,
        coverage=verdict.coverage,
        detail=verdict.detail,
        differing=[{"offset": found.start, "length": len(found)} for found in verdict.differing],
        evidence=dict(verdict.evidence),
    )
    console.say(f"{image}: {verdict.state} ({verdict.level})")
    console.say(f"  {verdict.detail}")
    for found in verdict.differing:
        console.say(f"  differs: {format_exact(len(found))} at guest offset {found.start}")
