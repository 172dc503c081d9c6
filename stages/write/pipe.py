"""Hand the image to a command, or to whatever reads our stdout: `pipeline run export.toml | ssh host 'cat > x'`.

Nothing can be taken back or looked at again: no verification, and the manifest stays here. A command has to exit with
0; what reads our stdout has to be asked by the shell (`set -o pipefail`). A command gets no terminal: it must not ask.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import shlex
import signal
import stat
import struct
import subprocess
import sys
import termios
import threading
from collections import deque
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.abc

from pipeline.errors import PlanError, StageError, StoreError, first_error
from pipeline.events import UploadOpened, UploadRemoved
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Piece, RangeReader, StoredImage
from pipeline.flow.orders import SEQUENTIAL_SINK, Order
from pipeline.flow.pacing import RATE_MIN, RateLimit
from pipeline.flow.parallel import in_thread
from pipeline.flow.placement import is_of_disk, lies_on_disk
from pipeline.flow.stage import NOTHING, SinkPlan, SinkRequest, StageContext, StageSpec, option, pieces
from pipeline.units import KiB, MiB, Size

# A command that is told to end gets this long before it is killed, and as long again to be gone.
_END_S = 5.0
# What a command said last is waited for this long after its end.
_LAST_WORDS_S = 1.0
# How long a thread waits for room in the pipe before it looks whether it is still wanted.
_POLL_MS = 100
# How often it is looked whether the last bytes were taken.
_DRAIN_EVERY_S = 0.01
# The most that an ordinary user may ask for. With the usual 64 KiB, writer and reader change places 16 times as often.
_PIPE_SIZE = MiB
# Written at once from zeros; and what one thread call writes of them, so that progress is seen.
_ZEROS = memoryview(bytes(MiB))
_ZEROS_AT_ONCE = 64 * MiB
_SPOKEN_MAX = 4 * KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of write.pipe."""

    command: tuple[str, ...] | None = option(
        None,
        doc="Program and arguments that take the image on stdin, no shell; without it, the image goes to stdout.",
    )
    rate_limit: Size | None = option(None, doc='Send at most this much a second, as in "40 MiB".', minimum=RATE_MIN)

    def __post_init__(self) -> None:
        if self.command is not None and not (self.command and self.command[0]):
            raise ValueError('command must name a program, for example ["ssh", "host", "cat > web01.raw"]')


class PipeWriter:
    """Writes the pieces into a pipe, as fast as the other end takes them."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._command = options.command
        self._context = context
        self._limit = RateLimit(context.clock, options.rate_limit)
        self._at_once = _ZEROS_AT_ONCE if options.rate_limit is None else self._limit.bite
        self._fd = -1
        self._process: anyio.abc.Process | None = None
        self._spoken: deque[bytes] = deque()
        self._heard = anyio.Event()
        self._is_prompt = True  # a write never waits
        self._written = 0
        self._unwanted = threading.Event()

    @property
    def _uri(self) -> str:
        return f"pipe:/{self._context.export_name or 'image'}"

    @property
    def _target(self) -> str:
        return shlex.join(self._command) if self._command else "stdout"

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """See that there is somebody to write to.

        Raises:
            PlanError: stdout is a terminal or closed, or the program is not there.
        """
        if self._command:
            import shutil

            if shutil.which(self._command[0]) is None:
                raise PlanError(
                    f"there is no program {self._command[0]}",
                    operation="plan",
                    hint="Install it, or name it with its path. There is no shell: one word a list item.",
                )
            return SinkPlan(summary=(("command", self._target),))
        if sys.__stdout__ is None:  # its number may belong to another file by now
            raise PlanError(
                "stdout is closed, and the image is to go there",
                operation="plan",
                hint="Send it on (pipeline run export.toml | ssh host 'cat > web01.raw'), or set command.",
            )
        if os.isatty(1):
            raise PlanError(
                "stdout is a terminal, and the image is to go there",
                operation="plan",
                hint="Send it on (pipeline run export.toml | ssh host 'cat > web01.raw'), or set command.",
            )
        if request.source_path and os.path.exists(request.source_path):
            self._refuse_source(Path(request.source_path))
        return SinkPlan(summary=(("stdout", "takes the image"),))

    def _refuse_source(self, disk: Path) -> None:
        """The shell has opened stdout: what it opened may be what is read, or lie on it."""
        target = os.fstat(1)
        if is_of_disk(target, disk):
            raise PlanError(
                "stdout is the source", operation="plan", path=disk, hint="Send the image to another file or disk."
            )
        if stat.S_ISREG(target.st_mode) and lies_on_disk(Path("/dev/fd/1"), disk):
            raise PlanError(
                "stdout is a file on the disk that is exported",
                operation="plan",
                disk=disk,
                hint="Send it to another disk, a network share or another machine.",
            )

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
        """Write every piece, close the pipe, and wait until the command has exited with 0.

        Raises:
            StoreError: the command failed, or nobody reads any more.
            StageError: guest bytes are missing; the command was ended without an end of its input.
        Cancellation: the command's process group is ended first, so that it does not take the cut for an end.
        """
        self._open_stdout() if self._command is None else await self._start(self._command)
        self._context.emit(UploadOpened(stage=self._context.name, uri=self._target))
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch)
                if self._process is not None:
                    tasks.start_soon(self._listen, self._process)
                await self._write_all(inlet)
                with self._context.meter.working():
                    await self._seal()
                tasks.cancel_scope.cancel()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._abort()
            if isinstance(error, BaseExceptionGroup):
                raise first_error(error) from error
            raise
        await outlet.send(StoredImage(self._uri, self._written, _Refusal))

    # -- the other end ---------------------------------------------------------------------------------------------

    def _open_stdout(self) -> None:
        """A descriptor of our own that never blocks: the one that we were given is shared with others."""
        fd = os.dup(1)
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                os.close(fd)
                fd = own
                _enlarge(fd)
        except OSError:
            pass  # no /proc, or a pipe of another user: written to as it is
        self._fd = fd
        self._is_prompt = not os.get_blocking(fd) or stat.S_ISREG(os.fstat(fd).st_mode)

    async def _start(self, command: tuple[str, ...]) -> None:
        taken, self._fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        _enlarge(self._fd)
        try:
            # Its own session, so that all of it can be ended together, and Ctrl-C reaches it through us.
            self._process = await anyio.open_process(
                list(command),
                stdin=taken,
                stdout=sys.__stderr__.fileno() if sys.__stderr__ else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            self._close_fd()
            raise StoreError(
                f"the command can't be started: {os.strerror(error.errno or 0)}",
                operation="start",
                command=self._target,
            ) from None
        finally:
            os.close(taken)

    async def _listen(self, process: anyio.abc.Process) -> None:
        """Keep the end of what the command says on stderr."""
        if process.stderr is not None:
            async for part in process.stderr:
                self._spoken.append(part[-_SPOKEN_MAX:])
                while sum(map(len, self._spoken)) - len(self._spoken[0]) >= _SPOKEN_MAX:
                    self._spoken.popleft()
        self._heard.set()

    async def _watch(self) -> None:
        """Tell the thread that writes when nobody waits for it any more."""
        try:
            await anyio.sleep_forever()
        finally:
            self._unwanted.set()

    # -- writing ---------------------------------------------------------------------------------------------------

    async def _write_all(self, inlet: Inlet[Piece]) -> None:
        guest_bytes = 0
        async for piece in inlet:
            if piece.offset != self._written:
                piece.release()
                raise StageError(
                    "a piece came out of order", operation="write", offset=piece.offset, expected=self._written
                )
            with self._context.meter.working():
                view = piece.view
                if view is not None:
                    await self._write(view)
                    self._context.progress.acknowledge(guest_bytes=piece.guest_bytes, image_bytes=piece.length)
                else:
                    await self._write_zeros(piece)
            guest_bytes += piece.guest_bytes
            piece.release()
        layout, size = self._context.layout, self._context.disk_size
        if guest_bytes != size or (layout and layout.image_bytes not in (None, self._written)):
            raise StageError(
                f"{guest_bytes} of {size} guest bytes were written; the end of the image was not sent",
                operation="seal",
                image_bytes=self._written,
            )

    async def _write_zeros(self, piece: Piece) -> None:
        done = counted = 0
        while done < piece.length:
            length = min(self._at_once, piece.length - done)
            await self._limit.wait(length)
            await self._call(partial(self._put_zeros, length))
            done += length
            share = piece.guest_bytes * done // piece.length
            self._context.progress.acknowledge(guest_bytes=share - counted, image_bytes=length)
            counted = share

    async def _write(self, view: memoryview) -> None:
        for start in range(0, view.nbytes, self._at_once):
            part = view[start : start + self._at_once]
            await self._limit.wait(part.nbytes)
            await self._write_part(part)

    async def _write_part(self, view: memoryview) -> None:
        if view.nbytes < MiB and self._is_prompt:
            # What the pipe has room for goes on the spot: it takes less than the trip to a thread and back.
            try:
                view = view[self._write_some(view) :]
            except StoreError as error:
                raise await self._explained(error) from None
        if view.nbytes:
            await self._call(partial(self._put, view))

    async def _call(self, call: partial[None]) -> None:
        try:
            await in_thread(self._context.threads, call)
        except StoreError as error:
            raise await self._explained(error) from None

    def _put_zeros(self, length: int) -> None:
        for start in range(0, length, len(_ZEROS)):
            self._put(_ZEROS[: length - start])

    def _put(self, view: memoryview) -> None:
        """Write all of it. Threads: any, one at a time; comes back soon after nobody waits any more."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while view.nbytes and not self._unwanted.is_set():
            done = self._write_some(view)
            view = view[done:]
            if not done:
                poll.poll(_POLL_MS)

    def _write_some(self, view: memoryview) -> int:
        try:
            done = os.write(self._fd, view[:MiB])
        except BlockingIOError:
            return 0
        except OSError as error:
            reason = "nobody reads it any more" if error.errno == errno.EPIPE else os.strerror(error.errno or 0)
            raise StoreError(
                f"the image can't be written to {self._target}: {reason}",
                operation="write",
                hint=_HINTS.get(error.errno or 0, ""),
                written=self._written,
            ) from None
        self._written += done
        return done

    # -- the end ---------------------------------------------------------------------------------------------------

    async def _seal(self) -> None:
        """See that the last byte was taken, end the input, and wait for the command's verdict."""
        if self._process is None:
            await self._drain()
            self._close_fd()
            return
        await self._drain()
        self._close_fd()
        await self._process.wait()
        if self._process.returncode:
            raise await self._failed("failed")

    async def _drain(self) -> None:
        while (waiting := _unread(self._fd)) and not self._unwanted.is_set():
            gone = _nobody_reads(self._fd)
            if gone or (self._process is not None and self._process.returncode is not None):
                error = StoreError(
                    f"the last {waiting} bytes of the image were not taken by {self._target}",
                    operation="seal",
                    hint=_HINTS[errno.EPIPE],
                    written=self._written,
                )
                raise await self._explained(error)
            await self._context.clock.sleep(_DRAIN_EVERY_S)

    async def _explained(self, error: StoreError) -> StoreError:
        """The command's own account, where it ends now."""
        if self._process is None:
            return error
        with anyio.move_on_after(_END_S):
            await self._process.wait()
        if self._process.returncode is None:
            return error
        return await self._failed("ended before it had all of the image")

    async def _failed(self, how: str) -> StoreError:
        assert self._process is not None, "only a command fails"
        with anyio.move_on_after(_LAST_WORDS_S):  # something that it started may hold its stderr open
            await self._heard.wait()
        code = self._process.returncode or 0
        said = b"".join(self._spoken)[-_SPOKEN_MAX:].decode(errors="replace").strip()
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        last = said.splitlines()[-1] if said else ""
        return StoreError(
            f"the command {how}, with {ended}" + (f": {last}" if last else ""),
            operation="write",
            hint=f"It said:\n{said}"
            if "\n" in said
            else "Try it by hand: it has no terminal here, so it must not ask.",
            command=self._target,
            written=self._written,
        )

    async def _abort(self) -> None:
        """End the command before its input ends, or it would take what it has for a whole image."""
        process = self._process
        if process is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.returncode is not None:
                    break
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    pass
                with anyio.move_on_after(_END_S):
                    await process.wait()
            self._context.emit(UploadRemoved(uri=self._target, how="the command was ended"))
        self._close_fd()

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    # -- nothing to publish ------------------------------------------------------------------------------------------

    async def publish(self, manifest: bytes) -> str:
        """The manifest stays here."""
        return ""

    async def withdraw(self) -> None:
        """What was taken can't be taken back."""

    async def close(self) -> None:
        """Let the pipe go; idempotent."""
        self._close_fd()
        if self._process is not None and self._process.returncode is not None:  # else it can't even be killed
            await self._process.aclose()
        self._process = None


class _Refusal(AbstractAsyncContextManager[RangeReader]):
    """What went through a pipe can't be read; the wiring refuses verify.* behind this stage."""

    async def __aenter__(self) -> RangeReader:
        raise StageError("what went through a pipe can't be read again")

    async def __aexit__(self, *error: object) -> None:
        return None


def _enlarge(fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    except OSError:
        pass  # the limit of this user is lower: slower, not wrong


def _unread(fd: int) -> int:
    """Bytes in the pipe that nobody has taken yet; 0 where it is none."""
    try:
        found: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0]
    except OSError:
        return 0
    return found if stat.S_ISFIFO(os.fstat(fd).st_mode) else 0


def _nobody_reads(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


_HINTS = {
    errno.EPIPE: "What takes the image ended too early; look at what it said.",
    errno.ENOSPC: "The target is full. Free space there, compress (compress.zstd), or choose another target.",
}


SPEC = StageSpec(
    name="write.pipe",
    summary="Hand the image to a command's stdin, or write it to stdout; its exit status counts, nothing is read back.",
    options=Options,
    takes=pieces(Order.SEQUENTIAL),
    gives=NOTHING,
    build=PipeWriter,
    sink=SEQUENTIAL_SINK,
    holds_stdout=lambda options: options.command is None,
)
