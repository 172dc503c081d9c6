"""Places of headers, keys and values."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.locate import Path, Place, locate, shown, syntax_fault

TEXT = '''\
# a comment with [a] = "header"
[export]
name = "web\\"01"   # "quoted" comment
memory="96 MiB"
note = """
[not.a.header]
key = 1
"""

[[stage]]
use = "read.disk"
partitions = [1, # one
  2, [3, "]"], ]
auth = { env = "KEY", "odd key" = 'it''s' }
limits.rate."per second" = 1979-05-27 07:32:00 # a date

[[stage]]
use = 'write.s3'
[stage.headers]
x = true
[[stage.more]]
y = 1
[[stage.more]]
y = 2
'''.replace("'it''s'", "'its'")


def test_every_kind_of_place_is_found() -> None:
    places = locate(TEXT)
    assert places.headers[("export",)] == Place(line=2, column=1, width=8)
    assert places.keys[("export", "name")] == Place(line=3, column=1, width=4)
    assert places.values[("export", "name")] == Place(line=3, column=8, width=9)
    assert places.values[("export", "memory")] == Place(line=4, column=8, width=8)
    assert places.values[("export", "note")] == Place(line=5, column=8, width=3)  # cut at the end of its first line
    assert places.headers[("stage", 0)] == Place(line=10, column=1, width=9)
    assert places.values[("stage", 0, "partitions", 0)] == Place(line=12, column=15, width=1)
    assert places.values[("stage", 0, "partitions", 2, 1)] == Place(line=13, column=10, width=3)
    assert places.values[("stage", 0, "auth", "odd key")] == Place(line=14, column=35, width=5)
    assert places.keys[("stage", 0, "limits", "rate", "per second")] == Place(line=15, column=13, width=12)
    assert places.values[("stage", 0, "limits", "rate", "per second")] == Place(line=15, column=28, width=19)
    assert places.values[("stage", 1, "use")] == Place(line=18, column=7, width=10)
    assert places.keys[("stage", 1, "headers", "x")] == Place(line=20, column=1, width=1)
    assert places.values[("stage", 1, "more", 1, "y")] == Place(line=24, column=5, width=1)


def test_stages_as_inline_tables_have_the_same_paths_as_stages_with_headers() -> None:
    places = locate('stage = [\n  {use = "read.disk"},\n  {use = "write.s3", a.b = 1},\n]\n')
    assert places.values[("stage", 1, "use")] == Place(line=3, column=10, width=10)
    assert places.keys[("stage", 1, "a", "b")] == Place(line=3, column=24, width=1)


def test_windows_line_ends_do_not_move_anything() -> None:
    assert locate(TEXT.replace("\n", "\r\n")).values == locate(TEXT).values


def test_what_has_no_place_is_told_at_what_it_stands_in() -> None:
    places = locate('[export]\nname = "a"\n')
    assert places.find(("export", "memory")) == Place(line=1, column=2, width=6)
    assert places.header(("export",)) == Place(line=1, column=1, width=8)
    assert places.find(("observe",)) is None


def test_shown_lines_keep_their_columns_and_cannot_drive_a_terminal() -> None:
    assert shown("\ta = \x1b[31m1\r") == " a =  [31m1"


@pytest.mark.parametrize(
    "text, line, column, hint",
    [
        ("[export]\nname = web01\n", 2, 8, 'a text stands in double quotes: key = "value"'),
        ("[export]\nname\n", 2, 5, "write key = value, one a line"),
        ('[export]\n  name = "a"\n  name = "b"\n', 3, 3, "this option is there twice: remove one"),
        ("[export]\na = 1\n[export] # again\nb = 2\n", 3, 1, "this section is there twice: join the two"),
        ('name = "web01\n', 1, 14, "the closing quote is missing"),
        ("name = [1, 2\n\n", 1, 13, "the closing ] is missing"),
        ('path = "C:\\disks"\n', 1, 11, "write two backslashes, or put the text in single quotes"),
    ],
)
def test_syntax_errors_have_a_place_and_a_way_out(text: str, line: int, column: int, hint: str) -> None:
    with pytest.raises(tomllib.TOMLDecodeError) as raised:
        tomllib.loads(text)
    fault = syntax_fault(raised.value, text, "export.toml")
    assert (fault.line, fault.column, fault.hint) == (line, column, hint)
    assert fault.text == text.split("\n")[line - 1]


# Random documents: written from random values, in random notation, then found again.

_NAMES = st.one_of(
    st.sampled_from(["a", "b", "use", "path", "a-b", "1979", "true"]),
    st.text("ab.\"'#=[]{} \\\tä", max_size=4),
)
_SCALARS = st.one_of(
    st.sampled_from(["1", "-0.5", "true", "inf", "1979-05-27", "1979-05-27 07:32:00", "07:32:00", "0xff", "1_000"]),
    st.sampled_from(['""', "''", '"a # b"', "'[x] = 1'", '"\\""', "'\\'", '"""a"""""', "'''\n[a]\nb = 1\n'''"]),
    st.sampled_from(['"""\\""" # x"""', '"""\nx = "1"\n\n"""', "'''it''s'''''", '"\\\\"', '"]}"']),
)
_GAPS = st.sampled_from(["", " ", "\t "])
_LINES = st.sampled_from(["\n", " # ] } \" '''\n", "\n\n", "\n  "])


def _key(name: str, quoted: bool) -> str:
    bare = name != "" and all(char.isascii() and (char.isalnum() or char in "-_") for char in name)
    if bare and not quoted:
        return name
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"').replace("\t", "\\t") + '"'


@st.composite
def _values(draw: st.DrawFn, depth: int = 2) -> str:
    kind = draw(st.sampled_from(["scalar", "array", "table"])) if depth else "scalar"
    if kind == "scalar":
        return draw(_SCALARS)
    if kind == "array":
        items = draw(st.lists(_values(depth - 1), max_size=3))
        gaps = [draw(st.one_of(_GAPS, _LINES)) for _ in range(2 * len(items) + 1)]
        body = "".join(f"{gaps[2 * number]}{item}{gaps[2 * number + 1]}," for number, item in enumerate(items))
        return f"[{body}{gaps[-1]}]"
    pairs = draw(st.dictionaries(_NAMES, _values(depth - 1), max_size=3))
    gap = draw(_GAPS)
    quoted = draw(st.booleans())
    return "{" + ",".join(f"{gap}{_key(name, quoted)}{gap}={gap}{value}{gap}" for name, value in pairs.items()) + "}"


@st.composite
def _documents(draw: st.DrawFn) -> str:
    def body() -> list[str]:
        pairs = draw(st.dictionaries(st.lists(_NAMES, min_size=1, max_size=3).map(tuple), _values(), max_size=3))
        lines = []
        for names, value in pairs.items():
            key = draw(st.sampled_from([".", " . "])).join(_key(name, draw(st.booleans())) for name in names)
            lines.append(f"{draw(_GAPS)}{key}{draw(_GAPS)}={draw(_GAPS)}{value}{draw(_LINES)}")
        return lines

    lines = body()
    for _ in range(draw(st.integers(0, 4))):
        names = draw(st.lists(_NAMES, min_size=1, max_size=2))
        opening, closing = draw(st.sampled_from(["[]", ("[[", "]]")]))
        gap = draw(_GAPS)
        header = ".".join(f"{gap}{_key(name, draw(st.booleans()))}{gap}" for name in names)
        lines += [f"{opening}{header}{closing}{draw(_LINES)}", *body()]
    return "".join(lines)


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every key of a document, and every index of its arrays."""
    if path:
        yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _paths(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _paths(inner, (*path, index))


@settings(max_examples=120, deadline=None)
@given(_documents())
def test_every_key_that_tomllib_finds_is_located_where_it_is_written(text: str) -> None:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:  # the same key twice, a table over a value
        fault = syntax_fault(error, text, "x")
        assert 1 <= fault.line <= text.count("\n") + 1
        return
    places = locate(text)
    lines = text.split("\n")
    for path in _paths(document):
        name = path[-1]
        if isinstance(name, str):
            place = places.keys[path]
            written = lines[place.line - 1][place.column - 1 : place.column - 1 + place.width]
            assert tomllib.loads(f"{written} = 0") == {name: 0}
        else:
            assert path in places.values or path in places.headers
    assert set(places.keys) | set(places.values) | set(places.headers) == set(_paths(document))


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), _values(), min_size=1))
def test_every_value_is_located_with_its_whole_first_line(pairs: dict[str, str]) -> None:
    text = "".join(f"{name} = {value} # end\n" for name, value in pairs.items())
    places = locate(text)
    for name, value in pairs.items():
        place = places.values[(name,)]
        line = text.split("\n")[place.line - 1]
        assert line[place.column - 1 : place.column - 1 + place.width] == value.split("\n")[0]
