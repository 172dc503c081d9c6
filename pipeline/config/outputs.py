"""What a run writes for itself (report, metrics, log, local manifest, journal) must not be what it reads or stores."""

from __future__ import annotations

import dataclasses
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.locate import locate
from pipeline.config.parse import ExportConfig
from pipeline.errors import Fault
from pipeline.flow.manifest import MANIFEST_SUFFIX

_MANIFEST = "the manifest of the image"
_NAMES_OF_FILES = ("url", "extents", "backing")  # options whose texts may name files on this machine


def output_faults(config: ExportConfig) -> list[Fault]:
    """Every file of `[observe]` and `[export]` that would replace something else, with its place in the export file.

    Such a file is written whole, under its name, at the end of a run: the source, the stored image or its manifest
    would be gone, after the image was found identical.
    """
    places, written = locate(config.text), tomllib.loads(config.text)
    taken = list(_taken(config))
    faults = []
    for section, name, path in _outputs(config):
        reason, hint = _why_not(name, path, taken)
        if reason:
            fault = Fault(reason=f"{name}: {reason}", hint=hint, file="--set")
            place = places.value((section, name))
            if place is not None and written.get(section, {}).get(name) == str(path):
                line, column, width = place.line, place.column, place.width
                text = places.line(line)
                fault = replace(fault, file=str(config.file), line=line, column=column, width=width, text=text)
            faults.append(fault)
        taken.append((f"also {name} in [{section}]", path))
    return faults


def _outputs(config: ExportConfig) -> Iterator[tuple[str, str, Path]]:
    """(section, option, path) of every file that the run writes beside the image."""
    for section, options, names in (
        ("export", config.export, ("manifest", "journal")),
        ("observe", config.observe, ("log_file", "prometheus", "report")),
    ):
        for name in names:
            value = getattr(options, name)
            if isinstance(value, Path):
                yield section, name, value


def _taken(config: ExportConfig) -> Iterator[tuple[str, Path]]:
    """(what it is, path) of every local file that the export file names otherwise, and of that file."""
    yield "this export file", config.file
    for stage in config.stages:
        for name, path in _paths(stage.options):
            yield f"{name} of {stage.name}", path
            if stage.spec.role == "write":
                yield _MANIFEST, path.with_name(path.name + MANIFEST_SUFFIX)


def _paths(options: Any) -> Iterator[tuple[str, Path]]:
    """(option, path) of every option that names a local file."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            is_path = isinstance(one, Path) or (
                isinstance(one, str) and field.name in _NAMES_OF_FILES and "://" not in one
            )
            if is_path and Path(one).name:
                yield field.name, Path(one)


def _why_not(name: str, path: Path, taken: list[tuple[str, Path]]) -> tuple[str, str]:
    """Reason and way out; both empty where nothing else is there."""
    for what, other in taken:
        if what == _MANIFEST and name == "manifest":
            continue  # the same text, twice
        if _is_same(path, other):
            return f"{path} is {what}", "Give it a file of its own."
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # not there, or told where it is opened
        return "", ""
    # A log is appended to: a terminal or a pipe can take it.
    if stat.S_ISBLK(mode) or (name != "log_file" and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)):
        return f"{path} is no file, and would be replaced by one", "Name a file."
    return "", ""


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve() or one.samefile(other)
    except (OSError, ValueError, RuntimeError):  # one is not there
        return False
