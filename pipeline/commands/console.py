"""What every verb talks through: people or JSON on stdout, complaints on stderr, and the exit code."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from pipeline import __version__
from pipeline.commands.candidates import export_files
from pipeline.config.options import without_secrets
from pipeline.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    ConfigError,
    LeftBehindError,
    PipelineError,
    PlanError,
    cause_of,
    first_error,
    leaves,
)

if TYPE_CHECKING:
    import anyio.abc

    from pipeline.config.parse import ObserveOptions
    from pipeline.events import Event
    from pipeline.observe.logs import RunLog

T = TypeVar("T")
_MORE_FILES = "Raise the limit of open files: ulimit -n 1024, and run it again."


class Interrupted(PipelineError):
    """A signal ended the work, and the work has cleaned up."""

    exit_code = EXIT_INTERRUPTED


class Console:
    """How one call of a verb speaks. On the main thread only.

    Attributes:
        verb: its name on the command line.
        as_json: one JSON object a line on stdout, each with `type`, instead of text for people.
        log: where events and unforeseen errors go, once `open_log` was called.
    """

    def __init__(self, verb: str, *, as_json: bool = False, log_file: Path | None = None) -> None:
        self.verb = verb
        self.as_json = as_json
        self.log: RunLog | None = None
        self._log_file = log_file
        self._holds_stdout = True

    def leave_stdout(self) -> None:
        """Say nothing on stdout from now on: the image goes there. Results for people go to stderr.

        Raises:
            PlanError: results for programs go to stdout too.
        """
        if self.as_json:
            raise PlanError(
                "--json writes to stdout, and the image goes there too",
                operation=self.verb,
                hint="Set command in write.pipe, or leave --json out; --log-file writes JSON into a file.",
            )
        self._holds_stdout = False

    def say(self, line: str) -> None:
        """A line of the result, for people."""
        if not self.as_json:
            _print(line, sys.stdout if self._holds_stdout else sys.stderr)

    def tell(self, kind: str, /, **fields: Any) -> None:
        """An object of the result, for programs. Paths and the like become text."""
        if self.as_json and self._holds_stdout:
            _print(json.dumps({"type": kind, **fields}, default=str), sys.stdout)

    def put(self, line: str) -> None:
        """A line of stdout that is neither for people nor an object of ours: another tool's format."""
        _print(line, sys.stdout)

    def note(self, line: str) -> None:
        """A line that is not part of the result."""
        _print(line, sys.stderr)

    def open_log(self, observe: ObserveOptions | None = None) -> RunLog:
        """Open the log that the command line or `[observe]` asks for, else the one on stderr.

        Raises:
            ConfigError: the file can't be opened.
        """
        from pipeline.observe.logs import open_log, stderr_log

        level = observe.log_level if observe else "info"
        if self.log is not None:
            self.log.close()
        if self._log_file:
            self.log = open_log(self._log_file, level)
        elif observe and observe.log_file:
            self.log = open_log(observe.log_file, level, asked_by="[observe] log_file")
        else:
            self.log = stderr_log(level)
        return self.log

    # How a verb ends

    def finish(self, body: Callable[[], int]) -> int:
        """Run a verb; whatever it raises becomes a message and an exit code."""
        try:
            return body()
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except KeyboardInterrupt:
            return self.fail(Interrupted("interrupted"))
        except BaseException as error:
            return self.fail(error)
        finally:
            if self.log is not None:
                self.log.close()

    def fail(self, error: BaseException) -> int:
        """Say what went wrong; returns the exit code."""
        told = error_to_tell(error)
        if isinstance(told, OSError) and told.errno in (errno.EMFILE, errno.ENFILE):
            told = PipelineError(os.strerror(errno.EMFILE))
        if isinstance(told, ConfigError):
            for fault in told.faults:
                fields = {name: value for name, value in dataclasses.asdict(fault).items() if name != "text"}
                self.tell("fault", **fields)
                self.note(fault.render())
            self._tell_failed(told.message, "", told.exit_code)
            self.note(f"{told.message}; nothing was touched")
            return told.exit_code
        if isinstance(told, PipelineError):
            message = str(told)
            self.note(message if isinstance(told, Interrupted) else f"error: {message}")
            if isinstance(told, LeftBehindError):
                self.note(f"  after: {cause_of(told)}")
            # Whatever was being opened: the way out is the same.
            hint = told.hint or (_MORE_FILES if os.strerror(errno.EMFILE) in message else "")
            if hint:
                self.note(f"  {hint}")
            self._tell_failed(message, hint, told.exit_code)
            return told.exit_code
        if isinstance(told, SystemExit):
            raise told
        message = f"internal error: {type(told).__name__}: {told}"
        if self.log is not None and self.log.is_file:
            self.log.failure(error)
            self.note(f"{message}; please report it, the log has the details")
        else:
            self.note("".join(traceback.format_exception(error)).rstrip())
            self.note(f"{message}; please report it with the lines above")
        self._tell_failed(message, "", EXIT_FAILED)
        return EXIT_FAILED

    def _tell_failed(self, message: str, hint: str, exit_code: int) -> None:
        self.tell(f"{self.verb}_failed", error=message, hint=hint, exit_code=exit_code)


def error_to_tell(error: BaseException) -> BaseException:
    """The one error that decides message and exit code.

    Something left behind outweighs everything, wherever it hides: a task group raises it beside the failure that came
    first, and whoever picked that one may carry it only as its cause.
    """
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for leaf in leaves(current):
            if isinstance(leaf, LeftBehindError):
                return leaf
            waiting += [one for one in (leaf.__cause__, leaf.__context__) if one is not None]
        waiting += [one for one in (current.__cause__, current.__context__) if one is not None]
    return first_error(error)


ca_file_option = click.option(
    "--ca-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="PEM certificates to trust instead of the system's.",
)


def verb(body: Callable[..., int]) -> Callable[..., None]:
    """Give a click command the options that every verb has, a Console as first argument, and its exit code.

    The body returns the exit code; what it raises is told by `Console.fail`.
    """

    @click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
    @click.option("--log-file", type=click.Path(dir_okay=False, path_type=Path), help="Append the log to this file.")
    @click.version_option(__version__, prog_name="pipeline")
    @click.pass_context
    @functools.wraps(body)
    def call(context: click.Context, /, *args: Any, as_json: bool, log_file: Path | None, **options: Any) -> None:
        console = Console(context.info_name or "", as_json=as_json, log_file=log_file)

        def speak() -> int:
            if log_file is not None:
                console.open_log()
            return body(console, *args, **options)

        context.exit(console.finish(speak))

    return call


def takes_export_file(body: Callable[..., None]) -> Callable[..., None]:
    """Give a click command the FILE that `run`, `check` and `plan` read, and its overrides."""
    body = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="STAGE.OPTION=VALUE",
        help="Override one option of FILE: encode.qcow2.level=small, export.memory=1GiB. May be given many times.",
    )(body)
    return click.argument("file", type=click.Path(path_type=Path), shell_complete=export_files)(body)


def check_observers(observe: ObserveOptions) -> None:
    """Look whether the report and the metrics could be written, before anything is touched.

    Raises:
        ConfigError: with each that could not.
    """
    if observe.report is None and observe.prometheus is None:
        return
    from pipeline.observe.whole_files import check_place

    faults = []
    for name, path in (("report", observe.report), ("prometheus", observe.prometheus)):
        try:
            if path is not None:
                check_place(path, asked_by=f"[observe] {name}")
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)


def run_async(body: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run the asynchronous part of a verb on a fresh event loop."""
    import anyio

    return anyio.run(body)


async def until_interrupted(
    work: Callable[[], Awaitable[T]],
    console: Console,
    *,
    cleaned: str | Callable[[], str] = "everything that was stored has been removed",
) -> T:
    """Do the work; on SIGINT, SIGTERM or SIGHUP cancel it and wait until it has cleaned up.

    A signal that was ignored when the program started (`nohup`, a job in the background) stays ignored. A second one
    is answered, not obeyed: half a clean-up would leave parts behind that somebody pays for.

    Args:
        cleaned: what is true after the clean-up, for the message.
    Raises:
        Interrupted: the work was cancelled and has cleaned up. A LeftBehindError of the clean-up comes instead.
    """
    import anyio

    wanted = [one for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    results: list[T] = []
    failure: Exception | None = None
    received = ""
    scope = anyio.CancelScope()

    async def watch(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        nonlocal received
        try:
            with anyio.open_signal_receiver(*wanted) as signals:
                task_status.started()
                async for one in signals:
                    if received:
                        console.note(f"{one.name}: clean-up is under way, please wait")
                        continue
                    received = one.name
                    console.note(f"{one.name}: stopping and cleaning up")
                    scope.cancel()
        finally:
            # At once, because the receiver leaves them to their default, which ends the process; and until the process
            # ends: what was asked for is done, and its exit code must say so.
            for one in wanted if results else ():
                signal.signal(one, signal.SIG_IGN)

    async with anyio.create_task_group() as tasks:
        await tasks.start(watch)
        try:
            with scope:
                results.append(await work())
        except Exception as error:  # raised below, outside of the group, which would wrap it
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        told = error_to_tell(failure)
        if not received or isinstance(told, LeftBehindError) or not isinstance(told, PipelineError):
            raise failure
        console.note(f"error: {told}")
    elif results:
        return results[0]
    raise Interrupted(f"interrupted: {cleaned() if callable(cleaned) else cleaned}")


class JsonEvents:
    """A subscriber that tells programs what happens: every event but the many, progress at most once a second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_s = 0.0
        self._verified = -1

    def __call__(self, event: Event) -> None:
        """Tell one event under its type, with its fields."""
        from pipeline import events

        if isinstance(event, (events.PartStored, events.RunFailed)):
            return  # thousands; and `Console.fail` tells the end
        if isinstance(event, events.ProgressSampled):
            if event.elapsed_s < self._next_s:
                return
            self._next_s = event.elapsed_s + 1.0
        if isinstance(event, events.VerifyProgressed):
            percent = event.done_bytes * 100 // max(1, event.total_bytes)
            if percent == self._verified:
                return
            self._verified = percent
        self._console.tell(events.event_type(event), **dataclasses.asdict(event))


def next_command(verb: str, file: Path, overrides: Sequence[str]) -> str:
    """The shell command that does the next thing with the same export file and the same `--set`, without secrets."""
    told = (word for one in overrides for word in ("--set", without_secrets(one)))
    return shlex.join(["pipeline", verb, str(file), *told])


def _print(line: str, stream: IO[str]) -> None:
    """Print a line. A reader who went away (`| head`, a closed terminal) never ends a run."""
    try:
        print(line, file=stream, flush=True)
    except (OSError, ValueError):
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # or the interpreter complains when it flushes at exit
            os.close(nowhere)
        except (OSError, ValueError):
            pass
