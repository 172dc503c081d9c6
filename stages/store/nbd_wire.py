"""The words of the NBD protocol: what client and server send each other, packed and taken apart.

Source: "The NBD protocol" (NetworkBlockDevice/nbd, doc/proto.md): sections "Protocol phases", "Option types",
"Structured reply chunk message", "Values". All numbers are big-endian. Nothing here does input or output.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from pipeline.errors import PipelineError
from pipeline.units import KiB, MiB

DEFAULT_PORT: Final = 10809

# Handshake.
GREETING: Final = struct.Struct(">QQH")
INIT_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
REPLY_MAGIC: Final = 0x0003E889045565A9
FIXED_NEWSTYLE: Final = 1 << 0
NO_ZEROES: Final = 1 << 1
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")
OPTION_REPLY: Final = struct.Struct(">QIII")
# After NBD_OPT_EXPORT_NAME: size and flags, and 124 zeros unless both sides said NO_ZEROES.
EXPORT: Final = struct.Struct(">QH")
EXPORT_ZEROES: Final = 124
# The longest export name, metadata context or text that the protocol allows.
TEXT_MAX: Final = 4096
# No sane option or answer to one is longer. A longer one is an attack, or not NBD at all.
OPTION_MAX: Final = 64 * KiB


class Opt(IntEnum):
    """What a client asks for before the transmission phase."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(IntEnum):
    """How a server answers an option. The top bit says that it was refused."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9


REP_ERROR: Final = 1 << 31


class Info(IntEnum):
    """What an answer to INFO or GO is about."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


# What an export can do (transmission flags).
HAS_FLAGS: Final = 1 << 0
READ_ONLY: Final = 1 << 1
SEND_FLUSH: Final = 1 << 2
SEND_FUA: Final = 1 << 3
SEND_TRIM: Final = 1 << 5
SEND_WRITE_ZEROES: Final = 1 << 6
SEND_DF: Final = 1 << 7
CAN_MULTI_CONN: Final = 1 << 8
SEND_CACHE: Final = 1 << 10
SEND_FAST_ZERO: Final = 1 << 11


class Command(IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


# Flags of a request.
FUA: Final = 1 << 0
NO_HOLE: Final = 1 << 1
DF: Final = 1 << 2
REQ_ONE: Final = 1 << 3
FAST_ZERO: Final = 1 << 4

REQUEST: Final = struct.Struct(">IHHQQI")
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
SIMPLE_MAGIC: Final = 0x67446698
CHUNK: Final = struct.Struct(">IHHQI")
CHUNK_MAGIC: Final = 0x668E33EF
# Flag of a chunk: no other chunk answers this request.
DONE: Final = 1


class Chunk(IntEnum):
    """Parts of a structured reply. The top bit says that it is an error."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


CHUNK_ERROR: Final = 1 << 15
OFFSET: Final = struct.Struct(">Q")
HOLE: Final = struct.Struct(">QI")
ERROR: Final = struct.Struct(">IH")
CONTEXT: Final = struct.Struct(">I")
EXTENT: Final = struct.Struct(">II")

# The metadata context that tells holes from data, and its flags.
ALLOCATION: Final = "base:allocation"
STATE_HOLE: Final = 1
STATE_ZERO: Final = 2

# Without a block size from the server: any byte, and the payload that "Size constraints" promises.
BLOCK_MIN: Final = 1
BLOCK_PREFERRED: Final = 4 * KiB
PAYLOAD_MAX: Final = 32 * MiB
# The length field of a request that has no payload; kept in whole MiB so that every block size divides it.
LENGTH_MAX: Final = 2**32 - MiB
# More extents than these are not wanted of one answer: 1 MiB of them.
EXTENTS_MAX: Final = 128 * KiB

# The protocol's error numbers are Linux's.
ERRORS: Final = {
    errno.EPERM: "not permitted",
    errno.EIO: "I/O error",
    errno.ENOMEM: "out of memory",
    errno.EINVAL: "invalid request",
    errno.ENOSPC: "no space left",
    errno.EOVERFLOW: "value too large",
    errno.ENOTSUP: "not supported",
    errno.ESHUTDOWN: "the server is shutting down",
}


class NbdProtocolError(PipelineError):
    """The other side does not keep to the protocol; nothing more can be said to it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came in. `handle` is the sender's own name for it."""

    flags: int
    command: int
    handle: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInfo:
    """What a server says of an export. Bytes.

    Attributes:
        flags: transmission flags.
        block_min: offsets and lengths are multiples of it.
        payload_max: of a read or a write.
    """

    size: int
    flags: int
    block_min: int = BLOCK_MIN
    block_preferred: int = BLOCK_PREFERRED
    payload_max: int = PAYLOAD_MAX

    def can(self, flag: int) -> bool:
        """Whether the export has a transmission flag."""
        return bool(self.flags & flag)


def pack_request(command: int, handle: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    """A request; a write's payload follows."""
    return REQUEST.pack(REQUEST_MAGIC, flags, command, handle, offset, length)


def unpack_request(data: bytes | memoryview) -> Request:
    """Raises NbdProtocolError where there is no request."""
    magic, flags, command, handle, offset, length = REQUEST.unpack(data)
    if magic != REQUEST_MAGIC:
        raise NbdProtocolError(f"this is no request (magic 0x{magic:08x})", operation="nbd")
    return Request(flags, command, handle, offset, length)


def pack_option(option: int, data: bytes = b"") -> bytes:
    """An option as the client sends it."""
    return OPTION.pack(OPTION_MAGIC, option, len(data)) + data


def pack_option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """An answer to an option."""
    return OPTION_REPLY.pack(REPLY_MAGIC, option, kind, len(data)) + data


def pack_chunk(handle: int, kind: int, payload: int, *, done: bool) -> bytes:
    """The header of a chunk with `payload` bytes behind it."""
    return CHUNK.pack(CHUNK_MAGIC, DONE if done else 0, kind, handle, payload)


def pack_text(text: str) -> bytes:
    """A text with its length in front."""
    data = text.encode()
    return CONTEXT.pack(len(data)) + data


class Fields:
    """Takes the data of an option or answer apart, from front to back. Raises NbdProtocolError when it ends early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def rest(self) -> int:
        """Bytes not yet taken."""
        return len(self._data) - self._at

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        if length > self.rest:
            raise NbdProtocolError(
                "a field is longer than the message that holds it", operation="nbd", expected=length, got=self.rest
            )
        self._at += length
        return self._data[self._at - length : self._at]

    def number(self, shape: struct.Struct) -> int:
        """The next number, of a Struct with one field."""
        value: int = shape.unpack(self.take(shape.size))[0]
        return value

    def text(self, length: int | None = None) -> str:
        """The next text: `length` bytes, else as its own length field says."""
        count = self.number(CONTEXT) if length is None else length
        if count > TEXT_MAX:
            raise NbdProtocolError("a text is longer than the protocol allows", operation="nbd", length=count)
        return self.take(count).decode(errors="replace")

    def end(self) -> None:
        """Nothing may be left."""
        if self.rest:
            raise NbdProtocolError("a message is longer than what it says", operation="nbd", left=self.rest)


U16: Final = struct.Struct(">H")
_BLOCK_SIZES: Final = struct.Struct(">III")


def pack_go(name: str, wanted: Iterable[Info]) -> bytes:
    """The data of GO and INFO."""
    asked = tuple(wanted)
    return pack_text(name) + U16.pack(len(asked)) + b"".join(U16.pack(one) for one in asked)


def unpack_go(data: bytes) -> tuple[str, frozenset[int]]:
    """The export's name and what the client wants to know. Raises NbdProtocolError."""
    fields = Fields(data)
    name = fields.text()
    wanted = frozenset(fields.number(U16) for _ in range(fields.number(U16)))
    fields.end()
    return name, wanted


def pack_export(info: ExportInfo) -> bytes:
    """The data of an answer about size and flags."""
    return U16.pack(Info.EXPORT) + EXPORT.pack(info.size, info.flags)


def pack_block_sizes(info: ExportInfo) -> bytes:
    """The data of an answer about block sizes."""
    return U16.pack(Info.BLOCK_SIZE) + _BLOCK_SIZES.pack(info.block_min, info.block_preferred, info.payload_max)


def unpack_export(data: bytes) -> tuple[int, int]:
    """Size and flags, of data behind the kind of information. Raises NbdProtocolError."""
    fields = Fields(data)
    size, flags = EXPORT.unpack(fields.take(EXPORT.size))
    fields.end()
    return size, flags


def unpack_block_sizes(data: bytes) -> tuple[int, int, int]:
    """Smallest, preferred and largest block. Raises NbdProtocolError for sizes that nobody can keep to."""
    fields = Fields(data)
    smallest, preferred, largest = _BLOCK_SIZES.unpack(fields.take(_BLOCK_SIZES.size))
    fields.end()
    # 64 KiB is the largest minimum that the protocol allows.
    if smallest & (smallest - 1) or not 1 <= smallest <= 64 * KiB or largest < max(smallest, preferred):
        raise NbdProtocolError(
            "the server's block sizes make no sense",
            operation="nbd",
            minimum=smallest,
            preferred=preferred,
            maximum=largest,
        )
    return smallest, preferred, largest


def pack_contexts(name: str, contexts: Iterable[str]) -> bytes:
    """The data of SET_META_CONTEXT and LIST_META_CONTEXT."""
    asked = tuple(contexts)
    return pack_text(name) + CONTEXT.pack(len(asked)) + b"".join(pack_text(one) for one in asked)


def unpack_contexts(data: bytes) -> tuple[str, tuple[str, ...]]:
    """The export's name, and the queries. Raises NbdProtocolError."""
    fields = Fields(data)
    name = fields.text()
    count = fields.number(CONTEXT)
    if count * CONTEXT.size > fields.rest:
        raise NbdProtocolError("there are fewer queries than it says", operation="nbd", queries=count)
    queries = tuple(fields.text() for _ in range(count))
    fields.end()
    return name, queries


def pack_extents(context: int, extents: Iterable[tuple[int, int]]) -> bytes:
    """The payload of a chunk with block status: (length, flags)."""
    return CONTEXT.pack(context) + b"".join(EXTENT.pack(*one) for one in extents)


def unpack_extents(data: bytes | memoryview) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The context's number, and (length, flags) of each extent. Raises NbdProtocolError."""
    if len(data) < CONTEXT.size + EXTENT.size or (len(data) - CONTEXT.size) % EXTENT.size:
        raise NbdProtocolError("a block status has a broken length", operation="nbd", length=len(data))
    extents: Iterator[tuple[int, int]] = EXTENT.iter_unpack(data[CONTEXT.size :])
    found = tuple(extents)
    if any(length == 0 for length, _ in found):
        raise NbdProtocolError("a block status has an extent of no length", operation="nbd")
    return CONTEXT.unpack_from(data)[0], found


def pack_error(handle: int, code: int, message: str) -> bytes:
    """A whole structured reply that says that a request failed."""
    text = message.encode()[: TEXT_MAX - 1]
    payload = ERROR.pack(code, len(text)) + text
    return pack_chunk(handle, Chunk.ERROR, len(payload), done=True) + payload


def unpack_error(data: bytes | memoryview) -> tuple[int, str]:
    """Code and message of an error chunk; an offset behind the message is left out. Raises NbdProtocolError."""
    if len(data) < ERROR.size:
        raise NbdProtocolError("an error has a broken length", operation="nbd", length=len(data))
    code, length = ERROR.unpack_from(data)
    if length > len(data) - ERROR.size:
        raise NbdProtocolError("an error is longer than its chunk", operation="nbd", length=length)
    return code, bytes(data[ERROR.size : ERROR.size + length]).decode(errors="replace")
