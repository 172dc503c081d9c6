"""A process of its own that freezes filesystems, and thaws them whatever becomes of the one that asked for it.

Run as a script with nothing but the standard library: `watchdog.py SECONDS DESCRIPTOR...`, each an open folder of a
filesystem. It says `frozen` on stdout when all hold still, and thaws them when anything arrives on stdin, when stdin
ends (whoever asked has died, also by kill -9), when its parent is another one, or when the time is over.

What it says, a line each: `unable I` (the filesystem can't be frozen), `failed I ERRNO`, `frozen`, `thawed`, `late`.

Source: Linux include/uapi/linux/fs.h, FIFREEZE and FITHAW; ioctl(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import sys
import threading
import time

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878
_MCL_CURRENT_AND_FUTURE = 3
# How often it looks whether its parent lives; the pipe tells sooner, but somebody else may hold its other end.
_LOOK_EVERY_S = 1.0


class Watchdog:
    """Freezes in a thread: a freeze waits for writes, which may wait for another filesystem that is frozen already."""

    def __init__(self, folders: list[int]) -> None:
        self._folders = folders
        self._lock = threading.Lock()
        self._frozen: list[int] = []
        self._is_over = False

    def freeze(self) -> None:
        """Freeze one after the other, and say how it went."""
        for index, folder in enumerate(self._folders):
            try:
                fcntl.ioctl(folder, FIFREEZE, 0)
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                    say(f"unable {index}")
                    continue
                say(f"failed {index} {error.errno}")
                return
            with self._lock:
                if self._is_over:
                    thaw(folder)
                    return
                self._frozen.append(folder)
        say("frozen")

    def end(self) -> None:
        """Thaw, the last one first. One that is still being frozen is thawed by the thread that does it."""
        with self._lock:
            self._is_over = True
            for folder in reversed(self._frozen):
                thaw(folder)
            self._frozen.clear()


def thaw(folder: int) -> None:
    """Thaw one filesystem, unless somebody did."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(folder, FITHAW, 0)


def say(line: str) -> None:
    """Tell whoever asked, if he is there."""
    with contextlib.suppress(OSError):
        os.write(1, f"{line}\n".encode())


def stay_in_memory() -> None:
    """Where the system's own disk is frozen, nothing may have to be fetched from it, nor this process be killed."""
    with contextlib.suppress(OSError, ImportError, AttributeError):
        import ctypes

        ctypes.CDLL(None).mlockall(_MCL_CURRENT_AND_FUTURE)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")


def main() -> None:
    """Freeze, wait, thaw."""
    for one in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(one, signal.SIG_IGN)
    parent = os.getppid()
    deadline = time.monotonic() + float(sys.argv[1])
    stay_in_memory()
    watchdog = Watchdog([int(one) for one in sys.argv[2:]])
    freezing = threading.Thread(target=watchdog.freeze, daemon=True)
    freezing.start()
    is_late = False
    while True:
        left = deadline - time.monotonic()
        is_late = left <= 0
        if is_late or os.getppid() != parent:
            break
        if select.select([0], [], [], min(left, _LOOK_EVERY_S))[0]:
            break
    watchdog.end()
    freezing.join()
    say("late" if is_late else "thawed")
    sys.exit(3 if is_late else 0)


if __name__ == "__main__":
    main()
