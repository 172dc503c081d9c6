"""Which packages are installed, from the package manager's own database, without the package manager.

Source: dpkg(1) and deb-control(5) for /var/lib/dpkg/status; Alpine "apk-spec" for lib/apk/db/installed; pacman(8),
local database; SQLite "Database File Format", sections 1.3 to 2.1, for rpm's database, of which only the names are
read: its whole may have hundreds of megabytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import FormatError
from stages.disk.tree import View
from stages.preflight.findings import Evidence
from stages.preflight.texts import PACKAGES_LIMIT, exists, is_folder, names_in, read_text

Manager = Literal["dpkg", "apk", "pacman", "rpm", "none"]

_RPM = ("/var/lib/rpm/rpmdb.sqlite", "/usr/lib/sysimage/rpm/rpmdb.sqlite")
# RHEL 8 and older; SUSE.
_RPM_OLD = {
    "/var/lib/rpm/Packages": "an rpm database in a Berkeley DB",
    "/var/lib/rpm/Packages.db": "an rpm database in ndb format",
    "/usr/lib/sysimage/rpm/Packages.db": "an rpm database in ndb format",
}
_PAGES_MAX = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An installed package. `version` is empty where the database was not read that deep."""

    name: str
    version: str
    where: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """What is installed.

    Attributes:
        problem: why the list is not whole; then only traces in the file system tell.
    """

    manager: Manager
    installed: Mapping[str, Package] = field(default_factory=dict)
    problem: str = ""

    def matching(self, pattern: str) -> list[Package]:
        """Packages whose whole name matches a regular expression, by name."""
        wanted = re.compile(pattern)
        return [one for name, one in sorted(self.installed.items()) if wanted.fullmatch(name)]


async def find_packages(view: View) -> Packages:
    """Read the database of whatever package manager there is."""
    if await exists(view, "/var/lib/dpkg/status"):
        return await _dpkg(view)
    for path in ("/lib/apk/db/installed", "/usr/lib/apk/db/installed"):
        if await exists(view, path):
            return await _apk(view, path)
    if await is_folder(view, "/var/lib/pacman/local"):
        return await _pacman(view)
    for path in _RPM:
        if await exists(view, path):
            return await _rpm(view, path)
    for path, what in _RPM_OLD.items():
        if await exists(view, path):
            return Packages(manager="rpm", problem=f"{path} is {what}, which is not read here")
    return Packages(manager="none", problem="there is no database of a package manager that is known here")


async def _dpkg(view: View) -> Packages:
    path = "/var/lib/dpkg/status"
    text = await read_text(view, path, limit=PACKAGES_LIMIT)
    found: dict[str, Package] = {}
    name, version, status, place = "", "", "", 0
    for number, line in enumerate((*text.lines, ""), 1):
        if not line:
            # "deinstall ok config-files" has left its configuration only; "hold ok installed" is installed.
            if name and status.endswith(" installed"):
                found[name] = Package(name=name, version=version, where=Evidence(path, place))
            name = version = status = ""
        elif line.startswith("Package: "):
            name, place = line[9:].strip(), number
        elif line.startswith("Status: "):
            status = line[8:].strip()
        elif line.startswith("Version: "):
            version = line[9:].strip()
    return Packages(manager="dpkg", installed=found, problem=text.problem and f"{path}: {text.problem}")


async def _apk(view: View, path: str) -> Packages:
    text = await read_text(view, path, limit=PACKAGES_LIMIT)
    found: dict[str, Package] = {}
    name, version, place = "", "", 0
    for number, line in enumerate((*text.lines, ""), 1):
        if not line:
            if name:
                found[name] = Package(name=name, version=version, where=Evidence(path, place))
            name = version = ""
        elif line.startswith("P:"):
            name, place = line[2:].strip(), number
        elif line.startswith("V:"):
            version = line[2:].strip()
    return Packages(manager="apk", installed=found, problem=text.problem and f"{path}: {text.problem}")


async def _pacman(view: View) -> Packages:
    folder = "/var/lib/pacman/local"
    found = {}
    for entry in await names_in(view, folder):
        name, _, rest = entry.rpartition("-")
        name, _, version = name.rpartition("-")
        if name:
            found[name] = Package(name=name, version=f"{version}-{rest}", where=Evidence(f"{folder}/{entry}"))
    return Packages(manager="pacman", installed=found)


async def _rpm(view: View, path: str) -> Packages:
    found: dict[str, Package] = {}
    try:
        async for name in _Sqlite(view, path).texts("Name"):
            found[name] = Package(name=name, version="", where=Evidence(path))
    except (FormatError, OSError, struct.error, IndexError) as error:
        return Packages(manager="rpm", installed=found, problem=f"{path} can't be read: {error}")
    return Packages(manager="rpm", installed=found)


class _Sqlite:
    """The first column of one table of an SQLite file, page by page."""

    def __init__(self, view: View, path: str) -> None:
        self._view = view
        self._path = path
        self._page_size = 0
        self._pages = 0

    async def texts(self, table: str) -> AsyncIterator[str]:
        """The texts in the first column of a table. Raises FormatError, OSError, struct.error, IndexError."""
        head = await self._view.read_at(self._path, 0, 100)
        if head[:16] != b"SQLite format 3\0":
            raise FormatError("it is no SQLite file")
        size = struct.unpack_from(">H", head, 16)[0]
        self._page_size = 65536 if size == 1 else size
        if self._page_size < 512:
            raise FormatError("its pages have no size")
        async for row in self._rows(1):
            if len(row) > 3 and row[0] == "table" and row[1] == table and isinstance(row[3], int):
                async for found in self._rows(row[3]):
                    if found and isinstance(found[0], str):
                        yield found[0]
                return
        raise FormatError(f"it has no table {table}")

    async def _rows(self, root: int) -> AsyncIterator[list[object]]:
        waiting = [root]
        while waiting:
            number = waiting.pop()
            self._pages += 1
            if self._pages > _PAGES_MAX:
                raise FormatError("it has more pages than any real one, or they loop")
            page = await self._view.read_at(self._path, (number - 1) * self._page_size, self._page_size)
            begin = 100 if number == 1 else 0
            kind, cells = page[begin], struct.unpack_from(">H", page, begin + 3)[0]
            pointers = begin + (12 if kind == 5 else 8)
            places = struct.unpack_from(f">{cells}H", page, pointers)
            if kind == 5:  # interior: children left of each key, and the last one
                children = [struct.unpack_from(">I", page, at)[0] for at in places]
                children.append(struct.unpack_from(">I", page, begin + 8)[0])
                waiting += reversed(children)
            elif kind == 13:
                for at in places:
                    length, at = _varint(page, at)
                    _, at = _varint(page, at)
                    yield _record(page[at : at + length])
            else:
                raise FormatError("a page of it is of an unknown kind")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(9):
        byte = data[at + index]
        if index == 8:
            return value << 8 | byte, at + 9
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + index + 1
    return value, at + 9


_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


def _record(data: bytes) -> list[object]:
    """The columns of a record; those that go on in other pages are cut."""
    length, at = _varint(data, 0)
    body = length
    row: list[object] = []
    while at < length:
        kind, at = _varint(data, at)
        size = _INTEGERS.get(kind, 8 if kind == 7 else 0)
        if kind >= 12:
            size = (kind - 12) // 2
        raw = data[body : body + size]
        body += size
        if kind in _INTEGERS:
            row.append(int.from_bytes(raw, "big", signed=True))
        elif kind in (8, 9):
            row.append(kind - 8)
        elif kind >= 13 and kind % 2:
            row.append(raw.decode("utf-8", "backslashreplace"))
        else:
            row.append(None)
    return row
