"""`pipeline run`: the export."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pipeline.commands.console import (
    Console,
    JsonEvents,
    check_observers,
    error_to_tell,
    next_command,
    run_async,
    takes_export_file,
    until_interrupted,
    verb,
)
from pipeline.commands.looking import printable
from pipeline.errors import EXIT_FAILED, EXIT_OK, AlreadyFinished, LeftBehindError, PipelineError, cause_of
from pipeline.units import MiB, format_size

if TYPE_CHECKING:
    from pipeline.config.continuing import Attempt
    from pipeline.config.parse import ExportConfig
    from pipeline.config.wiring import WiredChain
    from pipeline.events import EventStream
    from pipeline.flow.engine import Outcome
    from pipeline.observe.report import RunReport
    from stages.preflight.profile import Profile


@click.command("run")
@takes_export_file
@click.option("--resume", is_flag=True, help="Go on with a run of FILE that was killed or failed.")
@click.option("--discard", is_flag=True, help="Remove what such a run sent, and start anew.")
@click.option(
    "--recheck",
    type=click.Choice(["sample", "full"]),
    default="sample",
    show_default=True,
    help="With --resume: how much of the disk that was sent is read again and compared.",
)
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@verb
def command(
    console: Console,
    file: Path,
    overrides: tuple[str, ...],
    resume: bool,
    discard: bool,
    recheck: Literal["sample", "full"],
    quiet: bool,
) -> int:
    """Export a disk as FILE says: read, encode, store, verify.

    Exits 0 when the image is stored and verified as asked, 1 when it failed and nothing is left behind (or nothing
    could be compared), 2 when FILE or the plan is wrong, 3 when the stored image is not the disk, 4 when something may
    be left behind or what was sent is kept to be resumed, 5 when the target's rules say that it will not boot,
    130 when interrupted.
    """
    from pipeline.config.continuing import Attempt, Mode
    from pipeline.config.wiring import load_chain
    from stages.catalog import CATALOG

    if resume and discard:
        raise click.UsageError("--resume goes on with what was sent, --discard removes it: give one of them")
    config, chain = load_chain(file, CATALOG, overrides)
    profile = None
    if config.target.profile:
        from stages.preflight.target import check_chain

        profile = check_chain(config, chain)
    writer = chain.writer
    if writer.spec.holds_stdout and writer.spec.holds_stdout(writer.options):
        console.leave_stdout()
    attempt = Attempt(
        mode=Mode.RESUME if resume else Mode.DISCARD if discard else Mode.NEW,
        recheck=recheck,
        command=next_command("run", file, overrides),
    )
    return run_async(partial(run_chain, console, config, chain, quiet, attempt, profile))


def _shape_the_heap() -> None:
    """Let all threads share one heap that keeps some of what was freed in it.

    By default glibc gives each thread a heap of its own and keeps what was freed in each, beyond what the ledger
    knows of; and it gives the streams of every window back to the system, which then has to clear a page for each 4 KiB
    of the next (measured: 290,000 page faults for 4 GiB against 16,000, and a sixth of the time of an export).

    Source: mallopt(3), M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; musl keeps little by itself
        for parameter, value in ((-8, 1), (-3, 4 * MiB), (-1, 16 * MiB)):
            libc.mallopt(parameter, value)


async def run_chain(
    console: Console,
    config: ExportConfig,
    chain: WiredChain,
    quiet: bool,
    attempt: Attempt | None = None,
    profile: Profile | None = None,
) -> int:
    """Run a wired chain and tell how it went; returns the exit code. Raises what a run raises.

    Args:
        attempt: how a run that keeps a journal begins; None: it keeps none.
        profile: of [target]; its rules are asked before the first byte moves.
    """
    _shape_the_heap()
    from pipeline.events import Event, EventStream, PreflightDone, RunFailed, UploadKept
    from pipeline.flow.stage import NOTHING
    from pipeline.observe.progress import make_display, phase_line, summary_lines

    events = EventStream()
    log = console.open_log(config.observe)
    is_shown = not console.as_json and not quiet

    def note_in_log(event: Event) -> None:
        if log.is_file or not is_shown or not phase_line(event):  # else the display tells it, in words
            log(event)

    events.subscribe(note_in_log)
    report = _observe(config, events)
    display = None
    if console.as_json:
        events.subscribe(JsonEvents(console))
    elif is_shown:
        display = make_display(sys.stderr)
        events.subscribe(display)
    kept: list[UploadKept] = []

    def note_kept(event: Event) -> None:
        if isinstance(event, UploadKept):
            kept.append(event)
        elif isinstance(event, PreflightDone) and event.warnings and not quiet and not console.as_json:
            shown = ", ".join(dict.fromkeys(str(one["id"]) for one in event.findings if one["severity"] == "warn"))
            console.note(f"preflight for {event.profile}: {event.warnings} warnings ({shown}); the manifest has them")

    def cleaned() -> str:
        if kept:
            resume, remove = kept[0].resume, " ; ".join(kept[0].remove)
            return f"what was sent is kept\n  Resume it with: {resume}\n  Remove it with: {remove}"
        if chain.writer.spec.gives.item == NOTHING.item:
            return "what went out before can't be taken back"
        return "everything that was stored has been removed"

    events.subscribe(note_kept)
    try:
        work = partial(_export, config, chain, attempt, events, report, profile)
        outcome = await until_interrupted(work, console, cleaned=cleaned)
        if report is not None:
            report.finish(outcome.manifest, outcome.manifest_uri)
    except AlreadyFinished as finished:
        console.say(str(finished))
        console.tell("already_finished", **finished.context)
        return EXIT_OK
    except Exception as error:
        told = error_to_tell(error)
        hint, code = (told.hint, told.exit_code) if isinstance(told, PipelineError) else ("", EXIT_FAILED)
        words = f"{told}; after: {cause_of(told)}" if isinstance(told, LeftBehindError) else str(told)
        events.emit(RunFailed(error=words, hint=hint, exit_code=code))
        raise
    finally:
        if display is not None:
            display.close()
    for line in (*summary_lines(outcome), *change_lines(outcome.manifest.facts)):
        console.say(line)
    # It was asked to be verified, and could not be: a script must not take it for proven.
    return EXIT_FAILED if outcome.state == "unproven" else EXIT_OK


def change_lines(facts: Mapping[str, Any]) -> list[str]:
    """What was written to the disk while it was copied, where nothing kept it still; `facts` are the manifest's."""
    told = facts.get("consistency") or {}
    written = told.get("written_bytes") or 0
    modified = told.get("modified", False)  # a file: what was written to it is counted by nobody
    if told.get("achieved") != "live" or not (written or modified):
        return []
    points = ", ".join(printable(str(one)) for one in told.get("changing", ())[:4])
    if modified:
        return [
            f"  {points} was written to while it was read: an image of many moments. Stop what writes to it, or set "
            'consistency = "offline" in read.disk, which fails then.'
        ]
    return [
        f"  {format_size(written)} were written to the disk while it was copied ({points}): an image of many moments. "
        'consistency = "freeze" in read.disk holds it still.'
    ]


def _observe(config: ExportConfig, events: EventStream) -> RunReport | None:
    """Subscribe what `[observe]` asks for. Raises ConfigError where a file could not be written."""
    check_observers(config.observe)
    observe = config.observe
    if observe.prometheus is not None:
        from pipeline.observe.prometheus import PrometheusFile

        events.subscribe(PrometheusFile(observe.prometheus, config.export.name, events.emit))
    if observe.report is None:
        return None
    from pipeline.observe.report import RunReport

    report = RunReport(observe.report, config, events.emit)
    events.subscribe(report)
    return report


async def _export(
    config: ExportConfig,
    chain: WiredChain,
    attempt: Attempt | None,
    events: EventStream,
    report: RunReport | None,
    profile: Profile | None,
) -> Outcome:
    from pipeline.config.planning import plan_run
    from pipeline.flow.engine import run_export
    from pipeline.flow.stage import Rounding

    rounding = Rounding(alignment=profile.align) if profile is not None else None
    async with plan_run(config, chain, events, attempt=attempt, rounding=rounding) as plan:
        if report is not None:
            report.begin(plan)
        if profile is not None:
            from stages.preflight.target import check_plan, gate

            check_plan(profile, plan)
            await gate(profile, plan, events)
        return await run_export(plan, events)
