"""Log lines that look like a server's syslog: the same few thousand words, some far more often than others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEED = 7
VOCABULARY = 6000
WORDS_A_LINE = 10
LINES_A_BATCH = 200_000
Indices = NDArray[np.intp]

_HOSTS = [f"web{number:02d}" for number in range(1, 9)]
_PROGRAMS = ["sshd", "kernel", "systemd", "nginx", "postgres", "cron", "dhclient", "named", "postfix/smtpd", "sudo"]


def write_log(path: Path, size: int) -> None:
    """Write exactly `size` bytes of log lines. The same size gives the same bytes."""
    random = np.random.default_rng(SEED)
    tokens, zipf, senders = _tokens(random)
    second = 0
    left = size
    with path.open("xb") as log:
        while left > 0:
            # One row of indices into the token table a line: stamp, sender, words, the end of the line.
            stamps = [_stamp(second + passed).encode() for passed in range(LINES_A_BATCH // 200 + 1)]
            second += LINES_A_BATCH // 200
            table = np.array(tokens + stamps, dtype=object)
            rows = np.empty((LINES_A_BATCH, WORDS_A_LINE + 4), dtype=np.intp)
            rows[:, 0] = len(tokens) + np.arange(LINES_A_BATCH) // 200
            rows[:, 1] = senders[random.integers(0, len(senders), LINES_A_BATCH)]
            rows[:, 2:-1] = zipf[random.integers(0, len(zipf), (LINES_A_BATCH, WORDS_A_LINE + 1))]
            rows[:, -1] = 0
            # Lines of different lengths: the last words of many lines are left empty.
            empty = np.arange(WORDS_A_LINE + 1) >= random.integers(4, WORDS_A_LINE + 2, LINES_A_BATCH)[:, None]
            rows[:, 2:-1][empty] = 1
            batch = b"".join(table[rows].ravel().tolist())[:left]
            log.write(batch)
            left -= len(batch)


def _tokens(random: np.random.Generator) -> tuple[list[bytes], Indices, Indices]:
    """Make the token table, a table that holds each word's index as often as it is used, and the senders' indices."""
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkqjxz", dtype=np.uint8)
    weights = np.exp(-np.arange(26) / 8.0)
    words = set[bytes]()
    while len(words) < VOCABULARY:
        length = int(random.integers(2, 12))
        words.add(random.choice(letters, length, p=weights / weights.sum()).tobytes() + b" ")
    tokens = [b"\n", b"", *sorted(words)]
    first_number = len(tokens)
    tokens += [b"%d " % number for number in random.integers(0, 1_000_000, 3000)]
    first_sender = len(tokens)
    senders = [f"{host} {program}" for host in _HOSTS for program in _PROGRAMS]
    tokens += [f"{sender}[{random.integers(300, 32768)}]: ".encode() for sender in senders]
    # Every ninth word of a line is a number or an identifier of some kind, the others follow Zipf's law.
    ranks = random.permutation(VOCABULARY) + 2
    shares = 1 / np.arange(1, VOCABULARY + 1)
    zipf = random.choice(ranks, 58_000, p=shares / shares.sum())
    numbers = random.integers(first_number, first_sender, 7_536)
    return tokens, np.concatenate([zipf, numbers]), np.arange(first_sender, len(tokens))


def _stamp(second: int) -> str:
    return f"Nov {1 + second // 86400 % 30:2d} {second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d} "
