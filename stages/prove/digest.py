"""The digest step: is the stored image still what its export wrote? By the store's receipt, else by reading it."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.errors import FormatError, StoreError
from pipeline.flow.items import RangeReader, Verdict
from pipeline.flow.manifest import Manifest
from stages.checksum.leaves import GuestDigest
from stages.compress.index import FRAME_INDEX, FrameIndex
from stages.prove.steps import StepResult
from stages.serve.opening import counted
from stages.store.stored import image_of, read_manifest
from stages.verify.comparison import verify_image
from stages.verify.receipt import judge, receipt_of


async def check_digest(
    reader: RangeReader,
    place: str,
    endpoint: str,
    manifest: str,
    *,
    on_read: Callable[[int], None] = lambda count: None,
) -> StepResult:
    """Compare the image with its manifest.

    Args:
        manifest: where that is; empty: beside the image.
        on_read: told how many bytes of the image were read.
    Raises:
        StoreError: the image can't be read.
    """
    try:
        told = await read_manifest(place, endpoint, manifest)
    except (StoreError, FormatError) as error:
        hint = (
            "An image without a manifest can't be compared with what was exported: --skip digest, or --manifest FILE."
        )
        return StepResult(name="digest", state="unknown", summary=error.message, hint=hint)
    reader = image_of(reader, place, told)
    verdict = judge(receipt_of(reader, told.receipt), size=told.image.size)
    if verdict.state == "unproven":
        counter = counted(reader)
        try:
            verdict = await _read_back(counter, told) or verdict
        finally:
            on_read(counter.read_bytes)
    return result_of(verdict)


async def _read_back(reader: RangeReader, told: Manifest) -> Verdict | None:
    if told.digest is None:
        return None
    frames = told.facts.get(FRAME_INDEX.name)
    return await verify_image(
        reader,
        told.image.format,
        GuestDigest.from_json(told.digest),
        virtual_size=told.image.virtual_size,
        image_size=told.image.size,
        index=FrameIndex.from_json(frames) if frames is not None else None,
    )


def result_of(verdict: Verdict) -> StepResult:
    """A verification's verdict as a step's."""
    how = {"receipt": "by the store's receipt", "readback": "every byte read back"}.get(verdict.level, verdict.level)
    if verdict.state == "identical":
        return StepResult(
            name="digest", state="passed", summary=f"{how}: {verdict.detail}", evidence=dict(verdict.evidence)
        )
    if verdict.state == "differs":
        places = tuple(f"differs: {len(found)} bytes at guest offset {found.start}" for found in verdict.differing)
        return StepResult(
            name="digest", state="failed", summary=verdict.detail, details=places, evidence=dict(verdict.evidence)
        )
    return StepResult(
        name="digest", state="unknown", summary=verdict.detail, hint="Export it with checksum.guest, or --skip digest."
    )
