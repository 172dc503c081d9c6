"""Rules about what the target takes: size of disk and image, format, name."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from pipeline.units import format_exact, format_size
from stages.preflight.findings import Outcome, failed, passed, skipped, unknown
from stages.preflight.rules import Rule, Target
from stages.preflight.subject import Subject, rooted


async def check_size(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether disk and image are small enough, and the size a multiple of what is asked for."""
    profile = target.profile
    size = target.virtual_size if target.virtual_size is not None else subject.size
    if not size:
        yield unknown("the size of the disk could not be told", remedy=subject.table_remedy)
        return
    good = True
    shrink = "Cut behind the last partition that is needed (through = N), or shrink the filesystems."
    if profile.max_virtual and size > profile.max_virtual:
        good = False
        yield failed(
            "block",
            f"{profile.name} takes disks of {format_size(profile.max_virtual)}, this one has {format_exact(size)}",
            remedy=shrink,
        )
    elif profile.max_virtual_safe and size > profile.max_virtual_safe:
        good = False
        yield failed(
            "warn",
            f"{profile.name}'s limit may be meant in decimal units ({format_exact(profile.max_virtual_safe)}); this "
            "disk "
            f"has {format_exact(size)}",
            remedy=shrink,
        )
    most = target.file_size if target.file_size is not None else target.file_size_max
    if most is not None and profile.max_file and most > profile.max_file:
        good = False
        certain = target.file_size is not None
        yield failed(
            "block" if certain else "warn",
            f"{profile.name} takes images of {format_size(profile.max_file)}; this one has "
            f"{'' if certain else 'at most '}{format_exact(most)}",
            remedy=f'Compress it more (level = "small"). {shrink}',
        )
    elif target.file_size is not None and profile.max_file_safe and target.file_size > profile.max_file_safe:
        good = False
        yield failed(
            "warn",
            f"{profile.name}'s limit may be meant in decimal units ({format_exact(profile.max_file_safe)}); this image "
            f"has {format_exact(target.file_size)}",
            remedy=f'Compress it more (level = "small"). {shrink}',
        )
    elif most is None and profile.max_file and (used := await _in_use(subject)) > profile.max_file:
        good = False
        yield failed(
            "warn",
            f"its filesystems hold {format_exact(used)}, and {profile.name} takes images of "
            f"{format_size(profile.max_file)}: only a compressed image may be small enough",
            remedy=f'Compress it (level = "small"), remove what is not needed, or choose another way in. {shrink}',
        )
    if target.virtual_size is not None and profile.align > 512 and target.virtual_size % profile.align:
        good = False
        yield failed(
            "block",
            f"{profile.name} takes disks of whole {format_size(profile.align)}; this one has "
            f"{format_exact(target.virtual_size)}",
            remedy="Let the export round it up.",
        )
    if good:
        yield passed(
            f"{format_exact(size)}" + (f" of {format_size(profile.max_virtual)}" if profile.max_virtual else "")
        )


async def _in_use(subject: Subject) -> int:
    """Bytes in use in the filesystems that fstab mounts from this disk; 0 where none tells."""
    used: dict[str, int] = {}
    for entry in rooted(subject.fstab.entries):
        volume = entry.meaning.volume
        if volume is None or entry.is_swap or "noauto" in entry.options:
            continue
        try:
            space = await subject.view.space(entry.point)
        except OSError:
            continue
        used[volume.name] = min(space.total - space.free, volume.size)
    return sum(used.values())


async def check_room(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the image fits where it goes."""
    if target.room is None:
        yield skipped("the image goes to no folder of this machine")
        return
    most = target.file_size if target.file_size is not None else target.file_size_max
    if most is None or most <= target.room:
        yield passed(f"{format_size(target.room)} are free where the image goes")
    elif target.file_size is not None:
        yield failed(
            "block",
            f"the image will have {format_exact(most)}, and {format_size(target.room)} are free where it goes",
            remedy="Write it to another disk or into a store, or choose a format that leaves free space out.",
        )
    else:
        yield failed(
            "warn",
            f"the image may have up to {format_exact(most)}, and {format_size(target.room)} are free where it goes",
            remedy="Look at what `pipeline disk` says is in use, or write it to another disk or into a store.",
        )


async def check_name(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the image may be called that."""
    if not target.name:
        yield skipped("the image has no name yet")
        return
    rule = target.profile.name_rule
    if len(target.name) > rule.max:
        yield failed(
            "block",
            f'{target.profile.name} takes names of {rule.max} characters; "{target.name}" has {len(target.name)}',
            remedy="Choose a shorter name.",
        )
    elif rule.pattern and not re.fullmatch(rule.pattern, target.name):
        yield failed(
            "block",
            f'{target.profile.name} does not take the name "{target.name}": it must match {rule.pattern}',
            remedy="Choose another name.",
        )
    else:
        yield passed(f'"{target.name}" is a name that {target.profile.name} takes')


async def check_format(subject: Subject, target: Target) -> AsyncIterator[Outcome]:
    """Whether the target takes this kind of image."""
    if not target.format:
        yield skipped("no image is made yet")
        return
    if not target.profile.formats or takes(target.profile.formats, target.format):
        yield passed(f"{target.profile.name} takes {target.format.replace(':', ' ')}")
    else:
        yield failed(
            "block",
            f"{target.profile.name} does not take {target.format.replace(':', ' ')}: it takes "
            f"{', '.join(one.replace(':', ' ') for one in target.profile.formats)}",
            remedy=f"pipeline convert -O {target.profile.formats[0].partition(':')[0]} IMAGE TARGET",
        )


def takes(formats: tuple[str, ...], format: str) -> bool:
    """Whether a list of `format` and `format:variant` has this one; a bare format there stands for all its variants."""
    return format in formats or format.partition(":")[0] in formats


RULES = (
    Rule(
        id="out.size",
        title="disk and image are small enough for the target",
        why="Importers refuse what is larger than their limit, after the upload. Where a vendor's G may be 10^9 or "
        "2^30, the smaller one warns and the larger one blocks.",
        check=check_size,
        for_data=True,
        needs="disk",
    ),
    Rule(
        id="out.space",
        title="the image fits where it goes",
        why="An export to a folder that is too small fails at its end.",
        check=check_room,
        for_data=True,
        needs="disk",
    ),
    Rule(
        id="out.format",
        title="the target takes this kind of image",
        why="Not every kind of VMDK or VHD is taken everywhere.",
        check=check_format,
        for_data=True,
        needs="disk",
    ),
    Rule(
        id="out.name",
        title="the target takes this name",
        why="Names of images have a length and characters that are allowed.",
        check=check_name,
        for_data=True,
        needs="disk",
    ),
)
