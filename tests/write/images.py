"""Images in pieces, and a writer's surroundings without an engine."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel

from pipeline.errors import SourceError
from pipeline.events import Event
from pipeline.flow.buffers import Ledger, charged_slice, loose_slice
from pipeline.flow.facts import Facts
from pipeline.flow.items import Piece, StoredImage
from pipeline.flow.meter import StageMeter
from pipeline.flow.orders import Order
from pipeline.flow.stage import Layout, Progress, Replay, StageContext
from pipeline.units import KiB, MiB


class QuickClock:
    """A clock that never waits: sleeping moves it on."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.slept: list[float] = []

    def now(self) -> float:
        """Seconds."""
        return self.time

    async def sleep(self, seconds: float) -> None:
        """Be there at once."""
        self.slept.append(seconds)
        self.time += seconds
        await anyio.lowlevel.checkpoint()


class PatientClock(QuickClock):
    """A clock for a server that is away: whoever sleeps is woken when it is back.

    Attributes:
        sleeps: set when somebody sleeps.
        back: to be set when the server is there again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sleeps = anyio.Event()
        self.back = anyio.Event()

    async def sleep(self, seconds: float) -> None:
        """Be there when the server is."""
        self.sleeps.set()
        await self.back.wait()
        await super().sleep(seconds)


@dataclass
class Image:
    """An image and how it is cut: (length, is data) from the start of the body, and a head that comes last."""

    body: list[tuple[int, bool]]
    head_length: int = 0
    seed: int = 7
    data: bytes = field(init=False)

    def __post_init__(self) -> None:
        noise = random.Random(self.seed)
        parts = [noise.randbytes(self.head_length)]
        parts += [noise.randbytes(length) if is_data else bytes(length) for length, is_data in self.body]
        self.data = b"".join(parts)

    @property
    def size(self) -> int:
        """Image bytes."""
        return len(self.data)

    @property
    def guest_bytes(self) -> int:
        """Every body piece accounts for twice its length, the head for nothing."""
        return 2 * (self.size - self.head_length)

    async def pieces(self, ledger: Ledger | None = None) -> AsyncIterator[Piece]:
        """In delivery order. With a ledger, each piece of data is charged to it and waits for room there."""
        offset = self.head_length
        for length, is_data in self.body:
            yield await self._piece(offset, length, is_data, 2 * length, ledger)
            offset += length
        half = self.head_length // 2
        for start, end in ((0, half), (half, self.head_length)):
            if end > start:
                yield await self._piece(start, end - start, True, 0, None)

    async def _piece(self, offset: int, length: int, is_data: bool, guest: int, ledger: Ledger | None) -> Piece:
        if not is_data:
            return Piece(offset, length, None, guest)
        view = memoryview(self.data)[offset : offset + length]
        if ledger is None:
            return Piece(offset, length, loose_slice(view), guest)
        charge = await ledger.charge(length)
        return Piece(offset, length, charged_slice(bytes(view), charge), guest)

    def layout(self, **changes: object) -> Layout:
        """As an encoder would tell."""
        given: dict[str, object] = {
            "format": "test",
            "virtual_size": self.guest_bytes,
            "head_length": self.head_length,
            "image_bytes_max": self.size,
            **changes,
        }
        return Layout(**given)  # type: ignore[arg-type]  # the types are those of Layout's fields


def mixed(total: int, *, head_length: int = 0, seed: int = 7, zeros: bool = True) -> Image:
    """A body of `total` bytes in uneven pieces, some of them zero."""
    chance = random.Random(seed)
    body: list[tuple[int, bool]] = []
    left = total
    while left:
        length = min(left, chance.choice([64 * KiB, 200_001, MiB, 2 * MiB, 3 * MiB + 17]))
        body.append((length, not zeros or chance.random() > 0.3))
        left -= length
    return Image(body, head_length, seed)


class ImageReplay:
    """Makes image bytes again from a copy of the image; from another image, when the disk has changed."""

    def __init__(self, data: bytes, *, step: int = 300_000, boundaries: Sequence[int] = ()) -> None:
        self.data = data
        self.step = step
        self.boundaries = boundaries
        self.asked: list[tuple[int, int]] = []
        self.forgotten = 0
        self.fails = False

    async def pieces(self, start: int, end: int) -> AsyncIterator[Piece]:
        """As the Replay protocol says."""
        assert start in self.boundaries
        assert start >= self.forgotten
        self.asked.append((start, end))
        for offset in range(start, end, self.step):
            await anyio.lowlevel.checkpoint()
            if self.fails:
                raise SourceError("the source is gone", operation="read", offset=offset)
            stop = min(offset + self.step, end)
            yield Piece(offset, stop - offset, loose_slice(self.data[offset:stop]), 0)

    def forget(self, below: int) -> None:
        """As the Replay protocol says."""
        self.forgotten = below


class Collected:
    """An outlet that keeps what it is sent."""

    def __init__(self) -> None:
        self.images: list[StoredImage] = []

    async def send(self, item: StoredImage) -> None:
        """Keep it."""
        self.images.append(item)


def make_context(
    image: Image,
    *,
    events: list[Event] | None = None,
    clock: QuickClock | None = None,
    disk_size: int | None = None,
    replay: Replay | None = None,
) -> StageContext:
    """A context for storing `image`, as the engine would make it."""
    seen = events if events is not None else []
    return StageContext(
        name="write.test",
        emit=seen.append,
        facts=Facts(),
        progress=Progress(),
        meter=StageMeter("write.test"),
        ledger=Ledger(64 * MiB),
        threads=anyio.CapacityLimiter(4),
        workers=2,
        clock=clock or QuickClock(),
        disk_size=image.guest_bytes if disk_size is None else disk_size,
        window=MiB,
        order=Order.HEAD_LAST if image.head_length else Order.SEQUENTIAL,
        layout=image.layout(),
        replay=replay,
    )
