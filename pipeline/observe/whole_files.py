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
    folder = path.absolute().parent
    reason, hint = "", ""
    if not folder.is_dir():
        reason, hint = f"the folder {folder} does not exist", f"Make it: mkdir -p {folder}"
    elif path.is_dir():
        reason, hint = f"{path} is a folder", "Name the file itself."
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"the folder {folder} can't be written"
    if reason:
        raise ConfigError([Fault(reason=reason, hint=hint, file=asked_by)])


def replace_file(path: Path, text: str) -> None:
    """Write a file in one step: into one beside it, then renamed. Raises OSError; nothing is left then.

    Readable by everybody whom the umask allows: collectors and browsers run as somebody else.
    """
    # A leading dot and no suffix of its own: node exporter reads every *.prom in the folder.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
