"""The preflight step: the rules, asked of the disk that the image holds."""

from __future__ import annotations

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from stages.disk.view import open_system
from stages.disk.volumes import open_volumes
from stages.preflight.opening import NoFiles
from stages.preflight.profile import find_profile
from stages.preflight.rules import Target, boot_mode_for, judge
from stages.preflight.subject import gather
from stages.preflight.volumes import known_volumes
from stages.prove.steps import State, StepResult

# The rules that hold everywhere, where no target is named.
_ANYWHERE = "generic"
_SHOWN = 12


async def check_preflight(
    reader: RangeReader, profile: str, *, place: str, format: str = "", file_size: int | None = None
) -> StepResult:
    """Ask every rule.

    Args:
        reader: of the disk's bytes; borrowed.
        profile: name of the target; empty: what holds everywhere.
        place: what to call the image.
        format, file_size: of the image, for the target's limits.
    Raises:
        StoreError: the image can't be read.
        ConfigError: there is no such profile.
    """
    told = find_profile(profile or _ANYWHERE)
    disk = await open_volumes(reader)
    problem = ""
    try:
        view = await open_system(disk)
        subject = await gather(
            view, place=place, reader=reader, table=disk.table, volumes=known_volumes(disk), no_system=problem
        )
    except FormatError as error:
        problem = f"{error.message}. {error.hint}".rstrip()
        subject = await gather(
            NoFiles(), place=place, reader=reader, table=disk.table, volumes=known_volumes(disk), no_system=problem
        )
    target = Target(
        profile=told,
        boot_mode=boot_mode_for(told, subject),
        format=format,
        virtual_size=reader.size,
        file_size=file_size,
        file_size_max=file_size,
    )
    findings = await judge(subject, target)
    blocks = [one for one in findings if one.blocks]
    warns = [one for one in findings if one.warns]
    lines = [f"{one.id}: {one.message}" for one in (*blocks, *warns)]
    more = len(lines) - _SHOWN
    details = (*lines[:_SHOWN], *((f"and {more} more: pipeline preflight",) if more > 0 else ()))
    state: State = "failed" if blocks else "passed"
    if blocks:
        summary = f"for {told.name}: {len(blocks)} findings say that it will not boot"
    elif warns:
        summary = f"for {told.name}: nothing stands in the way, {len(warns)} warnings"
    else:
        summary = f"for {told.name}: nothing stands in the way"
    evidence = {"profile": told.name, "boot_mode": target.boot_mode, "system": subject.distribution.title}
    evidence |= {"blocks": ", ".join(one.id for one in blocks), "warnings": ", ".join(one.id for one in warns)}
    return StepResult(name="preflight", state=state, summary=summary, details=details, evidence=evidence)


def video_of(profile: str) -> str:
    """The video card that machines of a target have; empty where it is not known. Raises ConfigError."""
    return find_profile(profile).hardware.video if profile else ""
