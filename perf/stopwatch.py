"""Run commands and say what they used: `python -I -S stopwatch.py`, orders as JSON on standard input.

It is a process and not a function of the harness because Linux counts the memory of the process that forked towards
the peak of its child: with an SDK loaded there, no figure under 60 MiB could be told apart. It imports nothing of the
project.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import IO, TypedDict


class Orders(TypedDict):
    """Steps run one after the other; the commands of a step run together, as with `|` in a shell."""

    steps: list[list[list[str]]]
    environment: dict[str, str]
    folder: str
    log: str
    cold: bool
    forgotten: str | None
    deadline_s: float


class Answer(TypedDict):
    """What all the commands used. `failed` is the first that did not exit with 0, with its exit code."""

    wall_s: float
    steps_s: list[float]
    user_s: float
    system_s: float
    peak_rss: int
    read_bytes: int
    smallest_rss: int
    caches_dropped: bool
    load: float
    failed: tuple[int, list[str]] | None


Process = subprocess.Popen[bytes]


def main() -> None:
    """Obey the orders on standard input, answer on standard output."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through `finally`, so that no command outlives this program
    orders: Orders = json.load(sys.stdin)
    caches_dropped = orders["cold"] and _drop_caches()
    if orders["forgotten"] is not None:
        _forget(orders["forgotten"])
    load = os.getloadavg()[0]
    user_s = system_s = 0.0
    peak_rss = read_bytes = 0
    failed: tuple[int, list[str]] | None = None
    started = time.perf_counter()
    steps_s: list[float] = []
    with open(orders["log"], "wb") as log:
        for step in orders["steps"]:
            step_started = time.perf_counter()
            processes = _start(step, orders, log)
            for position, usage in enumerate(_reap(processes, orders["deadline_s"])):
                user_s += usage.ru_utime
                system_s += usage.ru_stime
                peak_rss = max(peak_rss, usage.ru_maxrss * 1024)
                read_bytes += usage.ru_inblock * 512
                if failed is None and processes[position].returncode != 0:
                    failed = (processes[position].returncode, step[position])
            steps_s.append(time.perf_counter() - step_started)
            if failed is not None:
                break
    answer = Answer(
        wall_s=time.perf_counter() - started,
        steps_s=steps_s,
        user_s=user_s,
        system_s=system_s,
        peak_rss=peak_rss,
        read_bytes=read_bytes,
        smallest_rss=_peak_rss(),
        caches_dropped=caches_dropped,
        load=load,
        failed=failed,
    )
    print(json.dumps(answer))


def _drop_caches() -> bool:
    """Write everything out and empty the page cache. False where that is not allowed (not root, a container)."""
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w") as caches:
            caches.write("3\n")
    except OSError:
        return False
    return True


def _forget(path: str) -> None:
    """Write a file out and take it out of the page cache."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _peak_rss() -> int:
    """Return the most that this program held. Not from getrusage, which counts the harness that forked it."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def _start(step: list[list[str]], orders: Orders, log: IO[bytes]) -> list[Process]:
    processes: list[Process] = []
    upstream: IO[bytes] | int = subprocess.DEVNULL
    for position, command in enumerate(step):
        is_last = position == len(step) - 1
        process = subprocess.Popen(
            command,
            stdin=upstream,
            stdout=log if is_last else subprocess.PIPE,
            stderr=log,
            env=orders["environment"],
            cwd=orders["folder"],
        )
        if not isinstance(upstream, int):
            upstream.close()  # or the process before it never learns that its reader is gone
        upstream = process.stdout or subprocess.DEVNULL
        processes.append(process)
    return processes


def _reap(processes: list[Process], deadline_s: float) -> list[resource.struct_rusage]:
    """Wait for every process and return what each used, its own ended children included."""
    too_long = threading.Timer(deadline_s, _kill, [processes])
    too_long.start()
    usages = []
    try:
        for process in processes:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            usages.append(usage)
    finally:
        too_long.cancel()
        _kill(processes)
    return usages


def _kill(processes: list[Process]) -> None:
    for process in processes:
        if process.returncode is None:
            process.kill()


if __name__ == "__main__":
    main()
