"""What the shell offers when somebody presses the Tab key, for arguments that are not fixed words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem

# Folders below a lone folder that are looked into; a loop of links must not keep a shell waiting.
_DEPTH_MAX = 8


def stage_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The TOML names of the catalog, with their summaries where the shell shows them."""
    from stages.catalog import CATALOG

    return [CompletionItem(spec.name, help=spec.summary) for spec in CATALOG if spec.name.startswith(incomplete)]


def export_files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """TOML files, and folders on the way to one; whatever there is where there is none."""
    return _files(incomplete, ".toml")


def manifests(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Manifests, and folders on the way to one."""
    return _files(incomplete, ".manifest.json")


def disks(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The disks of this machine; any file where another place was begun."""
    from pipeline.config.machine import Machine

    found = [
        CompletionItem(disk.path, help=disk.title) for disk in Machine().disks() if disk.path.startswith(incomplete)
    ]
    return found or [CompletionItem(incomplete, type="file")]


def profiles(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Target profiles; a file of one's own where a path was begun."""
    from stages.preflight.profile import names

    found = [CompletionItem(name) for name in names() if name.startswith(incomplete)]
    return found or _files(incomplete, ".toml")


def rules(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of the rules of the preflight."""
    from stages.preflight.rules import all_rules

    return [CompletionItem(one.id, help=one.title) for one in all_rules() if one.id.startswith(incomplete)]


def _files(incomplete: str, suffix: str) -> list[CompletionItem]:
    found = list(_begun(incomplete, suffix))
    for _ in range(_DEPTH_MAX):
        # A lone folder is walked into: shells end a lone word with a space, and nobody wants one behind a slash.
        if len(found) != 1 or not found[0].endswith("/"):
            break
        found = list(_begun(found[0], suffix)) or found
    if not found or (len(found) == 1 and found[0].endswith("/")):
        return [CompletionItem(incomplete, type="file")]
    return [CompletionItem(name) for name in found]


def _begun(incomplete: str, suffix: str) -> Iterator[str]:
    """Names that begin like this, as they were begun: relative, absolute or with a tilde."""
    written, slash, begun = incomplete.rpartition("/")
    folder = Path((written + slash) or ".").expanduser()
    try:
        entries = sorted(folder.iterdir())
    except (OSError, RuntimeError):
        return
    for entry in entries:
        if not entry.name.startswith(begun) or (entry.name.startswith(".") and not begun):
            continue
        if entry.is_dir():
            yield f"{written}{slash}{entry.name}/"
        elif entry.name.endswith(suffix):
            yield f"{written}{slash}{entry.name}"
