"""Every error that this program raises on purpose.

    PipelineError
    |-- ConfigError        the TOML or the command line is wrong; carries every fault     exit 2
    |-- PlanError          wrong for this disk or this target, found before any byte moved exit 2
    |-- SourceError        the disk could not be read, or is not what it said             exit 1
    |-- StoreError         the target refused, failed or can't be reached                 exit 1
    |-- FormatError        an image is corrupt or hostile                                 exit 3
    |                      (`UnsupportedError`: of a kind that is not read here, or its files were not named: exit 2)
    |-- PreflightError     the image would not boot there, or would not be taken          exit 5
    |-- VerificationError  the stored image is not the disk                               exit 3
    |-- StageError         a stage broke one of the engine's promises                     exit 1
    |-- LeftBehindError    failed, and something may be left in the store                 exit 4
    |   `-- KeptError      failed, and what was sent is kept to be resumed                exit 4
    `-- AlreadyFinished    nothing is left to do                                          exit 0

An error tells a tired person what failed (`message`), during what (`operation`), where
(`context`), and what to do (`hint`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_DIFFERS = 3
EXIT_LEFT_BEHIND = 4
EXIT_PREFLIGHT = 5
EXIT_INTERRUPTED = 130


class PipelineError(Exception):
    """The root: message, operation, context and hint.

    Args:
        message: what failed, as a lower-case sentence without a full stop.
        operation: the verb that was under way ("read", "put_part").
        hint: what the reader of the message can do now.
        context: where: path, offset, number ...; printed as `name=value` in the given order.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, *, operation: str = "", hint: str = "", **context: object) -> None:
        super().__init__(message)
        self.message = message
        self.operation = operation
        self.hint = hint
        self.context = context

    def __str__(self) -> str:
        where = ", ".join(f"{name}={value}" for name, value in self.context.items() if value is not None)
        head = f"{self.operation}: {self.message}" if self.operation else self.message
        return f"{head} ({where})" if where else head


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing wrong in a configuration, with its place.

    Attributes:
        line: from 1; 0 when the fault has no place in the file (a missing section, an override).
        column: from 1.
        width: how many characters the caret underlines.
        text: the offending line of the file, without its line end.
    """

    reason: str
    hint: str = ""
    file: str = ""
    line: int = 0
    column: int = 0
    width: int = 1
    text: str = ""

    def render(self) -> str:
        """`file:line:column: reason`, the line, a caret under the place, the way out."""
        if not self.line:
            place = f"{self.file}: " if self.file else ""
            return f"{place}{self.reason}" + (f"\n        {self.hint}" if self.hint else "")
        gutter = f"{self.line:5d} | "
        caret = " " * (len(gutter) - 2) + "| " + " " * (self.column - 1) + "^" * max(1, self.width)
        return (
            f"{self.file}:{self.line}:{self.column}: {self.reason}\n{gutter}{self.text}\n"
            f"{caret}{' ' + self.hint if self.hint else ''}"
        )


class ConfigError(PipelineError):
    """The configuration is wrong; `faults` holds every fault that was found, in file order."""

    exit_code = EXIT_CONFIG

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__(f"{len(faults)} fault{'s' if len(faults) != 1 else ''} in the configuration")
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(fault.render() for fault in self.faults)


class PlanError(PipelineError):
    """The plan does not work for this disk or this target. No byte has moved."""

    exit_code = EXIT_CONFIG


class SourceError(PipelineError):
    """The source could not be read, ended early, or changed."""


class StoreError(PipelineError):
    """The target refused or failed.

    Attributes:
        temporary: the same call may succeed later (timeouts, resets, 429, 5xx).
        status: the protocol's status code, where there is one.
        throttled: the store asked for a lower rate.
        retry_after_s: how long the store asked to wait, where it did.
    """

    def __init__(
        self,
        message: str,
        *,
        temporary: bool = False,
        status: int | None = None,
        throttled: bool = False,
        retry_after_s: float | None = None,
        operation: str = "",
        hint: str = "",
        **context: object,
    ) -> None:
        super().__init__(message, operation=operation, hint=hint, **context)
        self.temporary = temporary
        self.status = status
        self.throttled = throttled
        self.retry_after_s = retry_after_s


class FormatError(PipelineError):
    """An image is corrupt, hostile, or of a kind that is not read here."""

    exit_code = EXIT_DIFFERS


class PreflightError(PipelineError):
    """The rules of the target say that the image would not boot there. No byte has moved."""

    exit_code = EXIT_PREFLIGHT


class VerificationError(PipelineError):
    """The stored image was looked at and is not the disk that was read."""

    exit_code = EXIT_DIFFERS


class StageError(PipelineError):
    """A stage broke one of the engine's promises; nothing was published."""


class LeftBehindError(PipelineError):
    """The run failed and its clean-up failed too.

    Attributes:
        cause: what made the run fail in the first place.
        commands: exact shell commands that remove what is left.
    """

    exit_code = EXIT_LEFT_BEHIND

    def __init__(
        self, message: str, *, cause: BaseException, commands: tuple[str, ...], operation: str = "", **context: object
    ) -> None:
        hint = "Remove it with: " + " ; ".join(commands)
        super().__init__(message, operation=operation, hint=hint, **context)
        self.cause = cause
        self.commands = commands


class KeptError(LeftBehindError):
    """The run failed, and what it sent stays in the store on purpose.

    Attributes:
        resume: the shell command that goes on with it.
    """

    def __init__(self, message: str, *, cause: BaseException, resume: str, commands: tuple[str, ...]) -> None:
        super().__init__(message, cause=cause, commands=commands)
        self.hint = f"Resume it with: {resume}\n  Remove it with: {' ; '.join(commands)}"
        self.resume = resume


class AlreadyFinished(PipelineError):
    """The export that was to be resumed ended well before."""

    exit_code = EXIT_OK


def cause_of(error: LeftBehindError) -> str:
    """Why the run failed whose clean-up failed too, in words."""
    cause = first_error(error.cause)
    return (str(cause) or type(cause).__name__) if isinstance(cause, Exception) else "interrupted"


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Every single error inside nested exception groups, in order."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def first_error(error: BaseException) -> BaseException:
    """The error worth telling out of an exception group: what is left behind, then ours, then any other."""
    found = list(leaves(error))
    ours = [one for one in found if isinstance(one, PipelineError)]
    left = next((one for one in ours if isinstance(one, LeftBehindError)), None)
    return left or (ours[0] if ours else found[0])
