"""Where the identifiers and times inside an image come from.

An image with random identifiers differs from the next one of the same disk. So by default they follow from the export's
name and the disk's size; who wants fresh ones sets `reproducible = false`.
"""

from __future__ import annotations

import secrets
import time
import uuid
from dataclasses import dataclass

from pipeline.flow.stage import StageContext

# The name space of our own identifiers; any other number would serve, and give other identifiers.
_NAME_SPACE = uuid.UUID("6f3c1c52-8d0e-4a39-9a54-5b0f2f6b7a11")

REPRODUCIBLE_DOC = (
    "Derive identifiers and times inside the image from the export's name and the disk's size; false draws fresh ones."
)


@dataclass(frozen=True, slots=True)
class Birth:
    """What tells one image from another.

    Attributes:
        seed: all identifiers follow from it.
        time: seconds since 1970; 0 for an image that does not tell when it was made.
        is_fresh: whether it was drawn, not derived.
    """

    seed: str
    time: int = 0
    is_fresh: bool = False

    @classmethod
    def of(cls, reproducible: bool, context: StageContext) -> Birth:
        """Derived from the export, or drawn."""
        if reproducible:
            return cls(f"{context.disk_size} {context.export_name}")
        return cls(secrets.token_hex(16), int(time.time()), is_fresh=True)

    @property
    def shape(self) -> str:
        """What an encoder's identity says of it: a fresh one travels in the checkpoint instead."""
        return "fresh" if self.is_fresh else self.seed

    def uuid(self, what: str) -> uuid.UUID:
        """The identifier of `what`."""
        return uuid.uuid5(_NAME_SPACE, f"{what} {self.seed}")

    def number(self, what: str) -> int:
        """32 bits for `what`."""
        return int.from_bytes(self.uuid(what).bytes[:4], "big")

    def dump(self) -> dict[str, str | int]:
        """For a checkpoint."""
        return {"seed": self.seed, "time": self.time}

    def load(self, note: dict[str, str | int]) -> Birth:
        """The birth that a checkpoint tells of, of the same kind as this one."""
        return Birth(str(note["seed"]), int(note["time"]), self.is_fresh)
