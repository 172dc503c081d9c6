"""Going on with an export that an earlier process began: where its journal is, and whether it is the same export."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import anyio

from pipeline import __version__
from pipeline.config.options import option_fields, without_secrets
from pipeline.config.parse import ExportConfig, StageConfig
from pipeline.config.wiring import WiredChain
from pipeline.errors import AlreadyFinished, FormatError, PlanError, StoreError
from pipeline.events import FallbackTaken
from pipeline.flow.manifest import Manifest
from pipeline.flow.orders import Order
from pipeline.flow.placement import lies_on_disk
from pipeline.flow.resume import JournalError, Recheck, RunJournal, is_unfinished, other_disk
from pipeline.flow.stage import Layout, LookingWriter, SourceInfo, StageContext
from pipeline.units import format_exact, format_size

HEADER_VERSION = 2
# A list request or two. A store that takes longer is no reason to begin later.
LOOK_DEADLINE_S = 5.0
_DISCARD_HINT = "Run it with the old value to go on, or remove what was sent and start anew: --discard."


class Mode(Enum):
    """What to do with what an earlier process left."""

    NEW = "new"  # refuse, and say what to type
    RESUME = "resume"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """How the user wants the export to begin.

    Attributes:
        recheck: how much of what was sent is compared with the disk before going on.
        command: the shell command of this run, without --resume and --discard, for messages.
    """

    mode: Mode = Mode.NEW
    recheck: Recheck = "sample"
    command: str = "pipeline run"


def journal_path(config: ExportConfig) -> Path:
    """Where the journal of an export is."""
    if isinstance(config.export.journal, Path):
        return config.export.journal.expanduser().absolute()
    return usual_journal(config.export.name)


def usual_journal(name: str) -> Path:
    """Where the journal of an export of this name is when its file says nothing."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser().absolute() / "disk-pipeline" / f"{name}.journal"


def journal_beside(name: str, disk: Path) -> Path | None:
    """Another place for a journal whose usual one lies on the disk that is exported; None where that is fine.

    `/run` is memory: a journal there outlives the program, and not the machine's next start.
    """
    return Path("/run") / f"{name}.journal" if _is_on(usual_journal(name), disk) else None


def open_journal(
    attempt: Attempt | None,
    config: ExportConfig,
    chain: WiredChain,
    info: SourceInfo,
    context: StageContext,
) -> RunJournal | None:
    """Open the journal of a run, where it keeps one.

    Raises:
        PlanError: it lies on the disk that is exported, another process has it, or an earlier one left something and
            the user did not say what is to become of it.
        AlreadyFinished: an earlier process published the image.
    """
    if attempt is None:
        return None
    reason = why_none(config, chain)
    if reason:
        if attempt.mode is not Mode.NEW:
            raise PlanError(f"--{attempt.mode.value} does not work here: {reason}", operation="plan")
        return None
    path = journal_path(config)
    if info.path:
        _refuse_exported_disk(path, Path(info.path))
    try:
        journal = RunJournal.open(path, emit=context.emit, clock=context.clock, keep=config.export.on_failure == "keep")
    except JournalError as error:
        if config.export.journal is not None or attempt.mode is not Mode.NEW:
            raise
        # Nobody asked for it: a machine without a home to write to exports as well, and can't resume.
        context.emit(FallbackTaken(stage="engine", what=f"no journal at {path}: no --resume", reason=error.message))
        return None
    try:
        journal.resume_command = f"{attempt.command} --resume"
        journal.recheck = attempt.recheck
        _decide(journal, attempt, config)
    except BaseException:
        journal.close()
        raise
    return journal


def told_resume(config: ExportConfig, chain: WiredChain) -> str:
    """Whether a killed run of this chain can be gone on with, for people who plan one."""
    reason = why_none(config, chain)
    return f"not possible: {reason}" if reason else f"with --resume, by {journal_path(config)}"


def was_begun(config: ExportConfig, chain: WiredChain) -> bool:
    """Whether an earlier run of this export is not finished, so that a new one has to say what becomes of it."""
    return not why_none(config, chain) and is_unfinished(journal_path(config))


def why_none(config: ExportConfig, chain: WiredChain) -> str:
    """Why this chain keeps no journal; empty where it does."""
    if config.export.journal == "off":
        return 'journal = "off" in [export]'
    if not chain.writer.spec.resumable:
        return f"an upload of {chain.writer.name} can't be gone on with"
    for stage in chain.stages:
        why = stage.spec.not_resumable
        if why is not None and (reason := why(stage.options)):
            return reason
        if not stage.spec.checkpointed:
            return f"{stage.name} can't save its state"
    if chain.order is Order.RANDOM:
        return f"{chain.encoder.name} goes back to what it wrote before"
    return ""


def _is_on(path: Path, disk: Path) -> bool:
    return lies_on_disk(next(one for one in path.parents if one.is_dir()), disk)


def _refuse_exported_disk(path: Path, disk: Path) -> None:
    if _is_on(path, disk):
        raise PlanError(
            "the journal would lie on the disk that is exported",
            operation="plan",
            journal=path,
            disk=disk,
            hint='Set journal = PATH on another disk in [export] ("/run/web01.journal" lasts until the next start of '
            'the machine), or journal = "off": then a killed run can\'t be resumed.',
        )


def _decide(journal: RunJournal, attempt: Attempt, config: ExportConfig) -> None:
    if journal.published and attempt.mode is Mode.RESUME:
        uri = journal.published
        journal.remove()
        raise AlreadyFinished("this export is finished already; the image is verified and published", uri=uri)
    if journal.published:  # the process ended between the last record and the removal of the journal
        journal.upload, journal.published = {}, ""
    if not journal.is_unfinished:
        return
    if attempt.mode is Mode.NEW:
        began = journal.header
        other = (
            "" if began.get("file") == str(config.file.absolute()) else f"\n  It was begun with {began.get('file')}."
        )
        raise PlanError(
            f'an export "{config.export.name}" to {began.get("target")} was begun and is not finished',
            operation="plan",
            journal=journal.path,
            hint=f"Go on with it: {attempt.command} --resume\n"
            f"  Or remove what was sent and start anew: {attempt.command} --discard{other}",
        )
    journal.discards = attempt.mode is Mode.DISCARD


async def begin_or_compare(journal: RunJournal, attempt: Attempt, writer: Any, context: StageContext) -> bool:
    """Begin the journal of a new export, or see that the one that is there is of this very export.

    Returns:
        whether it began: there was none to go on with.
    Raises:
        PlanError: it is of another one.
        AlreadyFinished: the image that was to be resumed is published.
    """
    if attempt.mode is Mode.RESUME:
        await look_for_finished(journal, journal.expected, writer)
    if journal.is_unfinished:
        compare(journal, journal.expected)
        return False
    if attempt.mode is Mode.RESUME:
        nothing = f"there is nothing to resume in {journal.path}"
        context.emit(FallbackTaken(stage="engine", what="the export starts anew", reason=nothing))
    journal.begin(journal.expected)
    return True


async def tell_leftovers(attempt: Attempt, chain: WiredChain, writer: Any, context: StageContext, target: str) -> None:
    """Name what other runs left of the same target, for a run that has no journal of them.

    Nothing is removed: it may be of a run that is still going on. A store that can't be asked holds no run up.
    """
    if not isinstance(writer, LookingWriter):
        return
    reason = "the store did not answer in time"
    with anyio.move_on_after(LOOK_DEADLINE_S):
        try:
            for found in await writer.find_leftovers():
                context.emit(found)
        except StoreError as error:
            reason = error.message
        else:
            return
    if attempt.mode is Mode.RESUME:
        command = uploads_command("list", target, getattr(chain.writer.options, "endpoint", ""))
        what = f"it is not known whether an earlier run left something: look with {command}"
        context.emit(FallbackTaken(stage="engine", what=what, reason=reason))


def uploads_command(verb: str, url: str, endpoint: str, *more: str) -> str:
    """The shell command that looks for what runs left under a URL, or removes it; without secrets.

    Args:
        endpoint: of an S3-compatible store; empty for the usual one.
    """
    where = ("--endpoint", without_secrets(endpoint)) if endpoint else ()
    return shlex.join(["pipeline", "uploads", verb, without_secrets(url), *where, *more])


def describe(
    config: ExportConfig,
    chain: WiredChain,
    info: SourceInfo,
    layout: Layout,
    *,
    window: int,
    encoder_identity: str,
    map_identity: str,
    target: str,
) -> dict[str, Any]:
    """The header of a journal: everything that has to be the same in a later process."""
    return {
        "version": HEADER_VERSION,
        "program": __version__,
        "name": config.export.name,
        "file": str(config.file.absolute()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": target,
        "source": dict(info.identity),
        "chain": [stage.name for stage in _shaping(chain)],
        "options": {stage.name: dict(_fixed_options(stage)) for stage in _shaping(chain)},
        "layout": {
            "format": layout.format,
            "virtual_size": layout.virtual_size,
            "head_length": head_length(chain, layout),
            "image_bytes_max": layout.image_bytes_max,
            "window": window,
            "order": chain.order.value,
        },
        "encoder": encoder_identity,
        "map": map_identity,
    }


def head_length(chain: WiredChain, layout: Layout) -> int:
    """Image bytes that come last."""
    return layout.head_length if chain.order is Order.HEAD_LAST else 0


def compare(journal: RunJournal, now: Mapping[str, Any]) -> None:
    """See that a journal is of this very export, or lead a run that can't go on with it to a new start.

    Raises:
        PlanError: what shapes the image, or its place, is not what it was; names every difference.
    """
    before = journal.header
    if journal.discards:
        if before.get("target") != now["target"]:
            raise PlanError(
                "what is to be discarded went to another target",
                operation="discard",
                was=before.get("target"),
                now=now["target"],
                hint=f"Discard it with the file that began it: {before.get('file')}",
            )
        return
    if resized := _resized(before, now):
        raise PlanError(
            f"the disk is {resized[1]}, and was {resized[0]} when this export was begun",
            operation="resume",
            hint="An export can't go on with a disk of another size. Name the disk that it was begun with, or remove "
            "what was sent and start anew: --discard.",
        )
    # A layout follows from the options: where one of those changed, what came of it tells nothing more.
    differing = list(_differences(before, now)) or list(_layout_differences(before, now))
    if differing:
        told = "; ".join(f"{what} was {old}, is {new}" for what, old, new in differing)
        raise PlanError(f"this is not the export that was begun: {told}", operation="resume", hint=_DISCARD_HINT)
    found = other_disk(before["source"], now["source"])
    if found:
        what, old, new = found
        raise PlanError(
            f"this is not the disk that was being exported: its {what} was {old}, is {new}",
            operation="resume",
            hint="Name the right disk, or remove what was sent and start anew: --discard.",
        )
    if before.get("map") != now["map"]:
        raise PlanError(
            "the disk changed since it was sent: other parts of it hold data now",
            operation="resume",
            hint="An image of two moments would not boot or lose files. Export a snapshot, and start anew: --discard.",
        )
    if before.get("encoder") != now["encoder"]:
        # Bytes of one codec can't go on in the middle of a part that another began.
        journal.discards = True
        journal.discard_reason = "a codec or the encoder is of another version and gives other bytes"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    if before.get("version") != now["version"]:
        yield "the journal's version", before.get("version"), now["version"]
        return
    if before["chain"] != now["chain"]:
        yield "the chain", " -> ".join(before["chain"]), " -> ".join(now["chain"])
        return
    for stage, options in now["options"].items():
        old = before["options"][stage]
        for name in sorted({*options, *old}):
            if options.get(name) != old.get(name):
                yield f"{stage}.{name}", _told(old.get(name)), _told(options.get(name))


def _layout_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    for name, value in now["layout"].items():
        if before["layout"].get(name) != value:
            yield f"the image's {name.replace('_', ' ')}", before["layout"].get(name), value


def _resized(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """The sizes of the disk then and now, where they differ and no option of the source made them differ."""
    if before.get("version") != now["version"] or before["chain"][0] != now["chain"][0]:
        return None
    source = now["chain"][0]
    old, new = (str(one["source"].get("size", "")) for one in (before, now))
    if old == new or not (old.isdigit() and new.isdigit()) or before["options"][source] != now["options"][source]:
        return None
    short = format_size(int(old)), format_size(int(new))
    return short if short[0] != short[1] else (format_exact(int(old)), format_exact(int(new)))


def _told(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _shaping(chain: WiredChain) -> Iterator[StageConfig]:
    return (stage for stage in chain.stages if stage.spec.role != "verify")


def _fixed_options(stage: StageConfig) -> Iterator[tuple[str, Any]]:
    """The options that shape the image or its place, as plain values; secrets masked."""
    for item in option_fields(stage.spec.options):
        if not item.may_change:
            value = getattr(stage.options, item.name)
            yield item.name, _plain(value)


def _plain(value: object) -> object:
    """For a journal: JSON values, and no secret of a URL; a presigned one has another signature each time anyway."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [without_secrets(str(one)) for one in value]
    return without_secrets(str(value))


async def look_for_finished(journal: RunJournal, now: Mapping[str, Any], writer: Any) -> None:
    """Whether the image is there already, with the manifest that this export would have written.

    Raises:
        AlreadyFinished: it is.
    """
    text: bytes | None = await writer.fetch_manifest()
    if text is None:
        return
    try:
        manifest = Manifest.from_json(text, where=str(now["target"]))
    except FormatError:
        return
    options = {
        stage: {name: value for name, value in manifest.options.get(stage, {}).items() if name in fixed}
        for stage, fixed in now["options"].items()
    }
    same = (
        manifest.name == now["name"]
        and _as_text(options) == _as_text(now["options"])
        and other_disk(manifest.disk.identity, now["source"]) is None
        and manifest.disk.identity.get("mtime_ns") == now["source"].get("mtime_ns")
        and manifest.created >= journal.header.get("created", "")
    )
    if same:
        uri = manifest.image.uri
        journal.remove()
        raise AlreadyFinished(f"this export is finished already; the image is published ({manifest.state})", uri=uri)


def _as_text(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    return {stage: {name: str(value) for name, value in values.items()} for stage, values in options.items()}
