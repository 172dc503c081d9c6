"""Files that a reader finds whole, the old one or the new one: metrics and reports."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pipeline.errors import ConfigError, Fault


def check_place(path: Path, *, asked_by: str) -> None:
    """Look whether a file could be written here, before anything else is done.

    Args:
        asked_by: the option that names the file, for the message.
    Raises:
        ConfigError: its folder does not exist or can't be written, or a folder has the name.
    """
    try:
        reason, hint = _why_not(path, path.absolute().parent)
    except OSError as error:  # the name is too long, a folder on the way may not be entered
        reason, hint = f"{path} can't be written: {os.strerror(error.errno or 0)}", ""
    if reason:
        raise ConfigError([Fault(reason=reason, hint=hint, file=asked_by)])


def _why_not(path: Path, folder: Path) -> tuple[str, str]:
    """Reason and way out; both empty where a file could be written. Raises OSError."""
    if not folder.is_dir():
        return f"the folder {folder} does not exist", f"Make it: mkdir -p {folder}"
    if path.is_dir():
        return f"{path} is a folder", "Name the file itself."
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"the folder {folder} can't be written", ""
    _unfinished(path).exists()
    return "", ""


def replace_file(path: Path, text: str) -> None:
    """Write a file in one step: into one beside it, then renamed. Raises OSError; nothing is left then.

    Readable by everybody whom the umask allows: collectors and browsers run as somebody else.
    """
    unfinished = _unfinished(path)
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def _unfinished(path: Path) -> Path:
    # A leading dot and no suffix of its own: node exporter reads every *.prom in the folder.
    return path.with_name(f".{path.name}.{os.getpid()}.new")
