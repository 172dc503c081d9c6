"""`pipeline verify`: the stored image against its manifest, any time later."""

from __future__ import annotations

import secrets
import sys
from functools import partial
from typing import TYPE_CHECKING, Literal

import click

from pipeline.commands.console import Console, JsonEvents, run_async, until_interrupted, verb
from pipeline.errors import EXIT_DIFFERS, EXIT_FAILED, EXIT_OK, FormatError
from pipeline.units import MiB, format_exact
from stages.store.stored import image_of, open_stored, read_manifest

if TYPE_CHECKING:
    from pipeline.events import EventStream
    from pipeline.flow.items import RangeReader, Verdict
    from pipeline.flow.manifest import Manifest
    from stages.verify.sampling import Sample

Level = Literal["receipt", "sample", "readback"]

_SAMPLE_MIN = 64 * MiB
_EXIT_CODES = {"identical": EXIT_OK, "differs": EXIT_DIFFERS, "unproven": EXIT_FAILED}


@click.command("verify")
@click.argument("image", metavar="FILE|URL")
@click.option(
    "--level",
    type=click.Choice(["receipt", "sample", "readback"]),
    default="readback",
    show_default=True,
    help="receipt: compare the store's checksums. sample: read a part of the image. readback: read and decode all.",
)
@click.option(
    "--share", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Of the data, for --level sample."
)
@click.option("--seed", default="", help="For --level sample: look at the same places again. Else at others each time.")
@click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store.")
@click.option(
    "--manifest", default="", metavar="FILE|URL", help="The manifest, where it does not lie beside the image."
)
@verb
def command(console: Console, image: str, level: Level, share: float, seed: str, endpoint: str, manifest: str) -> int:
    """Compare a stored image with its manifest, which lies beside it under the same name and `.manifest.json`.

    Exits 0 when it is the disk that was exported, 3 when it is not, 1 when that could not be told.
    """
    from stages.verify.sampling import Sample

    sample = None
    if level == "sample":
        sample = Sample(seed=seed or secrets.token_hex(8), share=share, at_least=_SAMPLE_MIN)
    return run_async(partial(_verify, console, image, level, endpoint, sample, manifest))


async def _verify(
    console: Console, image: str, level: Level, endpoint: str, sample: Sample | None, manifest: str
) -> int:
    from pipeline.config.options import without_secrets
    from pipeline.events import EventStream
    from pipeline.flow.manifest import MANIFEST_SUFFIX
    from pipeline.observe.progress import make_display

    image = image.removesuffix(MANIFEST_SUFFIX)
    events = EventStream()
    if console.log:
        events.subscribe(console.log)
    display = None
    if console.as_json:
        events.subscribe(JsonEvents(console))
    elif sys.stderr.isatty():
        display = make_display(sys.stderr)
        events.subscribe(display)
    try:
        verdict = await until_interrupted(
            partial(_compare, image, level, endpoint, events, sample, manifest), console, cleaned="nothing was changed"
        )
    finally:
        if display is not None:
            display.close()
    _tell(console, without_secrets(image), verdict)
    return _EXIT_CODES[verdict.state]


async def _compare(
    image: str, level: Level, endpoint: str, events: EventStream, sample: Sample | None, told: str
) -> Verdict:
    """Raises FormatError for a manifest that is none, StoreError where image or manifest can't be read."""
    from stages.verify.receipt import judge, receipt_of

    manifest = await read_manifest(image, endpoint, told)
    async with open_stored(image, endpoint) as opened:
        reader = image_of(opened, image, manifest)
        if level != "receipt":
            return await _read_back(reader, manifest, events, sample)
        return judge(receipt_of(reader, manifest.receipt), size=manifest.image.size)


async def _read_back(reader: RangeReader, manifest: Manifest, events: EventStream, sample: Sample | None) -> Verdict:
    from pipeline.flow.items import Verdict
    from pipeline.flow.stage import RealClock
    from stages.checksum.leaves import GuestDigest
    from stages.compress.index import FRAME_INDEX, FrameIndex
    from stages.verify.comparison import ProgressReport, verify_image

    if manifest.digest is None:
        reason = "the export had no checksum.guest stage, so there is nothing to compare with; use --level receipt"
        return Verdict("sample" if sample else "readback", "unproven", 0.0, detail=reason)
    digest = GuestDigest.from_json(manifest.digest)
    if digest.size != manifest.disk.size:
        raise FormatError(
            "the manifest contradicts itself: its digest is of another disk size",
            operation="read manifest",
            digest=digest.size,
            disk=manifest.disk.size,
            hint="It was damaged or changed by hand; fetch it again.",
        )
    frames = manifest.facts.get(FRAME_INDEX.name)
    return await verify_image(
        reader,
        manifest.image.format,
        digest,
        virtual_size=manifest.image.virtual_size,
        image_size=manifest.image.size,
        progress=ProgressReport("verify.sample" if sample else "verify.readback", events.emit, RealClock()),
        index=FrameIndex.from_json(frames) if frames is not None else None,
        sample=sample,
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
