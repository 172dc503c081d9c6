"""`pipeline preflight`: say before the upload whether a disk will boot over there, and what to do where it will not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.candidates import disks, profiles, rules
from pipeline.commands.console import Console, ca_file_option, run_async, until_interrupted, verb
from pipeline.errors import EXIT_OK, EXIT_PREFLIGHT

if TYPE_CHECKING:
    from stages.preflight.findings import Finding
    from stages.preflight.opening import Wanted
    from stages.preflight.rules import Target
    from stages.preflight.subject import Subject

_COLOURS = {"block": "red", "warn": "yellow", "unknown": "magenta", "info": "blue", "pass": "green", "ignored": "cyan"}
_TITLES = {
    "block": "It will not boot, or will not be taken",
    "warn": "Likely trouble",
    "unknown": "Could not be told",
    "info": "Good to know",
    "ignored": "Ignored by you",
    "pass": "Right",
    "skipped": "Does not apply",
}


@click.command("preflight")
@click.argument("place", metavar="[DISK|IMAGE|URL]", required=False, default="", shell_complete=disks)
@click.option("--profile", default="generic", show_default=True, metavar="NAME|FILE", shell_complete=profiles,
              help="The target; `pipeline profiles` lists all.")  # fmt: skip
@click.option("--boot-mode", type=click.Choice(["bios", "uefi"]), help="How the target starts it.")
@click.option("--kind", type=click.Choice(["system", "data"]), default="system", show_default=True,
              help="A data disk boots nothing.")  # fmt: skip
@click.option("--ignore", "ignored", multiple=True, metavar="ID", shell_complete=rules,
              help="Do not stop at this rule; recorded. May be given many times.")  # fmt: skip
@click.option(
    "--explain", metavar="ID", shell_complete=rules, help="Say what a rule looks at and why; `all`: every rule."
)
@click.option("--fix-script", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write the remedies as a shell script to look through.")  # fmt: skip
@click.option("--root", type=click.Path(file_okay=False, exists=True, path_type=Path), metavar="FOLDER",
              help="The system below this folder, in place of this machine's own.")  # fmt: skip
@click.option("--all", "with_all", is_flag=True, help="Also show what is right and what does not apply.")
@click.option("-f", "--format", default="auto", metavar="FMT", help="Of the image; else told once by its first bytes.")
@click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store.")
@ca_file_option
@verb
def command(console: Console, place: str, explain: str | None, ignored: tuple[str, ...], **named: Any) -> int:
    """Say whether a system will boot on the target: this machine, a disk, an image of any format, an object in a store.

    Without an argument it looks at the machine that it runs on. Nothing is mounted, nothing is changed. Exits 5 when
    something blocks, 0 otherwise.
    """
    from stages.preflight.opening import Wanted
    from stages.preflight.profile import find_profile
    from stages.preflight.rules import find_rule

    if explain is not None:
        return _explain(console, explain)
    for one in ignored:
        find_rule(one)
    profile = find_profile(named.pop("profile"))
    wanted = Wanted(place=place, **{name: named.pop(name) for name in ("root", "format", "endpoint", "ca_file")})
    return run_async(partial(_guarded, console, wanted, profile, ignored, named))


async def _guarded(console: Console, *arguments: Any) -> int:
    return await until_interrupted(partial(_look, console, *arguments), console, cleaned="nothing was changed")


async def _look(console: Console, wanted: Wanted, profile: Any, ignored: tuple[str, ...], named: dict[str, Any]) -> int:
    from stages.preflight.fixing import refuse_to_replace, write_script
    from stages.preflight.opening import open_subject
    from stages.preflight.rules import Target, boot_mode_for, judge

    if named["fix_script"] is not None:
        refuse_to_replace(named["fix_script"])
    async with open_subject(wanted) as subject:
        target = Target(
            profile=profile, boot_mode=named["boot_mode"] or boot_mode_for(profile, subject), kind=named["kind"]
        )
        findings = await judge(subject, target, ignored=ignored)
    tell_findings(console, findings)
    console.tell("preflight", **_summary(subject, target, findings))
    for line in _lines(subject, target, findings, root=wanted.root, with_all=named["with_all"]):
        console.say(line)
    if named["fix_script"] is not None:
        count = write_script(named["fix_script"], subject, target, findings)
        console.say(f"{named['fix_script']}: {count} remedies. Read it, then run it as root on that system.")
        console.tell("fix_script", file=named["fix_script"], remedies=count)
    return EXIT_PREFLIGHT if any(one.blocks for one in findings) else EXIT_OK


def tell_findings(console: Console, findings: tuple[Finding, ...]) -> None:
    """Each finding as an object of `--json`."""
    for one in findings:
        console.tell("finding", **one.to_json())


def _summary(subject: Subject, target: Target, findings: tuple[Finding, ...]) -> dict[str, Any]:
    from stages.preflight.findings import verdict_of

    return {
        "verdict": verdict_of(findings),
        "place": subject.place,
        "is_live": subject.is_live,
        "profile": target.profile.name,
        "boot_mode": target.boot_mode,
        "disk_kind": target.kind,
        "system": subject.distribution.title,
        "kernels": [one.title for one in subject.kernels],
        "blocks": sum(one.blocks for one in findings),
        "warnings": sum(one.warns for one in findings),
        "passed": sum(one.status == "pass" for one in findings),
        "ignored": sorted({one.id for one in findings if one.is_ignored}),
    }


def _group(finding: Finding) -> str:
    if finding.is_ignored:
        return "ignored"
    return finding.severity if finding.status == "fail" else finding.status


def finding_lines(findings: tuple[Finding, ...], *, with_all: bool = False) -> Iterator[str]:
    """Findings for people, the weightiest first, each with its place and its remedy."""
    groups = ["block", "unknown", "warn", "info", "ignored", *(("pass", "skipped") if with_all else ())]
    for group in groups:
        members = [one for one in findings if _group(one) == group]
        if not members:
            continue
        yield ""
        yield _styled(f"{_TITLES[group]}:", group, bold=True)
        for one in members:
            yield f"  {_styled(one.id, group)}  {_printable(one.message)}"
            if one.evidence and group != "skipped":
                yield f"      {_printable(', '.join(map(str, one.evidence)))}"
            if one.remedy and one.status in ("fail", "unknown"):
                for number, line in enumerate(one.remedy.splitlines()):
                    mark = ("$ " if one.is_command else "-> ") if number == 0 else "  "
                    yield f"      {_styled(mark, 'info')}{_printable(line)}"


def _lines(
    subject: Subject, target: Target, findings: tuple[Finding, ...], *, root: Path | None, with_all: bool
) -> Iterator[str]:
    system = subject.distribution.title or "no system that is known here"
    if subject.is_live:
        system += " (running)" if root is None or root == Path("/") else f" (its files below {root})"
    yield f"{_printable(subject.place)}: {_printable(system)}"
    yield f"for {target.profile.name}: {target.profile.title}, started by {target.boot_mode.upper()}"
    yield from finding_lines(findings, with_all=with_all)
    yield ""
    passed = sum(one.status == "pass" for one in findings)
    skipped = sum(one.status == "skipped" for one in findings)
    yield f"{passed} checks passed, {skipped} do not apply" + ("" if with_all else "; --all shows them")
    blocks = len({one.id for one in findings if one.blocks})
    warns = len({one.id for one in findings if one.warns})
    if blocks:
        yield _styled(f"BLOCKED: {blocks} rules say that it will not boot there", "block", bold=True)
        yield "pipeline preflight --explain ID says more of one; --ignore ID goes on in spite of it"
    elif warns:
        yield _styled(f"ready, with {warns} warnings", "warn", bold=True)
    else:
        yield _styled("ready", "pass", bold=True)


def _explain(console: Console, id: str) -> int:
    from stages.preflight.rules import all_rules, find_rule

    if id == "all":
        width = max(len(rule.id) for rule in all_rules())
        for rule in all_rules():
            console.say(f"{rule.id:<{width}}  {rule.title}")
            console.tell("rule", id=rule.id, title=rule.title, why=rule.why, for_data=rule.for_data)
        return EXIT_OK
    rule = find_rule(id)
    console.say(f"{rule.id}: {rule.title}")
    console.say("")
    console.say(click.wrap_text(rule.why, 100, "  ", "  "))
    if rule.for_data:
        console.say("\n  It concerns data disks too.")
    console.tell("rule", id=rule.id, title=rule.title, why=rule.why, for_data=rule.for_data)
    return EXIT_OK


def _styled(text: str, group: str, *, bold: bool = False) -> str:
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return click.style(text, fg=_COLOURS.get(group), bold=bold)


def _printable(text: str) -> str:
    """What a disk says is shown, but never acts on a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)
