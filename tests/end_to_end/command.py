"""Run the installed command line in a process of its own, and look at what it said and what it left.

The process gets a clean environment: no credentials, no proxies and no AWS files but those that a test gives it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.text import TextReceiveStream

PROGRAM = (str(Path(sys.executable).with_name("pipeline")),)
# The same program with short timeouts; the real ones are for the slow tests.
IMPATIENT = (sys.executable, "-m", "tests.end_to_end.impatient")
_ROOT = Path(__file__).parents[2]
# A dead store has to end a run within 120 s; everything else ends much sooner.
PATIENCE_S = 110.0


@dataclass(frozen=True, slots=True)
class Said:
    """What one call of the program said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        """stdout as JSON lines, each an object with a type."""
        told = [json.loads(line) for line in self.out.splitlines()]
        assert all(isinstance(one, dict) and one["type"] for one in told)
        return told

    def last(self, kind: str) -> dict[str, Any]:
        """The last JSON object of a type."""
        return [one for one in self.objects if one["type"] == kind][-1]

    def has(self, *words: str) -> bool:
        """Whether a person finds all these words on stderr, and no traceback among them."""
        missing = [word for word in words if word not in self.err]
        assert not missing, f"{missing} missing in:\n{self.err}"
        assert "Traceback" not in self.err, self.err
        assert "internal error" not in self.err, self.err
        return True


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the process sees."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "XDG_STATE_HOME") if name in os.environ}
    return {
        **kept,
        "HOME": "/nonexistent",
        "AWS_EC2_METADATA_DISABLED": "true",
        **(more or {}),
    }


def call(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    program: Sequence[str] = PROGRAM,
) -> Said:
    """Run it to its end while this thread waits: for what needs no proxy."""
    done = subprocess.run(
        [*program, *map(str, arguments)],
        env=environment(env),
        cwd=cwd or _ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


async def run(*arguments: object, env: Mapping[str, str] | None = None, program: Sequence[str] = PROGRAM) -> Said:
    """Run it to its end beside a proxy."""
    return await anyio.to_thread.run_sync(lambda: call(*arguments, env=env, program=program))


@dataclass(slots=True)
class Running:
    """The program while it runs with `--json`."""

    process: anyio.abc.Process
    told: list[dict[str, Any]] = field(default_factory=list)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens when it has ended."""
        try:
            self.process.send_signal(number)
        except ProcessLookupError:
            pass


@asynccontextmanager
async def running(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    on_object: Callable[[Running], None] = lambda program: None,
    program: Sequence[str] = PROGRAM,
) -> AsyncIterator[tuple[Running, Callable[[], Any]]]:
    """Start it with `--json`; `on_object` is called after each object that it tells.

    Gives the program, and what waits for its end and returns a Said.
    """
    process = await anyio.open_process(
        [*program, *map(str, arguments), "--json"], env=environment(env), stdin=subprocess.DEVNULL, cwd=_ROOT
    )
    started = Running(process)
    out: list[str] = []
    err: list[str] = []

    async def listen() -> None:
        assert process.stdout is not None
        lines = BufferedByteReceiveStream(process.stdout)
        while True:
            try:
                line = (await lines.receive_until(b"\n", 1 << 24)).decode()
            except anyio.IncompleteRead:
                return
            out.append(line + "\n")
            started.told.append(json.loads(line))
            on_object(started)

    async def complain() -> None:
        assert process.stderr is not None
        err.extend([text async for text in TextReceiveStream(process.stderr)])

    async def end() -> Said:
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listen)
                tasks.start_soon(complain)
            code = await process.wait()
        return Said(code, "".join(out), "".join(err))

    try:
        yield started, end
    finally:
        if process.returncode is None:
            process.kill()
        await process.aclose()
