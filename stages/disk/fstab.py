"""The table of filesystems: which volume is mounted where.

Source: fstab(5); getmntent(3) for the escapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Lines that are looked at; a longer table is an attack.
_LINES_MAX = 10_000
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mountable:
    """A line of fstab.

    Attributes:
        line: from 1.
        spec: what to mount: `UUID=...`, a device, a share.
        path: where; `none` for swap.
        kind: of the filesystem, as the table says.
        options: in order, without empty ones.
    """

    line: int
    spec: str
    path: str
    kind: str
    options: tuple[str, ...]

    def option(self, name: str) -> str | None:
        """The value of `name=value`; empty for a bare `name`, None where it is not there."""
        for one in self.options:
            key, _, value = one.partition("=")
            if key == name:
                return value
        return None


def parse_fstab(text: str) -> Iterator[Mountable]:
    """Read a table; lines that are no entries are left out."""
    for number, line in enumerate(text.splitlines()[:_LINES_MAX], 1):
        words = [_ESCAPE.sub(lambda match: chr(int(match[1], 8) & 0xFF), word) for word in line.split()]
        if len(words) < 2 or words[0].startswith("#"):
            continue
        kind = words[2] if len(words) > 2 else "auto"
        options = tuple(one for one in (words[3] if len(words) > 3 else "defaults").split(",") if one)
        yield Mountable(number, words[0], words[1], kind, options)
