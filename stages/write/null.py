"""Throw the image away: what the stages before a store can do at most. For measuring."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from pipeline.errors import StageError
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Piece, RangeReader, StoredImage
from pipeline.flow.orders import SPARSE_SINK, Order
from pipeline.flow.stage import NOTHING, SinkPlan, SinkRequest, StageContext, StageSpec, pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """write.null has no options."""


class NullWriter:
    """Acknowledges every piece at once and keeps nothing."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._context = context

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """Anything fits."""
        return SinkPlan()

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
        """Release every piece."""
        size = 0
        async for piece in inlet:
            size = max(size, piece.end)
            piece.release()
            self._context.progress.acknowledge(guest_bytes=piece.guest_bytes, image_bytes=piece.length)
        await outlet.send(StoredImage("null:", size, _Refusal))

    async def can_rewrite(self) -> bool:
        """There is nothing that could stand in the way."""
        return True

    async def publish(self, manifest: bytes) -> str:
        """Nothing is kept."""
        return "null:"

    async def withdraw(self) -> None:
        """Nothing to remove."""

    async def close(self) -> None:
        """Nothing is open."""


class _Refusal(AbstractAsyncContextManager[RangeReader]):
    """Nothing was kept; the wiring refuses verify.* behind this stage."""

    async def __aenter__(self) -> RangeReader:
        raise StageError("write.null keeps nothing that could be read")

    async def __aexit__(self, *error: object) -> None:
        return None


SPEC = StageSpec(
    name="write.null",
    summary="Throw the image away, for measuring what comes before it.",
    options=Options,
    takes=pieces(Order.SPARSE, Order.RANDOM, Order.HEAD_LAST, Order.SEQUENTIAL),
    gives=NOTHING,
    build=NullWriter,
    sink=SPARSE_SINK,
)
