"""The `[target]` of an export: what its profile says about the chain, then about the plan, then about the disk.

The chain is checked before anything is opened, the plan before the target is touched, the disk before the first byte
moves.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.config import locate
from pipeline.config.options import Secret, without_secrets
from pipeline.config.parse import ExportConfig, StageConfig
from pipeline.config.wiring import WiredChain
from pipeline.errors import ConfigError, Fault, PlanError, PreflightError
from pipeline.events import EventStream, PreflightDone
from pipeline.units import format_exact, format_size
from stages.preflight.findings import Finding, verdict_of
from stages.preflight.limits import takes
from stages.preflight.profile import Profile, find_profile
from stages.preflight.rules import Target, boot_mode_for, find_rule, judge

if TYPE_CHECKING:
    from pipeline.config.planning import RunPlan
    from stages.preflight.opening import Wanted

# What "format" and "format:variant" in a profile mean as a stage.
_VARIANT_OPTION = {"vhd": "variant", "vmdk": "variant", "qcow2": "compression"}


def profile_of(config: ExportConfig) -> Profile | None:
    """The profile that an export file names; None where it names none. A path is meant from the file's folder.

    Raises:
        ConfigError: there is no such profile, or it is faulty.
    """
    name = config.target.profile
    if name is None:
        return None
    if "/" in name or name.endswith(".toml"):
        return find_profile(str(config.file.parent / Path(name).expanduser()))
    return find_profile(name)


def image_format(encoder: StageConfig) -> str:
    """What an encoder makes, as profiles write it: `qcow2:zlib`, `vhd:fixed`, `raw`."""
    name = encoder.name.partition(".")[2]
    variant = getattr(encoder.options, _VARIANT_OPTION.get(name, ""), None)
    return f"{name}:{variant}" if variant else name


def check_chain(config: ExportConfig, chain: WiredChain) -> Profile | None:
    """Hold the chain against the profile: format, variant, compression, boot mode, rules to ignore.

    Raises:
        ConfigError: with every fault, each at its place with the right choice.
    """
    try:
        profile = profile_of(config)
    except ConfigError as error:
        if len(error.faults) == 1 and not error.faults[0].file:
            fault = error.faults[0]
            raise ConfigError([_at(config, ("target", "profile"), fault.reason, fault.hint)]) from None
        raise
    if profile is None:
        return None
    faults: list[Fault] = []
    mode = config.target.boot_mode
    if mode is not None and mode not in profile.boot_modes:
        reason = f"boot_mode: {profile.name} starts machines by {' or '.join(profile.boot_modes)}, not by {mode}"
        faults.append(_at(config, ("target", "boot_mode"), reason, f'write boot_mode = "{profile.boot_modes[0]}"'))
    for id in config.target.ignore:
        try:
            find_rule(id)
        except ConfigError as error:
            fault = error.faults[0]
            faults.append(_at(config, ("target", "ignore"), f"ignore: {fault.reason}", fault.hint))
    made = image_format(chain.encoder)
    if profile.formats and not takes(profile.formats, made):
        reason = (
            f"{profile.name} does not take {_in_words(made)}: it takes {', '.join(map(_in_words, profile.formats))}"
        )
        place = ("stage", chain.encoder.index, "use")
        faults.append(_at(config, place, reason, _proposal(profile, made)))
    for stage in chain.compressors:
        packed = f"{made.partition(':')[0]}+{stage.name.partition('.')[2]}"
        if profile.formats and packed not in profile.formats:
            reason = f"{profile.name} takes no image inside of a compressed stream"
            faults.append(_at(config, ("stage", stage.index, "use"), reason, "remove this stage"))
    if faults:
        raise ConfigError(faults)
    return profile


def _in_words(format: str) -> str:
    return format.replace(":", " ")


def _proposal(profile: Profile, made: str) -> str:
    """How to write the format that the profile wants; the same format in another variant where it takes that."""
    name = made.partition(":")[0]
    wanted = next((one for one in profile.formats if one.partition(":")[0] == name), profile.formats[0])
    stage, option = stage_for(wanted)
    return f'write use = "{stage}"' + (f' with {option[0]} = "{option[1]}"' if option else "")


def stage_for(format: str) -> tuple[str, tuple[str, str] | None]:
    """The stage that makes a format of a profile, and the option (name, value) that it needs for it."""
    name, _, variant = format.partition(":")
    option = _VARIANT_OPTION.get(name, "")
    return f"encode.{name}", (option, variant) if variant and option else None


def _at(config: ExportConfig, path: locate.Path, reason: str, hint: str) -> Fault:
    places = locate.locate(config.text)
    place = places.value(path)
    if place is None:
        return Fault(reason=reason, hint=hint, file=str(config.file))
    return Fault(
        reason=reason,
        hint=hint,
        file=str(config.file),
        line=place.line,
        column=place.column,
        width=place.width,
        text=places.line(place.line),
    )


def check_plan(profile: Profile, plan: RunPlan) -> None:
    """Hold the sizes of a plan against the profile. Rules that the user ignores don't count.

    Raises:
        PlanError: the target takes no disk or image of that size.
    """
    if "out.size" in plan.config.target.ignore:
        return
    size, image = plan.layout.virtual_size, plan.layout.image_bytes
    if profile.max_virtual and size > profile.max_virtual:
        raise PlanError(
            f"{profile.name} takes disks of {format_size(profile.max_virtual)}, this one has {format_exact(size)}",
            operation="plan",
            hint=_cut_hint(profile, size),
        )
    if profile.align and size % profile.align:
        raise PlanError(
            f"{profile.name} takes disks of whole {format_size(profile.align)}, this one has {format_exact(size)}",
            operation="plan",
            hint="Make the disk longer by what is missing (`truncate -s %1M FILE` for a file), or ignore out.size.",
        )
    if image is not None and profile.max_file and image > profile.max_file:
        raise PlanError(
            f"{profile.name} takes images of {format_size(profile.max_file)}, this one will have {format_exact(image)}",
            operation="plan",
            hint=f"Choose a format that leaves free space out: {_proposal(profile, profile.formats[0])}.",
        )


def _cut_hint(profile: Profile, size: int) -> str:
    return (
        "Cut behind the last partition that is needed (through = N), or shrink the filesystems; "
        f"{format_exact(size - profile.max_virtual)} are too much."
    )


def object_name(plan: RunPlan) -> str:
    """What the image will be called over there: the object's name without what is before it."""
    options = plan.chain.writer.options
    place = getattr(options, "url", None) or getattr(options, "path", None)
    if place is None or isinstance(place, Secret):
        return ""
    path = urlsplit(str(place)).path if "://" in str(place) else str(place)
    return path.rpartition("/")[2]


def wanted_of(plan: RunPlan) -> Wanted | None:
    """The source of a plan, to be looked at; None for one that is no disk (made-up data)."""
    from stages.preflight.opening import Wanted

    options = plan.chain.source.options
    place = getattr(options, "url", None) or getattr(options, "path", None)
    if place is None:
        return None
    if isinstance(place, Secret):
        place = place.reveal()
    format = "raw" if plan.chain.source.name == "read.disk" else getattr(options, "format", "auto")
    return Wanted(
        place=str(place),
        format=format,
        endpoint=getattr(options, "endpoint", ""),
        ca_file=getattr(options, "ca_file", None),
    )


async def gate(profile: Profile, plan: RunPlan, events: EventStream) -> tuple[Finding, ...]:
    """Ask every rule about the source of a plan, note the answers in it for the manifest, and tell them.

    Raises:
        PreflightError: something blocks.
        StoreError, FormatError: the source can't be read.
    """
    from stages.preflight.opening import open_subject

    wanted = wanted_of(plan)
    if wanted is None:
        return ()
    target = plan.config.target
    async with open_subject(wanted) as subject:
        judged = Target(
            profile=profile,
            boot_mode=target.boot_mode or boot_mode_for(profile, subject),
            kind=target.kind,
            format=image_format(plan.chain.encoder),
            virtual_size=plan.layout.virtual_size,
            file_size=plan.layout.image_bytes,
            file_size_max=plan.layout.image_bytes_max,
            name=object_name(plan),
            room=_room(plan),
            kept=_kept(plan),
            consistency=str(getattr(plan.chain.source.options, "consistency", "") or ""),
        )
        findings = await judge(subject, judged, ignored=target.ignore)
    told = [one.to_json() for one in findings if one.status in ("fail", "unknown")]
    plan.preflight = {
        "profile": profile.name,
        "checked": profile.checked,
        "boot_mode": judged.boot_mode,
        "kind": judged.kind,
        "verdict": verdict_of(findings),
        "ignored": sorted(target.ignore),
        "passed": sum(one.status == "pass" for one in findings),
        "findings": told,
    }
    blocks = sum(one.blocks for one in findings)
    events.emit(
        PreflightDone(
            profile=profile.name,
            verdict=verdict_of(findings),
            blocks=blocks,
            warnings=sum(one.warns for one in findings),
            findings=tuple(told),
        )
    )
    if blocks:
        ids = dict.fromkeys(one.id for one in findings if one.blocks)
        first = next(one for one in findings if one.blocks)
        raise PreflightError(
            f"{profile.name}: {first.message}"
            + (f" ({', '.join(map(str, first.evidence))})" if first.evidence else ""),
            operation="preflight",
            hint=f"{blocks} findings block. All of them, and what to do: pipeline preflight {_named(plan)} "
            f"--profile {target.profile}\n  To go on all the same: [target] ignore = {_listed(list(ids))}",
        )
    return findings


def _named(plan: RunPlan) -> str:
    """The source as a person would name it again; a secret by where it comes from."""
    options = plan.chain.source.options
    place = getattr(options, "url", None) or getattr(options, "path", None)
    return f'"${place.name}"' if isinstance(place, Secret) else without_secrets(str(place))


def _listed(ids: list[str]) -> str:
    return "[" + ", ".join(f'"{one}"' for one in ids) + "]"


def _room(plan: RunPlan) -> int | None:
    """Free bytes in the folder that a file is written to."""
    from stages.decode.named import is_block_device

    path = getattr(plan.chain.writer.options, "path", None)
    if not isinstance(path, Path) or is_block_device(str(path)):
        return None
    try:
        found = os.statvfs(path.parent)
    except OSError:
        return None
    # A file that is sparse there takes what it holds; what free blocks root alone may use does not count.
    return found.f_bavail * found.f_frsize


def _kept(plan: RunPlan) -> frozenset[int] | None:
    """The partitions that are exported; None for all of them, and for a source that can't leave any out."""
    from stages.read.disk import PARTITIONS

    told = plan.context.facts.find(PARTITIONS)
    if told is None:
        return None
    listed = told.value["partitions"]
    if all(one["taken"] for one in listed):
        return None
    return frozenset(one["number"] for one in listed if one["taken"])
