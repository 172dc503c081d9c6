"""A shell script of the remedies, for a person to read before it runs on the live host."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import PlanError
from stages.preflight.findings import Finding
from stages.preflight.rules import Target
from stages.preflight.subject import Subject

_ORDER = {"block": 0, "warn": 1, "info": 2}


def write_script(path: Path, subject: Subject, target: Target, findings: tuple[Finding, ...]) -> int:
    """Write the remedies of all failures into a new file that is not executable; returns how many commands it has.

    Raises:
        PlanError: the file exists, or can't be written.
    """
    text, count = script_text(subject, target, findings)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise PlanError("the script exists and is never replaced", path=path, hint="Name another file.") from None
    except OSError as error:
        raise PlanError(f"the script can't be written: {(error.strerror or str(error)).lower()}", path=path) from None
    return count


def refuse_to_replace(path: Path) -> None:
    """Say before anything is looked at that the script can't be written there. Raises PlanError."""
    if path.exists():
        raise PlanError("the script exists and is never replaced", path=path, hint="Name another file.")
    if not path.parent.is_dir():
        raise PlanError("there is no folder for the script", path=path.parent, hint="Make it, or name another file.")


def script_text(subject: Subject, target: Target, findings: tuple[Finding, ...]) -> tuple[str, int]:
    """The script and how many commands it has. Every command stands alone: what fails is told, the others run."""
    failures = [one for one in findings if one.status == "fail" and one.remedy and not one.is_ignored]
    failures.sort(key=lambda one: _ORDER[one.severity])
    lines = [
        "#!/bin/sh",
        f"# Remedies of `pipeline preflight` for {_comment(target.profile.name)}, {target.boot_mode} boot.",
        f"# System: {_comment(subject.distribution.title or 'unknown')}, {_comment(subject.place)}.",
        "# Read every line, remove what you do not want, then run it as root on that system: sh THIS_FILE",
        "set -u",
        '[ "$(id -u)" = 0 ] || { echo "run it as root" >&2; exit 1; }',
        "failed=0",
        "",
    ]
    seen: set[str] = set()
    # Lines of a file move when one above goes: from the last line up.
    first = {_file(one): number for number, one in reversed(list(enumerate(failures)))}
    for one in sorted(failures, key=lambda one: (first[_file(one)], -_line(one))):
        lines.append(f"# {one.severity}: {one.id}: {_comment(one.message)}")
        lines += [f"#   {_comment(str(place))}" for place in one.evidence[:1]]
        if not one.is_command:
            lines += [f"#   by hand: {_comment(one.remedy)}", ""]
            continue
        if one.remedy in seen or "\n" in one.remedy:
            lines += [
                "#   (the same command as above)" if one.remedy in seen else f"#   by hand: {_comment(one.remedy)}",
                "",
            ]
            continue
        seen.add(one.remedy)
        lines += [f"{one.remedy} || {{ echo 'failed: {one.id}' >&2; failed=1; }}", ""]
    lines += ["exit $failed", ""]
    return "\n".join(lines), len(seen)


def _file(finding: Finding) -> str:
    return finding.evidence[0].file if finding.evidence else finding.id


def _line(finding: Finding) -> int:
    return finding.evidence[0].line if finding.evidence else 0


def _comment(text: str) -> str:
    """Text from a disk, so that it stays one comment."""
    return "".join(char if char.isprintable() else "?" for char in text)
