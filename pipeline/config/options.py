"""Typed options: how a stage declares them, and how TOML values become them."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from pipeline.units import Duration, Size, format_size, parse_duration, parse_size

_REQUIRED = object()


class Secret:
    """A value that is never shown: `repr`, `str` and serialisation mask it. Written `{ env = "NAME" }` in TOML."""

    __slots__ = ("_value", "name")

    def __init__(self, name: str, value: str) -> None:
        self.name = name
        self._value = value

    def reveal(self) -> str:
        """The value, for the one call that needs it."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret(env={self.name!r})"

    __str__ = __repr__


def without_secrets(text: str) -> str:
    """A URL without its password and without the values of its query, which may be a signature; other texts as is."""
    if "://" not in text:
        return text
    text = re.sub(r"(://[^/?#@:\s]*):[^/?#\s]*@", r"\1:***@", text)
    head, mark, query = text.partition("?")
    return head + mark + re.sub(r"=[^&#\s]*", "=***", query)


def option(
    default: Any = _REQUIRED, *, doc: str, example: str = "", may_change: bool = False, minimum: int | None = None
) -> Any:
    """Declare one option of a stage as a dataclass field.

    Args:
        default: the value when the TOML says nothing; leave it out for a required option.
        doc: one sentence for `pipeline stages` and docs/stages.md, in the reader's words.
        example: a TOML value to show for a required option.
        may_change: it shapes neither the image nor where it goes, so that a resumed run may have another value.
        minimum: the least number or size that makes sense; less is a fault of the file.
    """
    metadata = {"doc": doc, "example": example, "may_change": may_change, "minimum": minimum}
    if default is _REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class BelowMinimumError(ValueError):
    """The value has the right type, and is less than makes sense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionField:
    """One option as the help, the schema and the converter see it."""

    name: str
    kind: Any
    required: bool
    default: Any
    doc: str
    example: str
    may_change: bool = False
    minimum: int | None = None

    @property
    def least(self) -> str:
        """The minimum as people write it; empty where there is none."""
        if self.minimum is None:
            return ""
        return format_size(self.minimum) if Size in _alternatives(self.kind) else str(self.minimum)

    def read(self, value: object) -> Any:
        """A TOML value as this option has it. Raises ValueError as `convert` does; BelowMinimumError."""
        found = convert(value, self.kind)
        if self.minimum is not None and found < self.minimum:
            raise BelowMinimumError(f"at least {self.least} is wanted, not {_name(value)}")
        return found

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal option, else nothing."""
        return tuple(
            str(choice)
            for part in _alternatives(self.kind)
            if typing.get_origin(part) is Literal
            for choice in typing.get_args(part)
        )


def option_fields(options: type) -> Iterator[OptionField]:
    """The declared options of a dataclass, in order."""
    kinds = typing.get_type_hints(options)
    for item in dataclasses.fields(options):
        yield OptionField(
            name=item.name,
            kind=kinds[item.name],
            required=item.default is dataclasses.MISSING,
            default=None if item.default is dataclasses.MISSING else item.default,
            doc=item.metadata.get("doc", ""),
            example=item.metadata.get("example", ""),
            may_change=item.metadata.get("may_change", False),
            minimum=item.metadata.get("minimum"),
        )


def convert(value: object, kind: Any) -> Any:
    """Turn a TOML value into `kind`.

    Raises:
        ValueError: with the reason, and the way out where there is one.
    """
    reasons = []
    for part in _alternatives(kind):
        try:
            return _convert_one(value, part)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0] if len(reasons) == 1 else " or ".join(dict.fromkeys(reasons)))


def _alternatives(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (Union, types.UnionType):
        return tuple(part for part in typing.get_args(kind) if part is not type(None))
    return (kind,)


def _convert_one(value: object, kind: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value in choices and type(value) in {type(choice) for choice in choices}:
            return value
        raise ValueError(f"{_show(value)} is not one of {', '.join(_show(choice) for choice in choices)}")
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise ValueError(f"a list is wanted, not {_name(value)}")
        inner = typing.get_args(kind)[0]
        return origin(convert(item, inner) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"a table is wanted, not {_name(value)}")
        inner = typing.get_args(kind)[1]
        return {str(key): convert(item, inner) for key, item in value.items()}
    if kind is Size:
        if isinstance(value, str):
            return parse_size(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return Size(value)
        raise ValueError(f'a size such as "4 MiB" is wanted, not {_name(value)}')
    if kind is Duration:
        if isinstance(value, str):
            return parse_duration(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
            return Duration(value)
        raise ValueError(f'a duration such as "30 s" is wanted, not {_name(value)}')
    if kind is Secret:
        if isinstance(value, dict) and set(value) == {"env"} and isinstance(value["env"], str):
            found = os.environ.get(value["env"])
            if found is None:
                raise ValueError(f"the environment variable {value['env']} is not set")
            return Secret(value["env"], found)
        raise ValueError('a secret is written { env = "NAME" }, never as text in the file')
    if isinstance(value, str) and "\0" in value:
        raise ValueError("a NUL character can't be part of it")  # no path, argument or header can hold one
    if kind is Path:
        if isinstance(value, str) and value:
            return Path(value)
        raise ValueError(f"a path is wanted, not {_name(value) if value != '' else 'an empty text'}")
    if kind is bool or kind is str or kind is int:
        if type(value) is kind:
            return value
        raise ValueError(f"{_WANTED[kind]} is wanted, not {_name(value)}")
    if kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise ValueError(f"a number is wanted, not {_name(value)}")
    raise TypeError(f"options can't be of type {kind}")


_WANTED = {bool: "true or false", str: "a text", int: "a whole number"}


def _show(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value).lower() if isinstance(value, bool) else repr(value)


def _name(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'the text "{value}"'
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a table"
    return f"{type(value).__name__}"
