"""What can go wrong between a client and a store, as values: a rule says which requests a fault meets.

FaultProxy(server.port, rules=[
    Rule(slow_down(), method="PUT", query="partNumber=", when=First(2)),
    Rule(ResetRequest(after_bytes=1 << 20), query="partNumber=3&", when=Nth(1)),
    Rule(LoseReply(), method="POST", query="^uploadId="),
])
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from xml.sax.saxutils import escape


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Answer in the server's place; the request never reaches it.

    Attributes:
        when: `head` answers before the body is read and closes the connection, as a loaded S3 does; `body` reads the
            body, throws it away, answers, and keeps the connection.
    """

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    when: Literal["head", "body"] = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetRequest:
    """Reset the connection when this many bytes of the request's body were passed on, or all of it.

    With 0 not even the head is passed on.
    """

    after_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StallRequest:
    """Take no more of the request's body after this many bytes, until `FaultProxy.release`."""

    after_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Be silent until `FaultProxy.release`, and then go on.

    Attributes:
        at: `head`: nothing is passed on, no body is read. `reply`: the server has the request and has answered, the
            client waits.
    """

    at: Literal["head", "reply"] = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoseReply:
    """Pass the request on, take the server's whole reply, and reset the client's connection instead of giving it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetReply:
    """Reset the connection when the client has the head and this many bytes of the reply's body."""

    after_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncateReply:
    """Close the connection in an orderly way after this many bytes of the reply's body, though its length says more."""

    after_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipReply:
    """Change one byte of the reply's body: bad memory or a bad disk on the store's side."""

    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipRequest:
    """Change one byte of the request's body: a store that checks must refuse it, one that does not stores it."""

    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay:
    """Hold the reply for this long after the server gave it."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitRate:
    """Take the request's body no faster than this. For a whole network use `link.Link`."""

    bytes_per_s: float


Fault = (
    Reply
    | ResetRequest
    | StallRequest
    | Stall
    | LoseReply
    | ResetReply
    | TruncateReply
    | FlipReply
    | FlipRequest
    | Delay
    | LimitRate
)


def error_reply(status: int, code: str, *, when: Literal["head", "body"] = "body", message: str = "injected") -> Reply:
    """An S3 error: `error_reply(400, "BadDigest")`, `error_reply(403, "AccessDenied")`."""
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{escape(code)}</Code><Message>{escape(message)}</Message><RequestId>fault-proxy</RequestId></Error>"
    )
    return Reply(status=status, body=text.encode(), headers={"Content-Type": "application/xml"}, when=when)


def slow_down(*, when: Literal["head", "body"] = "head") -> Reply:
    """503 SlowDown, by which S3 asks for fewer requests."""
    return error_reply(503, "SlowDown", when=when, message="Please reduce your request rate.")


@dataclass(frozen=True, slots=True)
class Nth:
    """Only the number-th request that the rule matches, from 1."""

    number: int


@dataclass(frozen=True, slots=True)
class First:
    """The first few requests that the rule matches."""

    count: int


@dataclass(frozen=True, slots=True)
class Chance:
    """Each request that the rule matches with this probability; the same seed picks the same ones."""

    probability: float
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Every:
    """Each request that the rule matches."""


@dataclass(frozen=True, slots=True)
class AboveRate:
    """Each request that the rule matches above a rate, as a busy store refuses them; `burst` may come at once."""

    requests_per_s: float
    burst: float = 1.0


@dataclass(frozen=True, slots=True)
class Rule:
    """A fault and the requests that it meets.

    Attributes:
        method: in capitals; None is any.
        path: a pattern searched for in the path as it was sent (quoted), without the query.
        query: a pattern searched for in the query as it was sent; `^$` is a request without one.
    """

    fault: Fault
    method: str | None = None
    path: str = ""
    query: str = ""
    when: Every | Nth | First | Chance | AboveRate = Every()


class ArmedRule:
    """A rule at work: counts the requests that it matches.

    It counts every request that it matches, also one that an earlier rule takes, so that numbers mean requests as the
    client sends them.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._matched = 0
        self._room = rule.when.burst if isinstance(rule.when, AboveRate) else 0.0
        self._room_at = time.monotonic()
        self._random = random.Random(rule.when.seed if isinstance(rule.when, Chance) else 0)

    def fires(self, method: str, path: str, query: str) -> bool:
        """Look at one request: is it for this rule's fault?"""
        rule = self.rule
        if rule.method not in (None, method) or not re.search(rule.path, path) or not re.search(rule.query, query):
            return False
        self._matched += 1
        match rule.when:
            case Nth(number):
                return self._matched == number
            case First(count):
                return self._matched <= count
            case Chance(probability):
                return self._random.random() < probability
            case AboveRate():
                return self._is_above(rule.when)
            case Every():
                return True

    def _is_above(self, rate: AboveRate) -> bool:
        now = time.monotonic()
        self._room = min(rate.burst, self._room + (now - self._room_at) * rate.requests_per_s)
        self._room_at = now
        if self._room < 1:
            return True
        self._room -= 1
        return False
