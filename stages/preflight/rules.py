"""What a rule is, and how all of them are asked.

A rule is a function that looks at a subject for a target and gives outcomes. It raises nothing: what can't be read
makes its answer `unknown`, which is never a pass.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from pipeline.config.parse import suggest
from pipeline.errors import ConfigError, Fault, FormatError
from stages.preflight.findings import Finding, Outcome, passed, skipped, to_read_it, unknown, weighed
from stages.preflight.profile import BootMode, Profile
from stages.preflight.subject import Subject
from stages.preflight.texts import why_unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the image is meant to boot, and what is known of the image. Bytes.

    Attributes:
        kind: of the disk: a data disk is only held against what disks and images must be.
        format: of the image, `vmdk:streamOptimized`; empty where none is made yet.
        virtual_size: of the disk in the image; None: that of the whole disk.
        file_size, file_size_max: of the image, as far as it is known, and at most.
        name: of the object.
        room: free bytes where the image goes; None where that is not a folder of this machine.
        kept: numbers of the partitions that are exported; None: all.
        consistency: how a mounted disk is kept still: freeze, snapshot, live, offline; empty where it is not said.
    """

    profile: Profile
    boot_mode: BootMode
    kind: Literal["system", "data"] = "system"
    format: str = ""
    virtual_size: int | None = None
    file_size: int | None = None
    file_size_max: int | None = None
    name: str = ""
    room: int | None = None
    kept: frozenset[int] | None = None
    consistency: str = ""


def boot_mode_for(profile: Profile, subject: Subject) -> BootMode:
    """How a machine of the target starts this disk where nobody says how."""
    if profile.adapts and subject.boots_by in profile.boot_modes:
        assert subject.boots_by is not None
        return subject.boots_by
    return profile.boot_modes[0]


Check = Callable[[Subject, Target], AsyncIterator[Outcome]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One thing that may keep a disk from booting over there.

    Attributes:
        id: as it is ignored and explained.
        title: the claim that is checked, in a few words.
        why: what happens otherwise, and what is looked at.
        for_data: whether it concerns data disks too.
        needs: `system`: skipped where no root filesystem is there; `disk`: nothing but the disk is looked at.
    """

    id: str
    title: str
    why: str
    check: Check
    for_data: bool = False
    needs: Literal["system", "disk"] = "system"


@cache
def all_rules() -> tuple[Rule, ...]:
    """Every rule, in the order in which they are told: from the disk up to the cloud."""
    from stages.preflight import (
        access,
        booting,
        cloudinit,
        devices,
        drivers,
        fstab,
        hardening,
        hardware,
        keyfiles,
        layout,
        limits,
        liveness,
        software,
        space,
        table,
    )

    families = (
        table,
        booting,
        devices,
        fstab,
        keyfiles,
        space,
        drivers,
        software,
        cloudinit,
        access,
        hardware,
        hardening,
        layout,
        liveness,
        limits,
    )
    return tuple(rule for family in families for rule in family.RULES)


def find_rule(id: str) -> Rule:
    """A rule by its id. Raises ConfigError with what may have been meant."""
    for rule in all_rules():
        if rule.id == id:
            return rule
    known = [rule.id for rule in all_rules()]
    hint = suggest(id, known) or "`pipeline preflight --explain all` lists every rule."
    raise ConfigError([Fault(reason=f'there is no rule "{id}"', hint=hint)])


async def judge(
    subject: Subject, target: Target, *, ignored: Collection[str] = (), rules: Sequence[Rule] | None = None
) -> tuple[Finding, ...]:
    """Ask every rule.

    Args:
        ignored: ids of rules that the user does not want to be stopped by; they are recorded as such.
    Raises:
        StoreError: the disk or the object can't be read any more.
    """
    findings: list[Finding] = []
    for rule in all_rules() if rules is None else rules:
        outcomes = [one async for one in _ask(rule, subject, target)]
        if not outcomes:
            outcomes = [passed(rule.title)]
        for outcome in outcomes:
            weight = target.profile.weight(
                rule.id,
                table=subject.table.kind if subject.table is not None else "",
                boot_mode=target.boot_mode,
            )
            findings.append(weighed(rule.id, outcome, weight, is_ignored=rule.id in ignored))
    return tuple(findings)


async def _ask(rule: Rule, subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    if target.kind == "data" and not rule.for_data:
        yield skipped("a data disk boots nothing")
        return
    if subject.no_system and rule.needs == "system":
        yield skipped("no system was found: see layout.system")
        return
    try:
        async for one in rule.check(subject, target):
            yield one
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        hint = to_read_it() if isinstance(error, PermissionError) else ""
        yield unknown(f"it could not be told: {place}{why_unreadable(error)}", remedy=hint)
    except FormatError as error:
        yield unknown(f"it could not be told: the filesystem is damaged: {error.message}")
