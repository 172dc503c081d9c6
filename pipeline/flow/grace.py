"""Let a call that must not be cut in the middle come to its end, within a bound."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import anyio

T = TypeVar("T")


class _Outcome(Generic[T]):
    def __init__(self) -> None:
        self.done = anyio.Event()
        self.value: list[T] = []
        self.error: Exception | None = None


async def with_grace(call: Callable[[], Awaitable[T]], grace_s: float) -> T:
    """Await `call()`; when cancelled meanwhile, give it `grace_s` more to come to its end.

    For requests whose fate has to be known (an upload that was opened, an object that became visible): cancelling one
    closes the connection, and whether the store did it is a guess from then on.

    Cancellation: passes on after the grace; `call` has then run to its end, or was cancelled itself, and an error of
        its is dropped.
    """
    outcome: _Outcome[T] = _Outcome()
    scope = anyio.CancelScope(shield=True)

    async def run() -> None:
        try:
            with scope:
                outcome.value.append(await call())
        except Exception as error:
            outcome.error = error
        finally:
            outcome.done.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        try:
            await outcome.done.wait()
        except BaseException:
            scope.deadline = anyio.current_time() + grace_s
            raise
    if outcome.error is not None:
        raise outcome.error
    return outcome.value[0]
