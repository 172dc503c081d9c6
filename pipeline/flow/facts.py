"""Facts: notes that one stage leaves for a later one, declared in `provides` and `needs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipeline.errors import StageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fact(Generic[T]):
    """The typed key of a fact. `hint` says which stage to add when the fact is missing."""

    name: str
    kind: type[T]
    hint: str = ""


class Facts:
    """The notes of one run. Written and read on the event loop."""

    def __init__(self) -> None:
        self._notes: dict[str, Any] = {}

    def put(self, fact: Fact[T], value: T) -> None:
        """Leave a note; a later value replaces an earlier one."""
        self._notes[fact.name] = value

    def get(self, fact: Fact[T]) -> T:
        """Read a note. Raises StageError when nobody left it (the wiring should have told)."""
        value = self.find(fact)
        if value is None:
            raise StageError(f"nobody provided the fact {fact.name}", hint=fact.hint)
        return value

    def find(self, fact: Fact[T]) -> T | None:
        """Read a note, None when it was not left."""
        value: T | None = self._notes.get(fact.name)
        return value
