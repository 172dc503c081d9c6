"""Start a program that never outlives its parent: `leash.py PARENT SIGNAL UID MEMORY CPU_S FILE_SIZE PROGRAM ...`.

Runs in a process of its own, between fork and exec, where a running event loop can't do such things. Everything of
another user's rights is given up first: changing the user forgets the wish to be told of the parent's end (prctl(2)).
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Sequence
from signal import Signals
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38


def leashed(
    command: Sequence[str], *, signal: Signals, user: int = 0, memory: int = 0, cpu_s: int = 0, file_size: int = 0
) -> list[str]:
    """The command line that runs `command` on a leash held by this process.

    Args:
        signal: what the program gets when this process ends, however it ends.
        user: number of the user to become; 0: stay who we are.
        memory, cpu_s, file_size: limits (address space in bytes, seconds of processor, bytes of a file); 0: none.
    """
    limits = (os.getpid(), int(signal), user, memory, cpu_s, file_size)
    return [sys.executable, "-I", "-S", __file__, *(str(one) for one in limits), *command]


def main(words: Sequence[str]) -> None:
    """Put the limits on and become the program."""
    parent, signal, user, memory, cpu_s, file_size = (int(word) for word in words[:6])
    command = list(words[6:])
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_size),
    ):
        if limit:
            resource.setrlimit(kind, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if user:
        prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0) != 0 or os.getppid() != parent:
        os._exit(1)  # the parent ended meanwhile
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
