"""What a step of a proof tells, and what all of them together mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

StepName = Literal["digest", "structure", "filesystems", "preflight", "boot"]
STEPS: tuple[StepName, ...] = ("digest", "structure", "filesystems", "preflight", "boot")
State = Literal["passed", "failed", "unknown", "informs", "skipped"]
Proof = Literal["proven", "disproven", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One step's verdict and evidence.

    Attributes:
        state: `unknown`: it could not be told, and `hint` says what to do; `informs`: it found something that does not
            decide; `skipped`: nobody wanted to know.
        summary: one sentence.
        details: more lines, for people.
        evidence: names and values, for programs.
        log: what a guest wrote to its serial console, cut in the middle; data that a stranger chose.
        screen: a PNG of the guest's last screen.
    """

    name: StepName
    state: State
    summary: str
    hint: str = ""
    details: tuple[str, ...] = ()
    evidence: dict[str, str] = field(default_factory=dict)
    elapsed_s: float = 0.0
    log: str = ""
    screen: bytes = b""


def told_passed(results: Sequence[StepResult], steps: Sequence[StepName] = STEPS) -> str:
    """`structure, filesystems (not tried: boot)`: what a proof rests on, and which of these steps it does not."""
    passed = ", ".join(one.name for one in results if one.state == "passed")
    taken = {one.name for one in results if one.state != "skipped"}
    left = ", ".join(name for name in steps if name not in taken)
    return passed + (f" (not tried: {left})" if left else "")


def conclude(results: Sequence[StepResult], *, preflight_decides: bool) -> Proof:
    """The verdict of all steps.

    Preflight predicts and the boot shows: a boot that passed outranks it. Without a profile it only informs.
    """
    states = {one.name: one.state for one in results}
    deciding = dict(states)
    if not preflight_decides or states.get("boot") == "passed":
        deciding.pop("preflight", None)
    if "failed" in deciding.values():
        return "disproven"
    if "unknown" in deciding.values():
        return "unknown"
    return "proven" if "passed" in deciding.values() else "unknown"
