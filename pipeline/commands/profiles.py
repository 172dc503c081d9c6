"""`pipeline profiles`: what each target takes, where that was read, and the command that imports the image there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from pipeline.commands.candidates import profiles
from pipeline.commands.console import Console, verb
from pipeline.units import format_size

if TYPE_CHECKING:
    from stages.preflight.profile import Profile


@click.command("profiles")
@click.argument("name", required=False, metavar="[NAME|FILE]", shell_complete=profiles)
@click.option("--url", default="URL", help="Of the finished object, for the import command.")
@verb
def command(console: Console, name: str | None, url: str) -> int:
    """List the targets, or say all about one: limits, formats, sources, and how the provider imports the object."""
    from stages.preflight.profile import find_profile, names

    if name is None:
        found = [find_profile(one) for one in names()]
        width = max(len(one.name) for one in found)
        for one in found:
            console.say(f"{one.name:<{width}}  {one.title}")
            console.tell("profile", **_told(one, url))
        console.say("The next step: pipeline profiles NAME, or pipeline preflight --profile NAME")
        return 0
    profile = find_profile(name)
    for line in profile_lines(profile, url):
        console.say(line)
    console.tell("profile", **_told(profile, url))
    return 0


def _told(profile: Profile, url: str) -> dict[str, object]:
    import dataclasses

    from stages.preflight.importing import import_steps

    return {**dataclasses.asdict(profile), "checked": profile.checked, "import": import_steps(profile, url)}


def profile_lines(profile: Profile, url: str) -> Iterator[str]:
    """All about a profile, for people."""
    from stages.preflight.importing import import_steps

    yield f"{profile.name}: {profile.title}"
    facts = list(facts_of(profile))
    width = max(len(what) for what, _, _ in facts)
    for what, value, field in facts:
        sources = ", ".join(profile.told_by.get(field, ()))
        yield f"  {what:<{width}}  {value}" + (f"  [{sources}]" if sources else "")
    for note in profile.notes:
        yield f"  note: {note}"
    steps = import_steps(profile, url)
    if steps:
        yield "Import it with:"
        for step in steps:
            yield f"  {step}" if step.startswith("#") else f"  $ {step}"
    yield "Sources:"
    for key, source in profile.source.items():
        yield f"  [{key}] {source.title}, read {source.checked}" + (f", {source.url}" if source.url else "")


def facts_of(profile: Profile) -> Iterator[tuple[str, str, str]]:
    """What a profile says: (what, in words, field). Each field that it sets is there, but its import steps."""

    def listed(words: tuple[str, ...]) -> str:
        return ", ".join(word.replace(":", " ") for word in words)

    if profile.formats:
        yield "formats", listed(profile.formats), "formats"
    if profile.max_virtual:
        yield "disk", f"at most {format_size(profile.max_virtual)}", "max_virtual"
    if profile.max_virtual_safe:
        yield "disk, warned", f"more than {format_size(profile.max_virtual_safe)}", "max_virtual_safe"
    if profile.max_file:
        yield "image", f"at most {format_size(profile.max_file)}", "max_file"
    if profile.max_file_safe:
        yield "image, warned", f"more than {format_size(profile.max_file_safe)}", "max_file_safe"
    if profile.disks_max > 1:
        yield "disks", f"at most {profile.disks_max} of one machine", "disks_max"
    yield "size", f"a multiple of {format_size(profile.align)}", "align"
    yield "starts by", " or ".join(mode.upper() for mode in profile.boot_modes), "boot_modes"
    if "adapts" in profile.told_by:
        how = (
            "as the disk is prepared for"
            if profile.adapts
            else f"{profile.boot_modes[0].upper()} unless told otherwise"
        )
        yield "by default", how, "adapts"
    for mode, tables in profile.tables.items():
        yield f"{mode.upper()} table", " or ".join(one.upper() for one in tables), "tables"
    for title, alternatives in (("disk driver", profile.drivers.block), ("network driver", profile.drivers.net)):
        if alternatives:
            yield title, " or ".join(" + ".join(one) for one in alternatives), "drivers"
    if profile.drivers.extra:
        yield "other drivers", listed(profile.drivers.extra), "drivers"
    if profile.agents.any_of:
        least = f" {profile.agents.version} or later" if profile.agents.version else ""
        yield "agent", " or ".join(profile.agents.any_of) + least, "agents"
    if profile.agents.remove:
        yield "to remove", ", ".join(profile.agents.remove), "agents"
    if profile.agents.datasource:
        yield "data source", profile.agents.datasource, "agents"
    line = profile.command_line
    if line.wants:
        yield "kernel line", " ".join(line.wants), "command_line"
    if line.forbids:
        yield "not there", " ".join(line.forbids), "command_line"
    hardware = profile.hardware
    names = [one for one in (hardware.disk, hardware.nic, hardware.video) if one]
    if names:
        yield "hardware", ", ".join(names), "hardware"
    if hardware.nics:
        yield "network cards", str(hardware.nics), "hardware"
    if hardware.processors:
        yield "processor", " or ".join(hardware.processors), "hardware"
    if profile.filesystems.allow:
        inside = "" if profile.filesystems.subvolumes else " (btrfs without subvolumes)"
        yield "filesystems", listed(profile.filesystems.allow) + inside, "filesystems"
    if profile.filesystems.discouraged:
        yield "rather not", listed(profile.filesystems.discouraged), "filesystems"
    if not profile.encryption:
        yield "encryption", "refused inside of the disk", "encryption"
    if not profile.own_kernel:
        yield "kernel", "the distribution's own", "own_kernel"
    for one in profile.severity:
        when = " ".join(filter(None, (one.table.upper(), one.boot_mode.upper())))
        yield "weight", f"{one.id} is {one.level}" + (f" with {when}" if when else ""), "severity"
    if profile.name_rule.max < 255 or profile.name_rule.pattern:
        pattern = f", {profile.name_rule.pattern}" if profile.name_rule.pattern else ""
        yield "name", f"{profile.name_rule.max} characters{pattern}", "name_rule"
