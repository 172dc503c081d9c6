"""Reading a disk in use again and sending what changed, until nothing does: what `consistency = "live"` adds.

The first look takes a disk as it changes, so its image is of many moments. Each further look reads all of it once more,
compares the digests of its leaves with those of what was sent, and sends the leaves that differ. All of the bytes were
there before a look began and are seen again during it: where it finds nothing different, the image is the disk as it
was when the look began, unless something changed and changed back within that time.

It is a second run of the chain's source and function stages over the same windows. Encoders are not asked again: only
images that hold the disk byte for byte (`Layout.positional`) can take part, and only targets that can be rewritten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from pipeline.events import ChangesSent, Event, FallbackTaken, RereadProgressed
from pipeline.flow.buffers import Memory
from pipeline.flow.channels import Outlet
from pipeline.flow.facts import Fact
from pipeline.flow.items import Block, Content, Piece
from pipeline.flow.mapping import MapRecorder
from pipeline.flow.meter import StageMeter
from pipeline.flow.segment import Segment
from pipeline.flow.stage import Comparing, FunctionStage, Layout, RewritingWriter, Source

_PROGRESS_EVERY_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Reread:
    """What reading a disk in use again came to.

    Attributes:
        changed: guest bytes in leaves that were different, look by look; all of them were sent again.
        why_none: why there was no further look; empty where there was one.
    """

    changed: tuple[int, ...] = ()
    why_none: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether the last look found nothing different."""
        return bool(self.changed) and not self.changed[-1]

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "rereads": len(self.changed),
            "resent_bytes": sum(self.changed),
            "changed_bytes": list(self.changed),
            **({"not_read_again": self.why_none} if self.why_none else {}),
        }


REREAD: Fact[Reread] = Fact("reread", Reread)


def why_none(
    *, encoder: str, layout: Layout, behind: Sequence[str], functions: Sequence[object], writer: object, target: str
) -> str:
    """Why what changed can't be sent again in this chain; empty where it can.

    Args:
        encoder, target: names of the stages.
        behind: names of the stages between encoder and writer.
        writer, functions: the stages themselves.
    """
    if not layout.positional:
        return f"{encoder} can't replace what it has placed; encode.raw and a fixed VHD can"
    if behind:
        return f"{behind[0]} can't take back what went through it"
    if not isinstance(writer, RewritingWriter):
        return f"{target} can't replace what it has sent"
    if not any(isinstance(one, Comparing) for one in functions):
        return "there is nothing to compare with; add checksum.guest"
    return ""


class Rereading:
    """Looks at the disk again after the first pass, before encoder and function stages finish. Used once.

    Args:
        looks: at most so many.
        writer: as the chain has it.
        recorder: of the map; given that of each look that was whole.
        on_rewrite: called with the guest offset of the first byte that a look is about to replace; durable when it
            returns.
        meters: of source and function stages.
    """

    def __init__(
        self,
        *,
        looks: int,
        source: Source,
        functions: Sequence[FunctionStage[Any]],
        writer: RewritingWriter,
        recorder: MapRecorder,
        on_rewrite: Callable[[int], None],
        emit: Callable[[Event], None],
        meters: list[StageMeter],
        memory: Memory,
        disk_size: int,
        window: int,
        threads: anyio.CapacityLimiter,
        workers: int,
    ) -> None:
        self._looks = looks
        self._source = source
        self._functions = functions
        self._writer = writer
        self._recorder = recorder
        self._on_rewrite = on_rewrite
        self._emit = emit
        self._meters = meters
        self._memory = memory
        self._disk_size = disk_size
        self._window = window
        self._threads = threads
        self._workers = workers

    async def run(self, outlet: Outlet[Piece]) -> Reread:
        """Look until nothing is different, or often enough. Sends pieces of generation 1 and on.

        Raises:
            SourceError: the disk can't be read any more.
        """
        if not await self._writer.can_rewrite():
            reason = "the target does not let bytes be replaced"
            self._emit(FallbackTaken(stage="engine", what="the disk is not read again", reason=reason))
            return Reread(why_none=reason)
        changed: list[int] = []
        for number in range(1, self._looks + 1):
            changed.append(await self._look(number, outlet))
            self._emit(ChangesSent(number=number, changed_bytes=changed[-1]))
            if not changed[-1]:
                break
        else:
            self._emit(
                FallbackTaken(
                    stage="engine",
                    what="the image is of many moments",
                    reason=f"the disk still changed during look {self._looks}, the last one",
                )
            )
        return Reread(changed=tuple(changed))

    async def _look(self, number: int, outlet: Outlet[Piece]) -> int:
        """Read all of the disk and send what is different; returns how many guest bytes that were."""
        functions = [_Held(one) for one in self._functions]
        recorder = MapRecorder()
        sender = _Changes(number, functions, recorder, outlet, self._on_rewrite, self._tell)
        segment = Segment(
            source=self._source,
            functions=functions,
            encoder=None,
            meters=self._meters,
            memory=self._memory,
            disk_size=self._disk_size,
            window=self._window,
            threads=self._threads,
            workers=self._workers,
        )
        self._next_s = time.monotonic()
        await segment.run(None, sender)
        self._recorder.become(recorder)
        return sender.changed

    def _tell(self, number: int, done: int) -> None:
        if time.monotonic() >= self._next_s or done == self._disk_size:
            self._next_s = time.monotonic() + _PROGRESS_EVERY_S
            self._emit(RereadProgressed(number=number, done_bytes=done, total_bytes=self._disk_size))


class _Held:
    """A function stage in a further look: applied as ever, its notes held until the block is known."""

    def __init__(self, inner: FunctionStage[Any]) -> None:
        self._inner = inner
        self.apply = inner.apply
        self.confirm = inner.confirm
        self._note: Any = None

    def observe(self, note: Any) -> None:
        """Hold it."""
        self._note = note

    def compare(self, offset: int) -> tuple[range, ...]:
        """What is different in the block at guest `offset`, by the note that is held."""
        note, self._note = self._note, None
        return self._inner.compare(note, offset) if isinstance(self._inner, Comparing) else ()

    def finish(self) -> None:
        """Not yet: the stage finishes after the last look."""


class _Changes:
    """The outlet of a look: passes on what is different, and releases the rest."""

    def __init__(
        self,
        number: int,
        functions: Sequence[_Held],
        recorder: MapRecorder,
        outlet: Outlet[Piece],
        on_rewrite: Callable[[int], None],
        tell: Callable[[int, int], None],
    ) -> None:
        self._number = number
        self._functions = functions
        self._recorder = recorder
        self._outlet = outlet
        self._on_rewrite = on_rewrite
        self._tell = tell
        self.changed = 0

    async def send(self, item: Block) -> None:
        """The next block. Its slice is given back here."""
        try:
            self._recorder.observe(item)
            changed = sorted(
                {one for held in self._functions for one in held.compare(item.offset)}, key=lambda one: one.start
            )
            if changed and not self.changed:
                self._on_rewrite(changed[0].start)
            for part in _joined(changed):
                self.changed += len(part)
                for piece in _pieces(item, part, self._number):
                    await self._outlet.send(piece)
            self._tell(self._number, item.end)
        finally:
            item.release()


def _joined(parts: Sequence[range]) -> Iterator[range]:
    """Ascending ranges, those that touch joined."""
    held: range | None = None
    for one in parts:
        if held is not None and one.start <= held.stop:
            held = range(held.start, max(held.stop, one.stop))
            continue
        if held is not None:
            yield held
        held = one
    if held is not None:
        yield held


def _pieces(block: Block, part: range, generation: int) -> Iterator[Piece]:
    """The bytes of a part of the block, where the image has them: at the offset of the disk. The caller owns them."""
    for run in block.runs:
        start, stop = max(run.offset, part.start), min(run.end, part.stop)
        if start >= stop:
            continue
        holds = block.data is not None and run.content is Content.DATA
        data = block.data.share(start - block.offset, stop - block.offset) if block.data and holds else None
        yield Piece(start, stop - start, data, 0, generation)
