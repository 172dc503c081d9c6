"""Try a call again when the store failed for a moment, within one budget of attempts and time.

tenacity counts and decides; the waiting goes through the run's Clock, so that tests need not wait.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from pipeline.errors import StoreError
from pipeline.events import Event, RetryScheduled
from pipeline.flow.stage import Clock

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often, how long and how patiently.

    Attributes:
        attempts: calls in all, the first one included. One that a busy store refused (503 SlowDown) does not count:
            it was answered, and the whole run goes slower from then on.
        deadline_s: no attempt begins later than this after the last sign of life of the store. A silent store takes
            30 s to be found out by the last attempt and 15 s by the clean-up: 70 s end a run within 120 s. For
            refusals of a busy store it counts from the last call that any part of the run got through.
        first_wait_s: the wait after the first failure is at most this; it doubles with every further one.
        longest_wait_s: ... up to this, unless the store asks for more.
    """

    attempts: int = 6
    deadline_s: float = 70.0
    first_wait_s: float = 0.5
    longest_wait_s: float = 20.0


# What cleaning up may cost: few attempts, since it runs while somebody waits for the program to end.
CLEANUP = RetryPolicy(attempts=3, deadline_s=12.0, first_wait_s=0.25, longest_wait_s=1.0)


class Retry:
    """Makes calls to one store; what any of them learns of the store's health serves all.

    Only a StoreError that says `temporary` is tried again; everything else passes at once. Waits are drawn evenly
    between zero and a bound that doubles, so that many clients do not come back together; a `retry_after_s` of the
    store is a lower bound for the wait, and 0 (a lost connection) means that the first retry need not wait at all.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        clock: Clock,
        emit: Callable[[Event], None],
        stage: str,
        chance: random.Random | None = None,
    ) -> None:
        self.policy = policy
        self._clock = clock
        self._emit = emit
        self._stage = stage
        self._chance = chance or random.Random()
        self._alive_at = float("-inf")
        self._done_at = float("-inf")

    def alive(self) -> None:
        """The store gave a sign of life: an answer, or it took many bytes. Deadlines count from here."""
        self._alive_at = self._clock.now()

    async def call(self, operation: str, attempt: Callable[[], Awaitable[T]], policy: RetryPolicy | None = None) -> T:
        """Await `attempt()` until it works.

        Args:
            operation: the verb for events and messages.
            policy: instead of the usual one, for this call.
        Raises:
            StoreError: the last failure, when it is permanent or the budget is spent.
        """
        budget = policy or self.policy
        begun = self._clock.now()
        refusals: list[float] = []  # when a busy store refused this call

        def wait(state: RetryCallState) -> float:
            bound = min(budget.longest_wait_s, budget.first_wait_s * 2 ** (state.attempt_number - 1))
            asked = _failure(state).retry_after_s
            if asked == 0 and state.attempt_number == 1:
                return 0.0
            return max(asked or 0.0, round(self._chance.uniform(0, bound), 3))  # people read it

        def spent(state: RetryCallState) -> bool:
            if _failure(state).throttled:
                refusals.append(self._clock.now())
                ends = max(refusals[0], self._done_at) + budget.deadline_s
            elif state.attempt_number - len(refusals) >= budget.attempts:
                return True
            else:
                ends = max(begun, self._alive_at) + budget.deadline_s
            return self._clock.now() + state.upcoming_sleep > ends

        def tell(state: RetryCallState) -> None:
            self._emit(
                RetryScheduled(
                    stage=self._stage,
                    operation=operation,
                    attempt=state.attempt_number + 1,
                    wait_s=state.upcoming_sleep,
                    reason=str(_failure(state)),
                )
            )

        async def once() -> T:  # tenacity awaits only what it can see to be a coroutine function
            return await attempt()

        retrying = AsyncRetrying(
            sleep=self._clock.sleep,
            wait=wait,
            stop=spent,
            retry=retry_if_exception(is_temporary),
            before_sleep=tell,
            reraise=True,
        )
        result: T = await retrying(once)
        self.alive()
        self._done_at = self._clock.now()
        return result


def is_temporary(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    return isinstance(error, StoreError) and error.temporary


def _failure(state: RetryCallState) -> StoreError:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, StoreError)  # only those are tried again
    return error
