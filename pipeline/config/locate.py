"""Where every header, key and value of a TOML text stands.

`tomllib` gives values without places, and a fault without a place sends its reader searching. The scanner here walks
a text that `tomllib` has accepted, so it only has to find things, never to judge them.

Source: TOML v1.0.0, "Keys", "String", "Array", "Inline Table", "Array of Tables".
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from dataclasses import dataclass

from pipeline.errors import Fault

Path = tuple[str | int, ...]  # ("stage", 0, "use"): keys, and indices into arrays and arrays of tables

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]*")
_AT = re.compile(r"\(at (?:line (\d+), column (\d+)|end of document)\)$")

# What a reader can do about the messages of tomllib that people meet; matched by how the message starts.
_SYNTAX_HINTS = (
    ("Invalid value", 'a text stands in double quotes: key = "value"'),
    ("Expected '='", "write key = value, one a line"),
    ("Invalid statement", "a line is [section], [[stage]], key = value or # comment"),
    ("Cannot overwrite a value", "this option is there twice: remove one"),
    ("Cannot declare", "this section is there twice: join the two"),
    ("Cannot mutate", "this is defined twice: join the two"),
    ("Illegal character '\\n'", "the closing quote is missing"),
    ("Illegal character", "this character can't be written here: remove it, or write it as \\uXXXX in a text"),
    ("Unterminated string", "the closing quote is missing"),
    ('Expected "\'"', "the closing quote is missing"),
    ("Unescaped '\\'", "write two backslashes, or put the text in single quotes"),
    ("Unclosed array", "the closing ] is missing"),
    ("Unclosed inline table", "the closing } is missing"),
    ("Expected ']'", "the closing bracket is missing"),
    ("Expected newline", "one key = value a line; is a quote missing or too many?"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A stretch of one line. Line and column count from 1; what spans lines is cut at the end of its first."""

    line: int
    column: int
    width: int


class Places:
    """The places of one text, by path."""

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self.headers: dict[Path, Place] = {}
        self.keys: dict[Path, Place] = {}
        self.values: dict[Path, Place] = {}

    def find(self, path: Path) -> Place | None:
        """The key of this path, else its header, else its value, else the same of what it stands in."""
        while path:
            place = self.keys.get(path) or self.headers.get(path) or self.values.get(path)
            if place is not None:
                return place
            path = path[:-1]
        return None

    def value(self, path: Path) -> Place | None:
        """The value of this path, else what `find` finds."""
        return self.values.get(path) or self.find(path)

    def header(self, path: Path) -> Place | None:
        """The `[header]` of this table, else what `find` finds."""
        return self.headers.get(path) or self.find(path)

    def line(self, number: int) -> str:
        """A line of the text, from 1, as it may be shown (see `shown`)."""
        return shown(self._lines[number - 1])


def shown(line: str) -> str:
    """A line fit for a terminal, with every character in its column: tabs and control characters become blanks."""
    return "".join(char if char.isprintable() else " " for char in line.rstrip("\r\n"))


def locate(text: str) -> Places:
    """Find every table header, key and value.

    Args:
        text: TOML that `tomllib.loads` accepts, with LF line ends or CRLF.
    """
    text = text.replace("\r\n", "\n")
    scanner = _Scanner(text)
    scanner.scan()
    return scanner.places


def syntax_fault(error: ValueError, text: str, file: str) -> Fault:
    """Turn what `tomllib.loads(text)` raised into a fault with its place."""
    lines = text.replace("\r\n", "\n").split("\n")
    message = str(error)
    match = _AT.search(message)
    message = message[: match.start()].rstrip() if match else message
    hint = next((hint for start, hint in _SYNTAX_HINTS if message.startswith(start)), "")
    if match and match[1]:
        line, column = int(match[1]), int(match[2])
    else:
        # "at end of document": behind the last character that is there.
        line = max((number for number, content in enumerate(lines, 1) if content.strip()), default=1)
        column = len(lines[line - 1].rstrip()) + 1
    content, width = lines[min(line, len(lines)) - 1], 1
    if message.startswith("Cannot overwrite"):
        # tomllib points behind the value; the key is what is there twice.
        column = len(content) - len(content.lstrip()) + 1
        width = max(1, len(content.partition("=")[0].strip()))
    if message.startswith("Unescaped '\\'"):
        column, width = max(1, column - 2), 2  # tomllib points behind the backslash and its character
    if message.startswith(("Cannot declare", "Cannot mutate")):
        column, width = len(content) - len(content.lstrip()) + 1, max(1, len(content.partition("#")[0].strip()))
    return Fault(
        reason=f"not valid TOML: {message[:1].lower()}{message[1:]}",
        hint=hint,
        file=file,
        line=line,
        column=column,
        width=width,
        text=shown(content),
    )


class _Scanner:
    """Walks accepted TOML once, from the first character to the last."""

    def __init__(self, text: str) -> None:
        self.places = Places(text)
        self._text = text
        self._at = 0
        self._starts = [0] + [match.end() for match in re.finditer("\n", text)]
        self._lengths: dict[Path, int] = {}  # how many [[entries]] each array of tables has so far

    def scan(self) -> None:
        table: Path = ()
        while self._skip(" \t\n"):
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)

    def _header(self) -> Path:
        begin = self._at
        brackets = 2 if self._text.startswith("[[", begin) else 1
        self._at += brackets
        names = self._key()
        self._at += brackets
        path: Path = ()
        for index, (name, place) in enumerate(names):
            path = (*path, name)
            self.places.keys.setdefault(path, place)
            if brackets == 2 and index == len(names) - 1:
                self._lengths[path] = self._lengths.get(path, 0) + 1
            if path in self._lengths:
                path = (*path, self._lengths[path] - 1)
        self.places.headers.setdefault(path, self._place(begin))
        return path

    def _pair(self, table: Path) -> None:
        path = table
        for name, place in self._key():
            path = (*path, name)
            self.places.keys.setdefault(path, place)
        self._at += 1  # =
        self._skip(" \t")
        self._value(path)

    def _key(self) -> list[tuple[str, Place]]:
        """A dotted key; stops at what follows it and its blanks."""
        names = []
        while True:
            self._skip(" \t")
            begin = self._at
            if self._text[begin] in "\"'":
                self._string()
                name = _decoded(self._text[begin : self._at])
            else:
                match = _BARE_KEY.match(self._text, begin)
                name = match[0] if match else ""
                self._at += max(1, len(name))  # never stand still, whatever the text is
            names.append((name, self._place(begin)))
            self._skip(" \t")
            if self._text[self._at : self._at + 1] != ".":
                return names
            self._at += 1

    def _value(self, path: Path) -> None:
        begin = self._at
        first = self._text[begin]
        if first in "\"'":
            self._string()
        elif first == "[":
            self._at += 1
            index = 0
            while self._inside("]"):
                self._value((*path, index))
                index += 1
        elif first == "{":
            self._at += 1
            while self._inside("}"):
                self._pair(path)
        else:
            match = _SCALAR.match(self._text, begin)
            self._at += max(1, len(match[0].rstrip()) if match else 1)
        self.places.values.setdefault(path, self._place(begin))

    def _inside(self, closing: str) -> bool:
        """Go to the next item of an array or inline table; False behind the closing bracket."""
        if not self._skip(" \t\n,"):
            return False
        if self._text[self._at] == closing:
            self._at += 1
            return False
        return True

    def _string(self) -> None:
        """Go behind a string of any of the four kinds."""
        quote = self._text[self._at]
        closing = quote * 3 if self._text.startswith(quote * 3, self._at) else quote
        self._at += len(closing)
        while not self._text.startswith(closing, self._at) and self._at < len(self._text):
            self._at += 2 if quote == '"' and self._text[self._at] == "\\" else 1
        self._at += len(closing)
        if len(closing) == 3:
            # Up to two quotes may stand right before the closing three: """a""""" ends in a"".
            while self._text.startswith(quote, self._at):
                self._at += 1

    def _skip(self, blanks: str) -> bool:
        """Go over blanks, and over comments where lines may end; False at the end of the text."""
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "#" and "\n" in blanks:
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif char in blanks:
                self._at += 1
            else:
                return True
        return False

    def _place(self, begin: int) -> Place:
        """From `begin` to here, or to the end of its line."""
        number = bisect_right(self._starts, begin) - 1
        line_end = self._text.find("\n", begin)
        end = self._at if line_end < 0 else min(self._at, line_end)
        return Place(line=number + 1, column=begin - self._starts[number] + 1, width=max(1, end - begin))


def _decoded(quoted: str) -> str:
    name = tomllib.loads(f"name = {quoted}")["name"]
    return str(name)
