"""`pipeline uploads`: find and remove what runs left behind in a store."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from pipeline.commands.console import Console, run_async, until_interrupted, verb
from pipeline.config.options import without_secrets
from pipeline.errors import EXIT_OK, LeftBehindError, PlanError, StoreError
from pipeline.units import format_duration, format_exact, parse_duration

if TYPE_CHECKING:
    from stages.write.leftovers import Leftover

_endpoint = click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store.")


@click.group("uploads")
def command() -> None:
    """Find and remove what runs left behind: open multipart uploads (which are billed), and temporary files.

    URL names the image, or with a slash at the end (or as a folder) everything in it: s3://BUCKET/NAME, s3://BUCKET/,
    a path, sftp://USER@HOST/PATH, davs://USER:PASSWORD@HOST/PATH.
    """


@command.command("list")
@click.argument("url", metavar="URL")
@_endpoint
@verb
def list_uploads(console: Console, url: str, endpoint: str) -> int:
    """List what runs left behind under URL, the oldest first. Exits 0, whether there is something or not."""
    return run_async(partial(_list, console, url, endpoint))


@command.command("abort")
@click.argument("url", metavar="URL")
@_endpoint
@click.option("--older-than", metavar="AGE", help="Only what is older than this: 1d, 12h, 30min.")
@click.option("--upload-id", metavar="ID", help="Only this one, as `list` names it.")
@verb
def abort_uploads(console: Console, url: str, endpoint: str, older_than: str | None, upload_id: str | None) -> int:
    """Remove what runs left behind under URL; also what a run that is still working has stored so far.

    Exits 0 when it is gone (or nothing was there), 4 when something may be left.
    """
    from stages.write.leftovers import names_many

    try:
        age_s = parse_duration(older_than) if older_than is not None else None
    except ValueError as error:
        raise PlanError(str(error), operation="uploads abort") from None
    if names_many(url) and age_s is None and upload_id is None:
        raise _too_many(url)
    return run_async(partial(_abort, console, url, endpoint, age_s, upload_id))


def _too_many(url: str) -> PlanError:
    return PlanError(
        f"{without_secrets(url)} names more than one image, and some of them may be on their way now",
        operation="uploads abort",
        hint="Add --older-than 1d (or --upload-id), or name the image.",
    )


async def _list(console: Console, url: str, endpoint: str) -> int:
    return await until_interrupted(partial(_show, console, url, endpoint), console, cleaned="nothing was changed")


async def _show(console: Console, url: str, endpoint: str) -> int:
    from pipeline.config.continuing import uploads_command
    from stages.write.leftovers import place_of

    async with place_of(url, endpoint=endpoint) as place:
        found = await place.find()
        for one in found:
            _tell(console, "upload", one, place.now())
    known = sum(one.size or 0 for one in found)
    console.tell("uploads", count=len(found), bytes=known)
    if not found:
        console.say(f"nothing was left behind under {without_secrets(url)}")
    else:
        console.say(f"{len(found)} left behind, {format_exact(known)}. Remove what no run is working on any more:")
        for one in found:
            console.say("  " + uploads_command("abort", url, endpoint, "--upload-id", one.upload_id))
    return EXIT_OK


async def _abort(console: Console, url: str, endpoint: str, age_s: float | None, upload_id: str | None) -> int:
    work = partial(_remove, console, url, endpoint, age_s, upload_id)
    return await until_interrupted(work, console, cleaned="what was removed until now is gone")


async def _remove(console: Console, url: str, endpoint: str, age_s: float | None, upload_id: str | None) -> int:
    from stages.write.leftovers import place_of

    removed = 0
    failed: list[tuple[Leftover, StoreError]] = []
    async with place_of(url, endpoint=endpoint) as place:
        everything = await place.find()
        if place.holds_many and age_s is None and upload_id is None:  # a server's folder: only now it is known
            raise _too_many(url)
        for one in everything:
            if upload_id is not None and one.upload_id != upload_id:
                continue
            if age_s is not None and one.age_s(place.now()) < age_s:
                continue
            try:
                await one.remove()
            except StoreError as error:
                failed.append((one, error))
            else:
                removed += 1
                _tell(console, "upload_aborted", one, place.now())
    console.tell("uploads_aborted", count=removed, failed=len(failed))
    if failed:
        raise LeftBehindError(
            f"{len(failed)} could not be removed: {failed[0][1]}",
            cause=failed[0][1],
            commands=tuple(one.command for one, _ in failed),
            operation="uploads abort",
        )
    console.say(f"{removed} removed" if removed else f"nothing to remove under {without_secrets(url)}")
    return EXIT_OK


def _tell(console: Console, kind: str, one: Leftover, now: float) -> None:
    age_s = one.age_s(now)
    console.tell(kind, uri=one.uri, upload_id=one.upload_id, age_s=round(age_s), parts=one.parts, bytes=one.size)
    words = [one.uri, f"{format_duration(age_s)} old"]
    if one.parts is not None:
        words.append(f"{one.parts} part{'' if one.parts == 1 else 's'}")
    if one.size is not None:
        words.append(format_exact(one.size))
    if one.upload_id not in one.uri:
        words.append(f"upload id {one.upload_id}")
    console.say(("removed: " if kind == "upload_aborted" else "") + ", ".join(words))
