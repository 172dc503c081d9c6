"""The structure step: every invariant of the image's format, by its headers and tables."""

from __future__ import annotations

from stages.decode.check.checking import check
from stages.decode.named import OpenedFiles
from stages.decode.refusal import UnsupportedError
from stages.prove.steps import StepResult

_FINDINGS_SHOWN = 10


async def check_structure(files: OpenedFiles) -> StepResult:
    """Check the format. Raises StoreError."""
    try:
        reader, inner = await files.open_packed()
        report = await check(
            reader,
            inner,
            extents=files.extents or None,
            member=files.named.member,
            is_overlay=files.backing is not None,
        )
    except UnsupportedError as error:
        return StepResult(name="structure", state="unknown", summary=error.message, hint=error.hint)
    found = tuple(f"{one.kind}: {one.message}" for one in report.findings[:_FINDINGS_SHOWN])
    evidence = {
        "format": files.format,
        "corruptions": str(report.corruptions),
        "leaks": str(report.leaks),
        "warnings": str(report.warnings),
    }
    if report.verdict == "corrupt":
        summary = f"{files.format}: {report.corruptions} faults"
        return StepResult(name="structure", state="failed", summary=summary, details=found, evidence=evidence)
    note = f", {report.leaks} leaked blocks" if report.leaks else ""
    summary = f"{files.format}: headers and tables are in order{note}"
    return StepResult(name="structure", state="passed", summary=summary, details=found, evidence=evidence)
