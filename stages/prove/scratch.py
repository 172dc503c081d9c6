"""Folders for sockets, mounts and a machine's files: gone afterwards, at the latest when the next one is made."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = re.compile(r"pipeline-prove-(\d+)-\w+")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new empty folder of this user alone; what processes left that were killed is removed first."""
    parent = Path(tempfile.gettempdir())
    for path in parent.glob("pipeline-prove-*"):
        match = _NAME.fullmatch(path.name)
        if match is not None and not Path(f"/proc/{match[1]}").exists() and _is_left(path):
            shutil.rmtree(path, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"pipeline-prove-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_left(path: Path) -> bool:
    """Whether it is a folder without a mount in it; whose it is, removing it will tell."""
    try:
        return path.is_dir() and not path.is_symlink() and not any(one.is_mount() for one in path.iterdir())
    except OSError:
        return False
