"""What a rule says: a finding with its status, its weight, the lines that prove it, and what to do.

`unknown` is never a pass: what could not be told counts as a warning.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

Severity = Literal["block", "warn", "info"]
Status = Literal["pass", "fail", "unknown", "skipped"]
Verdict = Literal["ready", "warnings", "blocked"]

SEVERITIES: tuple[Severity, ...] = ("block", "warn", "info")


@dataclass(frozen=True, slots=True)
class Evidence:
    """A place that shows it: a file of the system that is looked at, and a line from 1; 0 for the file as such."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one look of a rule gave. A rule may have several: one for each line that is wrong.

    Attributes:
        severity: of a failure; the profile may say otherwise.
        message: one sentence that names what was found.
        remedy: a line to paste into a root shell of that system, or a sentence where no command does it.
        is_command: whether the remedy is such a line.
    """

    status: Status
    severity: Severity = "info"
    message: str
    remedy: str = ""
    evidence: tuple[Evidence, ...] = ()
    is_command: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """An outcome under the id of its rule, weighed for a target. `is_ignored`: the user knows and wants to go on."""

    id: str
    severity: Severity
    status: Status
    message: str
    remedy: str = ""
    evidence: tuple[Evidence, ...] = ()
    is_command: bool = False
    is_ignored: bool = False

    @property
    def blocks(self) -> bool:
        """Whether an export should not be made."""
        return self.status == "fail" and self.severity == "block" and not self.is_ignored

    @property
    def warns(self) -> bool:
        """Whether a person should look at it: likely trouble, or something that could not be told."""
        if self.is_ignored:
            return False
        return self.status == "unknown" or (self.status == "fail" and self.severity == "warn")

    def to_json(self) -> dict[str, Any]:
        """As it stands in `--json`, manifests and reports."""
        told: dict[str, Any] = {
            "id": self.id,
            "severity": self.severity,
            "status": self.status,
            "message": self.message,
            "remedy": self.remedy,
            "evidence": [{"file": one.file, "line": one.line or None} for one in self.evidence],
        }
        return told | ({"ignored": True} if self.is_ignored else {})


def verdict_of(findings: tuple[Finding, ...]) -> Verdict:
    """What all of them together mean."""
    if any(one.blocks for one in findings):
        return "blocked"
    return "warnings" if any(one.warns for one in findings) else "ready"


def _shown(text: str) -> str:
    """Text from a disk as it may go anywhere: nothing that acts on a terminal, nothing that is no Unicode."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else "?" for char in text)


def passed(message: str, *evidence: Evidence) -> Outcome:
    """It was looked at and is right."""
    return Outcome(status="pass", message=message, evidence=evidence)


_PLAIN = re.compile(r"[\w./:=@,+%~^-]*", re.ASCII)
_NOT_PLAIN = "\0"


def plain(text: str) -> str:
    """A text from a disk, to be put into a command. What could mean something to a shell or to sed spoils the command.

    Every path, name and value of a system that gets into a `command` goes through here: hostile images are normal.
    """
    return text if _PLAIN.fullmatch(text) else _NOT_PLAIN


def failed(severity: Severity, message: str, *evidence: Evidence, remedy: str = "", command: str = "") -> Outcome:
    """It is wrong. Give a `command` where a line of shell mends it, else a `remedy` in words."""
    if _NOT_PLAIN in command:
        command = ""
        remedy = remedy or "Mend it by hand: a name in it can't be written into a command safely."
    return Outcome(
        status="fail",
        severity=severity,
        message=message,
        remedy=command or remedy,
        evidence=evidence,
        is_command=bool(command),
    )


def unknown(message: str, *evidence: Evidence, remedy: str = "") -> Outcome:
    """It could not be told."""
    remedy = "" if _NOT_PLAIN in remedy else remedy
    return Outcome(status="unknown", severity="warn", message=message, remedy=remedy, evidence=evidence)


def to_read_it() -> str:
    """What to do where this process may not read something: being root already, it is held by more than permissions."""
    if os.geteuid() == 0:
        return "This process is root and may not all the same: run it outside of the container, or on an image."
    return "Run it as root."


def skipped(message: str) -> Outcome:
    """It does not apply here, and why."""
    return Outcome(status="skipped", message=message)


def weighed(id: str, outcome: Outcome, severity: Severity | None, *, is_ignored: bool) -> Finding:
    """The finding that an outcome is under a rule's id. A severity replaces that of a failure."""
    if severity is not None and outcome.status == "fail":
        outcome = replace(outcome, severity=severity)
    return Finding(
        id=id,
        severity=outcome.severity,
        status=outcome.status,
        message=_shown(outcome.message),
        remedy=_shown(outcome.remedy),
        evidence=tuple(Evidence(_shown(one.file), one.line) for one in outcome.evidence),
        is_command=outcome.is_command,
        is_ignored=is_ignored and outcome.status in ("fail", "unknown"),
    )
