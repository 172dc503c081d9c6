"""`pipeline init`: an export file for this machine, with the reason of every choice."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.candidates import disks, profiles
from pipeline.commands.console import Console, verb
from pipeline.errors import PlanError
from pipeline.units import format_size

if TYPE_CHECKING:
    from pipeline.config.machine import Machine
    from pipeline.config.proposal import Proposal, Target


@click.command("init")
@click.argument("disk", required=False, shell_complete=disks)
@click.argument("url", required=False)
@click.option("--endpoint", default="", metavar="URL", help="Of an S3-compatible store.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("export.toml"),
    show_default=True,
    help="The file to write; one that exists is never replaced.",
)
@click.option("--profile", metavar="NAME", shell_complete=profiles, help="The cloud; `pipeline profiles` lists all.")
@verb
def command(
    console: Console, disk: str | None, url: str | None, endpoint: str, output: Path, profile: str | None
) -> int:
    """Write a commented export file for this machine and say the next step. Reads no disk, asks no question.

    DISK is a block device or raw image file; without it the disk that this machine runs from. URL is where the image
    goes: a path or file:///PATH, s3://BUCKET/NAME, gs://BUCKET/NAME, az://CONTAINER/NAME, sftp://USER@HOST/PATH,
    http://, https://, dav:// or davs://HOST/PATH, nbd:// or nbds://HOST/EXPORT, nbd+unix:// or
    nbds+unix:///EXPORT?socket=PATH.
    """
    from pipeline.config.machine import Machine
    from pipeline.config.proposal import proposal_text
    from stages.catalog import CATALOG

    if disk is not None and url is None and "://" in disk:
        disk, url = None, disk
    machine = Machine()
    proposal = _propose(machine, disk, url, endpoint)
    if profile is not None:
        proposal = _for_profile(proposal, profile)
    text = proposal_text(proposal, CATALOG)
    _write_new(output, text)
    for line in _warnings(proposal):
        console.note(f"warning: {line}")
    console.say(f"{output}: {proposal.disk} ({proposal.disk_title}) -> {proposal.target.address}")
    if proposal.target.is_guess:
        console.say(f"Look at the target in {output} first. The next step: pipeline plan {output}")
    else:
        console.say(f"The next step: pipeline plan {output}")
    console.tell(
        "initialised",
        file=output,
        name=proposal.name,
        disk=proposal.disk,
        target=proposal.target.address,
        target_is_guess=proposal.target.is_guess,
        mounted=proposal.mounted,
        warnings=_warnings(proposal),
    )
    return 0


def _propose(machine: Machine, disk: str | None, url: str | None, endpoint: str) -> Proposal:
    from pipeline.config.continuing import journal_beside
    from pipeline.config.proposal import Proposal

    if disk is None:
        disk = _system_disk(machine)
    is_device = _look_at(disk, machine)
    names = machine.disk_names(disk)
    whole = machine.whole_disk_of(disk)
    known = {one.path: one for one in machine.disks()}
    size = "a block device" if is_device else format_size(os.stat(disk).st_size)
    name = machine.name if is_device else Path(disk).name.partition(".")[0].lstrip("-") or machine.name
    target = _target(machine, url, endpoint, names)
    journal = journal_beside(name, Path(disk)) if is_device and target.writer.resumable else None
    return Proposal(
        name=name,
        disk=disk,
        disk_title=known[disk].about if disk in known else size,
        target=target,
        is_device=is_device,
        mounted=tuple(sorted({point for name in names for point in machine.written_to(name)})),
        whole_disk=whole.path if whole else "",
        memory=machine.memory,
        journal=str(journal or ""),
    )


def _for_profile(proposal: Proposal, name: str) -> Proposal:
    """The proposal with the first format of a profile that can go to the target.

    Raises:
        ConfigError: there is no such profile.
        PlanError: none of its formats can go there.
    """
    from pipeline.config.proposal import fitting
    from stages.catalog import CATALOG
    from stages.preflight.profile import find_profile
    from stages.preflight.target import stage_for

    profile = find_profile(name)
    if not profile.formats:
        return replace(proposal, profile=name)
    encodings = (fitting(stage_for(format), proposal.target, CATALOG) for format in profile.formats)
    found = next(filter(None, encodings), None)
    if found is None:
        raise PlanError(
            f"{proposal.target.writer.name} can't write what {profile.name} takes: {', '.join(profile.formats)}",
            operation="init",
            target=proposal.target.address,
            hint="Write the image to a file or an object store, and import it from there.",
        )
    encoder, option = found
    return replace(proposal, profile=name, encoder=encoder, encoder_option=option)


def _system_disk(machine: Machine) -> str:
    """Raises PlanError with every candidate where it is not one."""
    found = machine.system_disk()
    if len(found.disks) == 1:
        return found.disks[0].path
    if found.disks:
        titles = "; ".join(one.title for one in found.disks)
        raise PlanError(
            f"this machine runs from {len(found.disks)} disks: {titles}",
            operation="init",
            hint=f"Name the one to export: pipeline init {found.disks[0].path}. Of a mirror one half is enough.",
        )
    others = [one.title for one in machine.disks()]
    seen = f"Disks here: {'; '.join(others)}." if others else "No disk can be seen from here."
    example = machine.disks()[0].path if others else "/dev/sda"
    raise PlanError(
        f"can't tell which disk to export: {found.reason}",
        operation="init",
        hint=f"{seen} Name the disk or an image file: pipeline init {example}",
    )


def _look_at(disk: str, machine: Machine) -> bool:
    """Whether it is a block device. Raises PlanError for what can't be exported."""
    try:
        mode = os.stat(disk).st_mode
    except OSError as error:
        seen = "; ".join(one.title for one in machine.disks())
        raise PlanError(
            f"can't look at the disk: {(error.strerror or str(error)).lower()}",
            operation="init",
            path=disk,
            hint=f"Disks here: {seen}." if seen else "Look the name up with lsblk.",
        ) from None
    if not stat.S_ISBLK(mode) and not stat.S_ISREG(mode):
        raise PlanError(
            "this is neither a block device nor a file",
            operation="init",
            path=disk,
            hint="The order is DISK, then URL: pipeline init /dev/sda s3://images/web01.qcow2",
        )
    return stat.S_ISBLK(mode)


def _target(machine: Machine, url: str | None, endpoint: str, disk_names: set[str]) -> Target:
    from pipeline.config.proposal import Target, target_of
    from stages.catalog import CATALOG

    if url is not None:
        try:
            return target_of(url, CATALOG, endpoint)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    if endpoint:
        raise click.UsageError("--endpoint is for a URL: pipeline init DISK s3://BUCKET/NAME --endpoint URL")
    places = machine.places_for_an_image(disk_names)
    made = target_of(f"{places[0] if places else '/mnt/share'}/{machine.name}.qcow2", CATALOG)
    return Target(writer=made.writer, options=made.options, is_guess=True)


def _warnings(proposal: Proposal) -> list[str]:
    found = []
    if proposal.mounted:
        found.append(
            f"{proposal.disk} is in use ({', '.join(proposal.mounted[:4])}): its image would hold many moments of it. "
            "Boot a rescue system or export a snapshot."
        )
    if proposal.whole_disk:
        found.append(f"{proposal.disk} is a partition of {proposal.whole_disk}; an image of it does not boot.")
    return found


def _write_new(file: Path, text: str) -> None:
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise PlanError(
            "the file is there already",
            operation="init",
            path=file,
            hint="It stays as it is. Name another with -o FILE.",
        ) from None
    except OSError as error:
        raise PlanError(
            f"the file can't be written: {(error.strerror or str(error)).lower()}", operation="init", path=file
        ) from None
