"""An NBD server over one disk: what every NBD client can use, and none can harm.

Source: "The NBD protocol" (NetworkBlockDevice/nbd, doc/proto.md): fixed newstyle handshake, structured replies,
base:allocation, multi-conn.

What a client can make the server hold is bounded: a few requests of each connection are worked on at once, in pieces;
the next is not taken from the socket before one is done.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread

from pipeline.errors import PipelineError, PlanError, StoreError
from pipeline.units import KiB
from stages.serve.cache import RUN_MAX
from stages.serve.disk import InFile, ServedDisk, Span
from stages.store import nbd_wire as wire
from stages.store.nbd_channel import Channel, ChannelClosed

# One piece of an answer or of a write: a request may be 32 times as long, and is worked on piece by piece.
PIECE_MAX = RUN_MAX
_WRITE_PIECE = 256 * KiB
# Shorter reads go through the cache: a thread costs more than it saves.
_STORED_MIN = 64 * KiB
# Extents in one answer; a client asks again for what follows.
_EXTENTS = 4096
_OPTIONS_MAX = 200
_META_QUERIES_MAX = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What clients may take. Seconds and counts.

    Attributes:
        connections: more are hung up on.
        requests: worked on at once, of one connection.
        handshake_s: to agree on the export.
        progress_s: a client that takes no byte of its answers, or sends none of its write, for so long is hung up on.
    """

    connections: int = 16
    requests: int = 16
    handshake_s: float = 15.0
    progress_s: float = 60.0


class NbdServer:
    """Serves one disk under one name, and under the empty one, to many clients."""

    def __init__(
        self,
        disk: ServedDisk,
        *,
        name: str = "",
        description: str = "",
        limits: Limits | None = None,
        on_problem: Callable[[str], None] = lambda problem: None,
    ) -> None:
        """Prepare it; nothing listens before `serve`.

        Args:
            disk: borrowed.
            on_problem: told what went wrong for a client, once for each sentence.
        """
        self.disk = disk
        self.limits = limits or Limits()
        self.name = name
        self.description = description
        self.clients = 0
        self.served = 0
        self.read_bytes = 0
        self.written_bytes = 0
        # A thread for each connection: a client that takes nothing keeps its own waiting, and nobody else's.
        self.senders = anyio.CapacityLimiter(self.limits.connections)
        self._on_problem = on_problem
        self._told: set[str] = set()
        self._channels: set[Channel] = set()

    @property
    def info(self) -> wire.ExportInfo:
        """What clients are told."""
        flags = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.SEND_FUA | wire.CAN_MULTI_CONN
        writing = wire.SEND_TRIM | wire.SEND_WRITE_ZEROES | wire.SEND_FAST_ZERO
        flags |= writing if self.disk.can_write else wire.READ_ONLY
        return wire.ExportInfo(
            size=self.disk.size, flags=flags, block_min=1, block_preferred=64 * KiB, payload_max=wire.PAYLOAD_MAX
        )

    def tell(self, problem: str) -> None:
        """Say what went wrong, but not again and again."""
        if problem not in self._told and len(self._told) < 100:
            self._told.add(problem)
            self._on_problem(problem)

    async def serve(self, listener: socket.socket) -> None:
        """Take clients until this is cancelled; then all of them are hung up on. Owns the listening socket."""
        with listener:
            listener.setblocking(False)
            async with anyio.create_task_group() as tasks, self._hanging_up():
                while True:
                    try:
                        peer, _ = listener.accept()
                    except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                        await anyio.wait_readable(listener)
                        continue
                    except OSError as error:
                        # No descriptor left, or the like: clients that end make room again.
                        self.tell(f"a client could not be taken: {error.strerror}")
                        await anyio.sleep(0.1)
                        continue
                    if self.clients >= self.limits.connections:
                        self.tell(f"more than {self.limits.connections} clients came at once; the others were refused")
                        peer.close()
                        continue
                    self.clients += 1
                    tasks.start_soon(self._welcome, Channel(peer))

    @asynccontextmanager
    async def _hanging_up(self) -> AsyncIterator[None]:
        """At the end every client is hung up on, so that no thread waits for one."""
        try:
            yield
        finally:
            for channel in self._channels:
                channel.shut_down()

    async def _welcome(self, channel: Channel) -> None:
        self.served += 1
        self._channels.add(channel)
        try:
            await _Session(self, channel).run()
        except ChannelClosed:
            pass
        except TimeoutError:
            self.tell("a client was silent in the middle of something, and was hung up on")
        except wire.NbdProtocolError as error:
            self.tell(f"a client broke the protocol, and was hung up on: {error}")
        finally:
            self.clients -= 1
            self._channels.discard(channel)
            channel.close()


class _Refused(Exception):
    """A request that gets an error as answer."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Session:
    """One client, from greeting to farewell."""

    def __init__(self, server: NbdServer, channel: Channel) -> None:
        self._server = server
        self._disk = server.disk
        self._limits = server.limits
        self._channel = channel
        self._sending = anyio.Lock()
        self._room = anyio.Semaphore(server.limits.requests)
        self._is_structured = False
        self._context_for: str | None = None  # the export for which base:allocation was chosen
        self._tells_status = False
        self._outbox: list[tuple[bytes, int, int]] = []  # as `Channel.send_stored` takes them
        self._queued = 0  # requests that they answer
        self._has_queued = anyio.Event()

    async def run(self) -> None:
        """Raises ChannelClosed, TimeoutError or NbdProtocolError when the client goes, sleeps or lies."""
        with anyio.fail_after(self._limits.handshake_s):
            is_agreed = await self._shake_hands()
        if is_agreed:
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._send_outbox)
                    try:
                        await self._take_requests(tasks)
                    finally:
                        self._channel.shut_down()  # a thread may wait for a client that is gone
                        tasks.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                # One answer that could not be sent, or the client's own end: the first says why.
                raise _first(group) from None

    # -- the handshake ---------------------------------------------------------------------------------------------

    async def _shake_hands(self) -> bool:
        channel = self._channel
        await channel.send(wire.GREETING.pack(wire.INIT_MAGIC, wire.OPTION_MAGIC, wire.FIXED_NEWSTYLE | wire.NO_ZEROES))
        (flags,) = wire.CLIENT_FLAGS.unpack(await channel.receive(wire.CLIENT_FLAGS.size))
        if flags & ~(wire.FIXED_NEWSTYLE | wire.NO_ZEROES):
            raise wire.NbdProtocolError("it wants what nobody offered", operation="handshake", flags=hex(flags))
        for _ in range(_OPTIONS_MAX):
            magic, option, length = wire.OPTION.unpack(await channel.receive(wire.OPTION.size))
            if magic != wire.OPTION_MAGIC or length > wire.OPTION_MAX:
                raise wire.NbdProtocolError("this is no option", operation="handshake", length=length)
            data = await channel.receive(length)
            if option == wire.Opt.EXPORT_NAME:
                return await self._begin_unasked(data, with_zeroes=not flags & wire.NO_ZEROES)
            if option == wire.Opt.ABORT:
                await self._answer(option, wire.Rep.ACK)
                return False
            try:
                if await self._haggle(option, data):
                    return True
            except wire.NbdProtocolError as error:
                await self._answer(option, wire.Rep.ERR_INVALID, error.message.encode())
        raise wire.NbdProtocolError("it can't make up its mind", operation="handshake", options=_OPTIONS_MAX)

    async def _begin_unasked(self, data: bytes, *, with_zeroes: bool) -> bool:
        """The old way to begin: there is no way to say no but to hang up."""
        if not self._knows(data.decode(errors="replace")):
            return False
        info = self._server.info
        await self._channel.send(
            wire.EXPORT.pack(info.size, info.flags), bytes(wire.EXPORT_ZEROES) if with_zeroes else b""
        )
        return True

    async def _haggle(self, option: int, data: bytes) -> bool:
        """Answer one option; whether the transmission begins."""
        if option in (wire.Opt.GO, wire.Opt.INFO):
            name, wanted = wire.unpack_go(data)
            if not self._knows(name):
                await self._answer(option, wire.Rep.ERR_UNKNOWN, b"there is no such export")
                return False
            info = self._info()
            await self._answer(option, wire.Rep.INFO, wire.pack_export(info))
            await self._answer(option, wire.Rep.INFO, wire.pack_block_sizes(info))
            if wire.Info.NAME in wanted:
                await self._answer(option, wire.Rep.INFO, wire.U16.pack(wire.Info.NAME) + self._server.name.encode())
            if wire.Info.DESCRIPTION in wanted and self._server.description:
                text = self._server.description.encode()[: wire.TEXT_MAX]
                await self._answer(option, wire.Rep.INFO, wire.U16.pack(wire.Info.DESCRIPTION) + text)
            await self._answer(option, wire.Rep.ACK)
            self._tells_status = self._context_for == name
            return option == wire.Opt.GO
        if option == wire.Opt.STRUCTURED_REPLY:
            self._is_structured = True
            await self._answer(option, wire.Rep.ACK)
        elif option == wire.Opt.LIST:
            await self._answer(option, wire.Rep.SERVER, wire.pack_text(self._server.name))
            await self._answer(option, wire.Rep.ACK)
        elif option in (wire.Opt.LIST_META_CONTEXT, wire.Opt.SET_META_CONTEXT):
            await self._choose_contexts(option, data)
        elif option == wire.Opt.STARTTLS:
            await self._answer(option, wire.Rep.ERR_POLICY, b"there is no TLS here: this server is for this machine")
        else:
            await self._answer(option, wire.Rep.ERR_UNSUP)
        return False

    async def _choose_contexts(self, option: int, data: bytes) -> None:
        name, queries = wire.unpack_contexts(data)
        if not self._is_structured and option == wire.Opt.SET_META_CONTEXT:
            await self._answer(option, wire.Rep.ERR_INVALID, b"structured replies come first")
            return
        if not self._knows(name):
            await self._answer(option, wire.Rep.ERR_UNKNOWN, b"there is no such export")
            return
        if len(queries) > _META_QUERIES_MAX:
            await self._answer(option, wire.Rep.ERR_TOO_BIG)
            return
        is_list = option == wire.Opt.LIST_META_CONTEXT
        wanted = wire.ALLOCATION in queries or (is_list and (not queries or "base:" in queries))
        if wanted:
            number = 0 if is_list else 1
            await self._answer(option, wire.Rep.META_CONTEXT, wire.CONTEXT.pack(number) + wire.ALLOCATION.encode())
        if not is_list:
            self._context_for = name if wanted else None
        await self._answer(option, wire.Rep.ACK)

    async def _answer(self, option: int, kind: int, data: bytes = b"") -> None:
        await self._channel.send(wire.pack_option_reply(option, kind, data))

    def _knows(self, name: str) -> bool:
        return name in ("", self._server.name)

    def _info(self) -> wire.ExportInfo:
        info = self._server.info
        return replace(info, flags=info.flags | wire.SEND_DF) if self._is_structured else info

    # -- requests --------------------------------------------------------------------------------------------------

    async def _take_requests(self, tasks: anyio.abc.TaskGroup) -> None:
        while True:
            request = wire.unpack_request(await self._channel.receive(wire.REQUEST.size))
            if request.command == wire.Command.DISC:
                return
            if request.command == wire.Command.READ:
                await self._room.acquire()
                if not await self._queue_stored(request):
                    tasks.start_soon(self._read, request)
                continue
            try:
                if request.command == wire.Command.WRITE:
                    await self._write(request)
                else:
                    self._check(request)
                    if request.command == wire.Command.BLOCK_STATUS:
                        await self._block_status(request)
                        continue
                    await self._change(request)
            except wire.NbdProtocolError:
                raise
            except (_Refused, PipelineError) as error:
                await self._fail(request, error)
                continue
            await self._done(request)

    def _check(self, request: wire.Request) -> None:
        """Raises _Refused for what the protocol forbids."""
        is_writing = request.command in (wire.Command.WRITE, wire.Command.TRIM, wire.Command.WRITE_ZEROES)
        allowed = {
            wire.Command.READ: wire.DF if self._is_structured else 0,
            wire.Command.WRITE: wire.FUA,
            wire.Command.FLUSH: 0,
            wire.Command.TRIM: wire.FUA,
            wire.Command.WRITE_ZEROES: wire.FUA | wire.NO_HOLE | wire.FAST_ZERO,
            wire.Command.BLOCK_STATUS: wire.REQ_ONE,
        }.get(request.command)  # type: ignore[call-overload]  # an int is as good as the enum
        if allowed is None:
            raise _Refused(errno.EINVAL, "this command is not known here")
        # FUA means nothing for a read, and clients may send it everywhere.
        if request.flags & ~(allowed | wire.FUA):
            raise _Refused(errno.EINVAL, "a flag is not known here")
        if is_writing and not self._disk.can_write:
            raise _Refused(errno.EPERM, "the export is read-only")
        if request.command == wire.Command.FLUSH:
            return
        if request.offset + request.length > self._disk.size:
            raise _Refused(errno.ENOSPC if is_writing else errno.EINVAL, "the request reaches behind the end")
        if request.command == wire.Command.BLOCK_STATUS:
            if not self._tells_status:
                raise _Refused(errno.EINVAL, "no metadata context was chosen")
            if not request.length:
                raise _Refused(errno.EINVAL, "the request has no length")
        if request.command == wire.Command.READ and request.length > wire.PAYLOAD_MAX:
            raise _Refused(errno.EOVERFLOW, "the request is longer than the largest block")

    async def _read(self, request: wire.Request) -> None:
        try:
            try:
                self._check(request)
                is_cut = self._is_structured and not request.flags & wire.DF and request.length > 0
                if is_cut:
                    await self._send_chunks(request)
                else:
                    await self._send_whole(request)
            except (_Refused, PipelineError) as error:
                await self._fail(request, error)
            self._server.read_bytes += request.length
        finally:
            self._room.release()

    async def _queue_stored(self, request: wire.Request) -> bool:
        """Let the kernel send what lies in a local file as it is; False where it does not, or something is wrong."""
        disk = self._disk
        if not isinstance(disk, InFile) or disk.fd is None or not self._is_structured:
            return False
        end = request.offset + request.length
        if not _STORED_MIN <= request.length <= wire.PAYLOAD_MAX or end > disk.size or request.flags & ~wire.FUA:
            return False
        try:
            located = await disk.locate(request.offset, request.length)
        except PipelineError:
            return False  # reading it says what is wrong
        if located is None:
            return False
        offset = request.offset
        for one in located:
            is_last = offset + one.length == end
            if one.at is None:
                head = wire.pack_chunk(request.handle, wire.Chunk.OFFSET_HOLE, wire.HOLE.size, done=is_last)
                self._outbox.append((head + wire.HOLE.pack(offset, one.length), 0, 0))
            else:
                length = wire.OFFSET.size + one.length
                head = wire.pack_chunk(request.handle, wire.Chunk.OFFSET_DATA, length, done=is_last)
                self._outbox.append((head + wire.OFFSET.pack(offset), one.at, one.length))
            offset += one.length
        self._queued += 1
        self._server.read_bytes += request.length
        self._has_queued.set()
        return True

    async def _send_outbox(self) -> None:
        """Send what is queued, all of it in one thread call: a call for each answer costs as much as its bytes."""
        disk = self._disk
        fd = disk.fd if isinstance(disk, InFile) else None
        if fd is None:
            return
        while True:
            await self._has_queued.wait()
            self._has_queued = anyio.Event()
            pieces, queued, self._outbox, self._queued = self._outbox, self._queued, [], 0
            send = partial(self._channel.send_stored, fd, pieces, patience_s=self._limits.progress_s)
            async with self._sending:
                await anyio.to_thread.run_sync(send, limiter=self._server.senders)
            for _ in range(queued):
                self._room.release()

    async def _send_chunks(self, request: wire.Request) -> None:
        """Every piece as it comes, zeros without their bytes."""
        end = request.offset + request.length
        for offset in range(request.offset, end, PIECE_MAX):
            spans = await self._disk.read(offset, min(PIECE_MAX, end - offset))
            messages: list[bytes | memoryview] = []
            for span in _merged(spans):
                is_last = offset + span.length == end
                if span.data is None:
                    messages.append(
                        wire.pack_chunk(request.handle, wire.Chunk.OFFSET_HOLE, wire.HOLE.size, done=is_last)
                    )
                    messages.append(wire.HOLE.pack(offset, span.length))
                else:
                    length = wire.OFFSET.size + span.length
                    messages.append(wire.pack_chunk(request.handle, wire.Chunk.OFFSET_DATA, length, done=is_last))
                    messages += [wire.OFFSET.pack(offset), span.data]
                offset += span.length
            await self._send(messages)

    async def _send_whole(self, request: wire.Request) -> None:
        """One header, and all the bytes behind it. What fails after the header ends the connection."""
        end = request.offset + request.length
        first = await self._disk.read(request.offset, min(PIECE_MAX, request.length)) if request.length else ()
        head = wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, 0, request.handle)
        if self._is_structured:
            payload = wire.OFFSET.size + request.length
            head = wire.pack_chunk(request.handle, wire.Chunk.OFFSET_DATA, payload, done=True)
            head += wire.OFFSET.pack(request.offset)
            if not request.length:
                head = wire.pack_chunk(request.handle, wire.Chunk.NONE, 0, done=True)
        async with self._sending:
            await self._send_now([head, *_bytes_of(first)])
            for offset in range(request.offset + PIECE_MAX, end, PIECE_MAX):
                try:
                    spans = await self._disk.read(offset, min(PIECE_MAX, end - offset))
                except PipelineError as error:
                    self._server.tell(str(error))
                    raise ChannelClosed("an answer could not be finished") from None
                await self._send_now(_bytes_of(spans))

    async def _write(self, request: wire.Request) -> None:
        """Take the payload piece by piece, whatever becomes of it."""
        if request.length > wire.PAYLOAD_MAX:
            raise wire.NbdProtocolError("a write is longer than it may be", operation="write", length=request.length)
        failure: _Refused | PipelineError | None = None
        try:
            self._check(request)
        except _Refused as error:
            failure = error
        piece = memoryview(bytearray(min(_WRITE_PIECE, request.length)))
        for start in range(0, request.length, _WRITE_PIECE):
            view = piece[: min(_WRITE_PIECE, request.length - start)]
            with anyio.fail_after(self._limits.progress_s):
                await self._channel.receive_into(view)
            if failure is None:
                try:
                    await self._disk.write(request.offset + start, view)
                except PipelineError as error:
                    failure = error
        if failure is not None:
            raise failure
        self._server.written_bytes += request.length
        if request.flags & wire.FUA:
            await self._disk.flush()

    async def _change(self, request: wire.Request) -> None:
        if request.command != wire.Command.FLUSH and request.length:
            await self._disk.zero(request.offset, request.length)
        if request.command == wire.Command.FLUSH or request.flags & wire.FUA:
            await self._disk.flush()

    async def _block_status(self, request: wire.Request) -> None:
        extents: list[tuple[int, int]] = []
        most = 1 if request.flags & wire.REQ_ONE else _EXTENTS
        async with aclosing(self._disk.extents(request.offset, request.length)) as found:  # type: ignore[type-var]  # a generator
            async for extent in found:
                flags = wire.STATE_HOLE | wire.STATE_ZERO if extent.is_zero else 0
                if extents and extents[-1][1] == flags:
                    extents[-1] = (extents[-1][0] + extent.length, flags)
                elif len(extents) == most:
                    break
                else:
                    extents.append((extent.length, flags))
        payload = wire.pack_extents(1, extents)
        head = wire.pack_chunk(request.handle, wire.Chunk.BLOCK_STATUS, len(payload), done=True)
        await self._send([head, payload])

    # -- answers ---------------------------------------------------------------------------------------------------

    async def _done(self, request: wire.Request) -> None:
        if self._is_structured:
            await self._send([wire.pack_chunk(request.handle, wire.Chunk.NONE, 0, done=True)])
        else:
            await self._send([wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, 0, request.handle)])

    async def _fail(self, request: wire.Request, error: Exception) -> None:
        code = error.code if isinstance(error, _Refused) else errno.EIO
        if isinstance(error, StoreError) and error.status in (errno.ENOSPC, errno.EDQUOT):
            code = errno.ENOSPC
        if not isinstance(error, _Refused):
            self._server.tell(str(error))
        if self._is_structured:
            await self._send([wire.pack_error(request.handle, code, str(error))])
        else:
            await self._send([wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, code, request.handle)])

    async def _send(self, messages: Sequence[bytes | memoryview]) -> None:
        async with self._sending:
            await self._send_now(messages)

    async def _send_now(self, messages: Sequence[bytes | memoryview]) -> None:
        with anyio.fail_after(self._limits.progress_s):
            await self._channel.send(*messages)


_ZEROS = memoryview(bytes(64 * KiB))


def _bytes_of(spans: Sequence[Span]) -> list[memoryview]:
    """The bytes themselves, zeros too, without making them anew."""
    found: list[memoryview] = []
    for span in spans:
        if span.data is not None:
            found.append(span.data)
            continue
        for start in range(0, span.length, _ZEROS.nbytes):
            found.append(_ZEROS[: min(_ZEROS.nbytes, span.length - start)])  # noqa: PERF401  # two kinds in one list
    return found


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Zeros that follow each other are one span."""
    made: list[Span] = []
    for span in spans:
        if made and made[-1].data is None and span.data is None:
            made[-1] = Span(made[-1].length + span.length, None)
        else:
            made.append(span)
    return made


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


# ---- listening -------------------------------------------------------------------------------------------------------


def listen_on_socket(path: Path) -> socket.socket:
    """A Unix socket that only this user can connect to. A dead one of the same name is replaced.

    Raises:
        PlanError: the name is taken, or no socket can be made there.
    """
    try:
        if path.is_socket() and not _answers(path):
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            before = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(before)
            listener.listen(16)
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        hint = "The path of a socket has 107 bytes at most." if "too long" in str(error) else "Choose another name."
        raise PlanError(
            f"no socket can be made: {error.strerror or error}", operation="listen", path=path, hint=hint
        ) from None


def listen_on_port(port: int, address: str = "127.0.0.1") -> socket.socket:
    """A TCP port; 0 is any free one. Raises PlanError where it is taken."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=16)
    except OSError as error:
        raise PlanError(
            f"the port can't be used: {error.strerror or error}", operation="listen", address=address, port=port
        ) from None


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
