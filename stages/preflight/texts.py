"""Text files of the system that is looked at: bounded, by lines, with what was wrong with a file that can't be read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import FormatError
from pipeline.units import KiB, MiB, format_size
from stages.disk.tree import READ_LIMIT, Kind, View
from stages.preflight.findings import Evidence

# A boot menu of a thousand entries has less; a longer list of configuration files is no configuration.
FILES_MAX = 2000
# What is read of one folder of configuration, in bytes. Real ones have some ten KiB.
FOLDER_MAX = 16 * MiB
# A line of configuration; what is behind it is not looked at.
LINE_MAX = 64 * KiB
PACKAGES_LIMIT = 64 * MiB

_MISSING = (errno.ENOENT, errno.ENOTDIR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text file. What is no UTF-8 in it is shown as `\\xff`.

    Attributes:
        path: as it was asked for.
        exists: whether anything is there.
        problem: why there are no lines although it exists; empty where it was read.
    """

    path: str
    lines: tuple[str, ...] = ()
    exists: bool = True
    problem: str = ""

    def at(self, line: int) -> Evidence:
        """The place of a line, from 1."""
        return Evidence(self.path, line)

    def numbered(self) -> Iterator[tuple[int, str]]:
        """Lines that say something: (number from 1, text without blanks around it); comments and empty ones not."""
        for number, line in enumerate(self.lines, 1):
            stripped = line.strip()
            if stripped and not stripped.startswith("#"):
                yield number, stripped


async def read_text(view: View, path: str, *, limit: int = READ_LIMIT) -> Text:
    """A text file of the system; one that is missing or can't be read is told as such, never raised."""
    try:
        raw = await view.read(path, limit=limit)
    except OSError as error:
        if error.errno in _MISSING:
            return Text(path=path, exists=False)
        return Text(path=path, problem=why_unreadable(error, limit))
    except FormatError as error:
        return Text(path=path, problem=f"its filesystem is damaged: {error.message}")
    lines = raw.decode("utf-8", "backslashreplace").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return Text(path=path, lines=tuple(line[:LINE_MAX].rstrip("\r") for line in lines))


def why_unreadable(error: OSError, limit: int = READ_LIMIT) -> str:
    """An error of reading a file, for a message."""
    if error.errno == errno.EFBIG:
        return f"it is larger than {format_size(limit)}, which no such file is"
    return (os.strerror(error.errno) if error.errno else str(error)).lower()


async def exists(view: View, path: str) -> bool:
    """Whether there is anything under that path. A dangling link is nothing."""
    try:
        await view.stat(path)
    except OSError as error:
        if error.errno in (*_MISSING, errno.ELOOP):
            return False
        raise
    return True


async def is_folder(view: View, path: str) -> bool:
    """Whether there is a folder."""
    try:
        return (await view.stat(path)).kind is Kind.DIRECTORY
    except OSError:
        return False


async def names_in(view: View, folder: str) -> tuple[str, ...]:
    """Names in a folder, sorted; none where there is no such folder."""
    try:
        entries = await view.list(folder)
    except OSError as error:
        if error.errno in (*_MISSING, errno.ELOOP):
            return ()
        raise
    return tuple(sorted(one.name for one in entries)[:FILES_MAX])


async def texts_in(view: View, folder: str, *suffixes: str) -> tuple[Text, ...]:
    """The files of a folder with one of these suffixes, sorted by name."""
    found: list[Text] = []
    room = FOLDER_MAX
    for name in await names_in(view, folder):
        if not suffixes or name.endswith(suffixes):
            text = await read_text(view, f"{folder}/{name}", limit=min(READ_LIMIT, room))
            if text.exists:
                found.append(text)
                room -= sum(map(len, text.lines))
                if room <= 0:
                    break
    return tuple(found)


async def find_ignoring_case(view: View, path: str) -> str | None:
    """The path as it is spelt on the disk, whatever the case of its parts; None where there is none.

    Boot partitions are FAT, which knows no case; what lies on it may be spelt any way.
    """
    found = ""
    for part in path.strip("/").split("/"):
        names = await names_in(view, found or "/")
        match = part if part in names else next((one for one in names if one.lower() == part.lower()), None)
        if match is None:
            return None
        found = f"{found}/{match}"
    return found


def words_of(line: str) -> list[str]:
    """A line split at blanks; quotes keep blanks together and are dropped. Never raises, whatever is quoted."""
    words: list[str] = []
    word, quote, begun, escaped = "", "", False, False
    for char in line:
        if escaped:
            word, escaped = word + char, False
        elif char == "\\" and quote != "'":
            escaped = begun = True
        elif quote:
            if char == quote:
                quote = ""
            else:
                word += char
        elif char in "'\"":
            quote, begun = char, True
        elif char in " \t":
            if begun:
                words.append(word)
            word, begun = "", False
        else:
            word, begun = word + char, True
    if begun:
        words.append(word)
    return words
