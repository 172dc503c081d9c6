"""An append-only log of records that survives being cut at any byte.

    magic, then for every record: length (4), kind (1), payload (length), CRC-32 of the five and the payload (4)

Numbers are little-endian. What follows the first record that is not whole is not there: a reader sees the state before
it, never a wrong one. Records go to the kernel at once, so a killed process loses none; a power loss may take the last
second, unless a record was written as durable.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import PlanError

MAGIC = b"disk-pipeline journal 1\n"
_HEAD = struct.Struct("<IB")
_SUM = struct.Struct("<I")
# A record that claims more is damage: the largest is an encoder's state, a few hundred KiB for the largest disks.
_PAYLOAD_MAX = 256 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One record. What a kind means is for whoever writes it."""

    kind: int
    payload: bytes

    def to_bytes(self) -> bytes:
        """As it stands in the file."""
        body = _HEAD.pack(len(self.payload), self.kind) + self.payload
        return body + _SUM.pack(zlib.crc32(body))


def parse(data: bytes) -> tuple[list[Record], int]:
    """The whole records of a log, and where the last of them ends (0 where not even the magic is whole)."""
    if not data.startswith(MAGIC):
        return [], 0
    records = []
    position = len(MAGIC)
    while position + _HEAD.size <= len(data):
        length, kind = _HEAD.unpack_from(data, position)
        end = position + _HEAD.size + length
        if length > _PAYLOAD_MAX or end + _SUM.size > len(data):
            break
        if zlib.crc32(data[position:end]) != _SUM.unpack_from(data, end)[0]:
            break
        records.append(Record(kind, data[position + _HEAD.size : end]))
        position = end + _SUM.size
    return records, position


class RecordLog:
    """One log file, locked against a second process as long as it is open.

    Attributes:
        path: of the file.
        found: the whole records that were in it when it was opened.
        size: bytes of the file now.
    """

    def __init__(self, path: Path, fd: int, found: list[Record], size: int) -> None:
        """Use `open` instead."""
        self.path = path
        self.found = found
        self.size = size
        self._fd = fd
        self._dirty = False
        self._lock = threading.Lock()  # `sync` runs in a thread, and `rewrite` replaces the file under it

    @classmethod
    def open(cls, path: Path) -> RecordLog:
        """Open or make the log, lock it, and read what is whole of it; what is not is cut off.

        Raises:
            PlanError: another process has it open.
            OSError: the file can't be made, read or written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o600)
            try:
                _lock(fd, path)
                if not _is_at(path, fd):  # compacted or removed between open and lock
                    os.close(fd)
                    continue
                records, end = parse(_read_all(fd))
                os.ftruncate(fd, end)
                if end == 0:
                    end = os.write(fd, MAGIC)
            except BaseException:
                os.close(fd)
                raise
            return cls(path, fd, records, end)

    def append(self, record: Record, *, durable: bool = False) -> None:
        """Write one record at the end.

        Args:
            durable: on stable storage when this returns: a few milliseconds. For what must not be forgotten.
        Raises:
            OSError: it could not be written; a part of it is ignored by every reader.
        """
        data = record.to_bytes()
        done = 0
        while done < len(data):
            done += os.write(self._fd, data[done:])
        self.size += len(data)
        self._dirty = True
        if durable:
            self.sync()

    def sync(self) -> None:
        """Bring everything to stable storage; cheap where nothing was written since. Threads: any."""
        with self._lock:
            if self._dirty and self._fd >= 0:
                self._dirty = False
                os.fdatasync(self._fd)

    def rewrite(self, records: Iterable[Record]) -> None:
        """Put these records in the place of all others, in one step.

        Raises:
            OSError: it did not work; the log is as it was.
        """
        fresh = self.path.with_name(self.path.name + ".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_APPEND, 0o600)
        try:
            _lock(fd, fresh)
            data = MAGIC + b"".join(record.to_bytes() for record in records)
            done = 0
            while done < len(data):
                done += os.write(fd, data[done:])
            os.fsync(fd)
            os.replace(fresh, self.path)
            _sync_folder(self.path.parent)
        except BaseException:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        with self._lock:
            old, self._fd = self._fd, fd
            os.close(old)
            self._dirty = False
        self.size = len(data)

    def remove(self) -> None:
        """Delete the file and let it go."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(self.path.name + ".new").unlink(missing_ok=True)  # of a compaction that was killed
        self.close()

    def close(self) -> None:
        """Let the file and its lock go; idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PlanError(
            "this export is running already",
            operation="plan",
            journal=path,
            hint='Wait for it, stop it, or give this one another "name" in [export].',
        ) from None


def _is_at(path: Path, fd: int) -> bool:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)


def _read_all(fd: int) -> bytes:
    chunks = []
    offset = 0
    while chunk := os.pread(fd, 1 << 24, offset):
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power loss."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
