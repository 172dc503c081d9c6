"""The words of a benchmark: a case compares two contenders on one disk and names goals.

A Ground is where one run happens; a contender turns it into an Attempt: the commands, and where its image will be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from perf.measure import Step

ImageFormat = Literal["raw", "qcow2", "vmdk", "vpc", "vhdx", "raw+lz4", "raw+zstd", "raw+gzip"]


class Store(Protocol):
    """A real S3 server on this machine, with one bucket that the run may fill."""

    @property
    def endpoint(self) -> str: ...
    @property
    def bucket(self) -> str: ...
    @property
    def client(self) -> str:
        """Path of the usual client's command, `aws`."""
        ...

    @property
    def environment(self) -> Mapping[str, str]:
        """Credentials and region, as the standard AWS variables."""
        ...

    def size(self, key: str) -> int: ...
    def fetch(self, key: str, path: Path) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Where one run happens. `folder` is empty, lies on the same filesystem as the disk, and is deleted afterwards."""

    disk: Path
    folder: Path
    product: tuple[str, ...]
    """The command that takes an export.toml."""
    store: Store | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """The image is a local file.

    Attributes:
        filesystem: it holds only what this filesystem, which fills the disk, uses: the disk's bytes can't be asked for.
        is_proven: False for a format that nothing here reads.
    """

    path: Path
    format: ImageFormat
    filesystem: str = ""
    is_proven: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """The image is an object in the store's bucket."""

    key: str
    format: ImageFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One run of a contender, ready to start."""

    steps: tuple[Step, ...]
    image: StoredFile | StoredObject | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    explained: str = ""
    """What the commands do not show: the stages of an export."""
    share: Path | None = None
    """Where a contender that times a part of itself writes that part's share of the run, a number from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What lies between the contender and the store.

    Attributes:
        latency_s: one way.
        bytes_per_s: each way; None is as fast as it goes.
        parts_per_s: the store answers 503 to every part above this rate; None takes all.
    """

    latency_s: float = 0.0
    bytes_per_s: float | None = None
    parts_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that can be measured. Those of one name on one disk run once a round, for all cases that name them."""

    name: str
    prepare: Callable[[Ground], Attempt]
    needs_store: bool = False
    memory_limit: int | None = None
    """Bytes that its peak memory may reach, for contenders that promise one."""
    line: Line | None = None
    """How it reaches the store; without one, at once."""


Figure = Literal["wall ratio", "cpu ratio", "size ratio", "read ratio", "peak memory", "step time", "share"]


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a figure of a case. The median of the rounds is held against it (for memory the largest).

    A step time is the median over the steps of an attempt, in seconds: for what is too short to be measured once.
    A share is what a contender measured inside of itself: for what is smaller than the difference of any two runs.
    """

    figure: Figure
    bound: float

    @property
    def is_floor(self) -> bool:
        """Time ratios are rival / ours: the larger the better. Sizes and memory are the other way round."""
        return self.figure in ("wall ratio", "cpu ratio")

    def text(self) -> str:
        values = {
            "peak memory": f"{self.bound / (1 << 20):.0f} MiB",
            "step time": f"{self.bound:g} s",
            "share": f"{self.bound:.0%}",
        }
        value = values.get(self.figure, f"{self.bound:g}x")
        return f"{'≥' if self.is_floor else '≤'} {value}"

    def is_reached(self, value: float) -> bool:
        return value >= self.bound if self.is_floor else value <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Ours against a rival on one disk. Without a rival only what ours uses is held against the goals."""

    name: str
    summary: str
    disk: str
    ours: Contender
    rival: Contender | None = None
    goals: tuple[Goal, ...] = ()
