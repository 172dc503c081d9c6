"""Paths inside a view: cut into names and checked, the same for a live system and for one on a disk."""

from __future__ import annotations

import errno
import os

# What the kernel allows (linux/limits.h, and fs/namei.c for links); beyond is ENAMETOOLONG and ELOOP.
PATH_MAX = 4096
LINKS_MAX = 40
# Folders inside each other that are walked into. Real systems have less than 40; it bounds open descriptors and loops.
DEPTH_MAX = 200
# Names of a folder that are held at once; a hostile one can claim any number.
ENTRIES_MAX = 1 << 18


def failure(code: int, path: str) -> OSError:
    """The error that the kernel would give for `path`, as the subclass of OSError that belongs to it."""
    return OSError(code, os.strerror(code), path)


def split(path: str) -> tuple[list[str], bool]:
    """(names, whether the last one has to be a folder) of a path; where it begins is the caller's matter.

    Raises:
        OSError: ENOENT for an empty path, ENAMETOOLONG, EINVAL for a NUL or what no file name can be.
    """
    try:
        length = len(path.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise failure(errno.EINVAL, path) from None
    if not path:
        raise failure(errno.ENOENT, path)
    if length >= PATH_MAX:
        raise failure(errno.ENAMETOOLONG, path[:80])
    if "\0" in path:
        raise failure(errno.EINVAL, path)
    names = [name for name in path.split("/") if name not in ("", ".")]
    return names, path.endswith(("/", "/.")) or path == "."
