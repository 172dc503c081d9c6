"""Measure commands: wall time, processor time and peak memory, each time on a cold page cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perf import stopwatch

Command = tuple[str, ...]

# Long enough for the slowest rival on the largest disk of a slow machine; what takes longer hangs.
DEADLINE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Step:
    """Commands that run together, the output of each going into the next, as with `|` in a shell."""

    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a contender used from the start of its first process to the end of its last. Memory is in bytes."""

    wall_s: float
    steps_s: tuple[float, ...]
    """Wall time of each step."""
    user_s: float
    system_s: float
    peak_rss: int
    """Of the largest single process."""
    smallest_rss: int
    """The least that `peak_rss` can show here: what the stopwatch itself held."""
    caches_dropped: bool
    load: float
    """Runnable processes in the last minute before the start."""
    read_bytes: int = 0
    """From disks, for programs and libraries too unless those were in the page cache; 0 where the disk is in memory."""

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


class CommandFailed(Exception):
    """A command did not exit with 0. The message holds the end of what it said."""


def one(*command: str) -> Step:
    """Make a step of a single command."""
    return Step((command,))


def measure(
    steps: tuple[Step, ...],
    *,
    environment: Mapping[str, str],
    folder: Path,
    log: Path,
    cold: bool = True,
    forgotten: Path | None = None,
) -> Usage:
    """Run the steps one after the other and add up what they used.

    Args:
        environment: set on top of this process's own.
        folder: the commands' working directory.
        log: takes what they print, except what a pipe carries.
        cold: empty the page cache before the first.
        forgotten: take at least this file out of it.
    Raises:
        CommandFailed: with the last lines of the log.
    """
    orders = stopwatch.Orders(
        steps=[[list(command) for command in step.commands] for step in steps],
        environment={**os.environ, **environment},
        folder=str(folder),
        log=str(log),
        cold=cold,
        forgotten=str(forgotten) if forgotten else None,
        deadline_s=DEADLINE_S,
    )
    program = [sys.executable, "-I", "-S", stopwatch.__file__]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate(json.dumps(orders))
        except BaseException:
            process.terminate()  # not kill: it ends its commands first
            raise
    if process.returncode != 0:
        raise RuntimeError(f"the stopwatch ended with {process.returncode}")
    answer: stopwatch.Answer = json.loads(output)
    if answer["failed"] is not None:
        code, command = answer["failed"]
        raise CommandFailed(f"exit {code}: {' '.join(command)}\n{_last_lines(log)}")
    return Usage(
        wall_s=answer["wall_s"],
        steps_s=tuple(answer["steps_s"]),
        user_s=answer["user_s"],
        system_s=answer["system_s"],
        peak_rss=answer["peak_rss"],
        smallest_rss=answer["smallest_rss"],
        caches_dropped=answer["caches_dropped"],
        load=answer["load"],
        read_bytes=answer["read_bytes"],
    )


def _last_lines(log: Path, count: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
