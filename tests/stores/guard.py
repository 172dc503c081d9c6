"""Run server processes for an owner, and leave none behind whatever happens to the owner.

A guard is started as `python -I -S guard.py` with its orders as JSON on standard input (`process.py` writes them). It
starts the commands, answers with their identities on standard output, and then only waits:

- the owner ends, however it ends: every server is killed;
- SIGTERM: every server is asked to stop, and killed when the bound is over;
- one server ends by itself, or somebody killed it: the others are killed, a set with a missing member is of no use;
- the guard itself is killed: the kernel kills the servers (PR_SET_PDEATHSIG).

It is a process and not a thread of the owner, because PR_SET_PDEATHSIG is bound to the *thread* that started the child:
a server started from a worker thread would die with that thread.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypedDict

PR_SET_PDEATHSIG = 1


class CommandOrder(TypedDict):
    """One server to start."""

    arguments: list[str]
    environment: dict[str, str]
    log: str


class Orders(TypedDict):
    """What a guard is told on standard input; `owner` is a pid and its start time."""

    owner: tuple[int, int]
    folder: str
    commands: list[CommandOrder]
    leftovers: list[str]
    stop_deadline_s: float


def read_stat(pid: int) -> tuple[bytes, int] | None:
    """The state of a process, and when it was started in clock ticks since boot; None where there is none.

    Source: proc(5), /proc/PID/stat, fields 3 (state) and 22 (starttime). The name in field 2 may hold spaces and
    brackets.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19])


def start_time(pid: int) -> int | None:
    """When a running process was started; None where it is gone or a zombie."""
    stat = read_stat(pid)
    return None if stat is None or stat[0] in (b"Z", b"X") else stat[1]


def open_pidfd(pid: int, started: int) -> int | None:
    """A descriptor of exactly this process; None when it ended, also when its number went to another one."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if start_time(pid) == started:
        return descriptor
    os.close(descriptor)
    return None


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # It ended before the line above could see it.
        os._exit(1)


def _start(command: CommandOrder, folder: str) -> subprocess.Popen[bytes]:
    with open(command["log"], "ab") as log:
        return subprocess.Popen(
            command["arguments"],
            cwd=folder,
            env=command["environment"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(_die_with, os.getpid()),  # Safe here: one thread, so no lock is held across the fork.
        )


def _identity(server: subprocess.Popen[bytes]) -> tuple[int, int]:
    stat = read_stat(server.pid)
    assert stat is not None, "even one that ended at once is there until it is waited for"
    return server.pid, stat[1]


def _stop(servers: list[subprocess.Popen[bytes]], *, deadline_s: float) -> None:
    for server in servers:
        server.terminate()
    ends = time.monotonic() + deadline_s
    for server in servers:
        with suppress(subprocess.TimeoutExpired):
            server.wait(max(0.0, ends - time.monotonic()))
    _kill(servers)


def _kill(servers: list[subprocess.Popen[bytes]]) -> None:
    for server in servers:
        server.kill()
    for server in servers:
        server.wait()


def main() -> int:
    """Obey the orders on standard input. Exit code 1: a server ended by itself."""
    orders: Orders = json.load(sys.stdin)
    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_writer, False)
    signal.set_wakeup_fd(wake_writer)
    signal.signal(signal.SIGTERM, lambda *_: None)

    owner = open_pidfd(*orders["owner"])
    if owner is None:
        return 0
    servers: list[subprocess.Popen[bytes]] = []
    try:
        servers.extend(_start(command, orders["folder"]) for command in orders["commands"])
        print(json.dumps([_identity(server) for server in servers]), flush=True)

        poll = select.poll()
        for descriptor in (wake_reader, owner, *(os.pidfd_open(server.pid) for server in servers)):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll()}
        if wake_reader in ready:
            _stop(servers, deadline_s=orders["stop_deadline_s"])
            return 0
        return 0 if owner in ready else 1
    finally:
        _kill(servers)
        for path in orders["leftovers"]:
            Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
