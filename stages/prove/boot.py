"""Start a guest from an image in a machine without screen and network, and watch whether it comes up.

The guest is untrusted: it writes into an overlay, has no network, and its QEMU runs under a seccomp filter, as nobody
where we are root, with bounded memory and processor time, and ends with us, however we end.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import anyio
import anyio.abc

from pipeline.units import GiB, KiB, MiB, format_duration, format_size
from stages.prove.judging import HANDED_OVER, LOGIN, NO_BOOT_CODE, Symptom, find_symptom, plain
from stages.prove.leash import leashed
from stages.prove.scratch import scratch_folder
from stages.prove.screen import is_blank, is_text_mode, png_of, text_of
from stages.prove.steps import StepResult
from stages.serve.disk import ServedDisk
from stages.serve.layer import open_layer
from stages.serve.server import NbdServer, listen_on_socket

Firmware = Literal["bios", "uefi"]
Video = Literal["cirrus", "std"]
QEMU: Final = "qemu-system-x86_64"
# Code and variables of OVMF as Debian, Fedora, openSUSE and Arch place them.
_OVMF: Final = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
)
# What QEMU itself needs beside the guest's memory: translated code, display, libraries. Address space, not memory.
_QEMU_MEMORY = 3072 * MiB
_TRANSLATIONS_MIB = 256
# What a guest may write before its disk is full: far more than a start needs, far less than would fill ours.
_OVERLAY_MAX = 4 * GiB
# Kept of the serial console: its begin and its end.
_LOG_HALF = 128 * KiB
_LOOK_EVERY_S = 0.5
# What a guest says within so long is judged together: judging looks at all that it has said.
_LISTEN_S = 0.1
# Of the screen's picture; a larger one is none of QEMU's.
_PICTURE_MAX = 64 * MiB
# A screen that has not changed for so long in the end, without a word on the serial console, stands still.
_STILL_S = 10.0
# Boot code that neither says nor reads anything for so long never will; from a far store a read takes seconds.
_DEAD_S = 20.0
# More restarts than this are a circle.
_RESETS_MAX = 4
# A failure is given this long to say more: the panic behind "unable to mount root".
_LAST_WORDS_S = 1.0
_END_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the guest is started on.

    Attributes:
        memory: of the guest, in bytes.
        pattern: what means that it came up; None: a login prompt.
        timeout_s: after which it is given up.
        kvm: use the processor's virtualisation; it has to work, which is not looked at.
    """

    firmware: Firmware = "bios"
    video: Video = "cirrus"
    memory: int = 1024 * MiB
    timeout_s: float = 120.0
    pattern: re.Pattern[str] | None = None
    kvm: bool = False


@dataclass(slots=True)
class _Seen:
    """What a guest has shown so far.

    Attributes:
        head, tail: of the serial console; `lost` bytes between them were not kept.
        changed_at, read_at: when the screen last changed, and the disk was last read; seconds of the clock.
    """

    head: str = ""
    tail: str = ""
    lost: int = 0
    picture: bytes = b""
    letters: str = ""
    changed_at: float = 0.0
    read_bytes: int = 0
    read_at: float = 0.0
    resets: int = 0
    ended: str = ""
    heard: anyio.Event = field(default_factory=anyio.Event)

    def hear(self, text: str) -> None:
        """Add to the serial console's text."""
        room = _LOG_HALF - len(self.head)
        self.head += text[:room]
        self.tail += text[room:]
        if len(self.tail) > 2 * _LOG_HALF:
            self.lost += len(self.tail) - _LOG_HALF
            self.tail = self.tail[-_LOG_HALF:]
        self.heard.set()

    @property
    def log(self) -> str:
        """The serial console, cut in the middle where it is long."""
        gap = f"\n[... {self.lost} characters ...]\n" if self.lost else ""
        return self.head + gap + self.tail

    @property
    def text(self) -> str:
        """All that can be searched."""
        return plain(self.log) + "\n" + self.letters


def why_not(machine: Machine) -> tuple[str, str] | None:
    """What is missing to start the machine, and what to install; None where all is there."""
    if shutil.which(QEMU) is None:
        return f"there is no {QEMU}", "Install it: apt install qemu-system-x86 (dnf install qemu-system-x86-core)."
    if machine.firmware == "uefi" and _ovmf() is None:
        return "there is no UEFI firmware for virtual machines", "Install it: apt install ovmf (dnf install edk2-ovmf)."
    return None


async def try_boot(
    disk: ServedDisk, machine: Machine, *, on_note: Callable[[str], None] = lambda note: None
) -> StepResult:
    """Start a guest from the disk, until it came up, failed, or its time is over.

    Args:
        disk: borrowed; only read.
        on_note: told what goes on, for people.
    Raises:
        PlanError: no overlay can be made.
    Cancellation: the machine is killed first.
    """
    if missing := why_not(machine):
        return StepResult(name="boot", state="unknown", summary=f"could not be tried: {missing[0]}", hint=missing[1])
    begun = time.monotonic()
    seen = _Seen(changed_at=begun)
    problems: list[str] = []
    async with _running(disk, machine, problems) as guest:
        on_note(f"booting ({machine.firmware}, {format_size(machine.memory)}, {'KVM' if machine.kvm else 'TCG'})")
        decision = await _watch(guest, machine, seen)
        elapsed = time.monotonic() - begun
        picture = png_of(seen.picture)
    state, summary, hint, details = decision
    evidence = {
        "firmware": machine.firmware,
        "accelerator": "kvm" if machine.kvm else "tcg",
        "read_bytes": str(guest.server.read_bytes),
        "written_bytes": str(guest.server.written_bytes),
        "seconds": f"{elapsed:.1f}",
        "resets": str(seen.resets),
    }
    details += (
        f"the guest read {format_size(guest.server.read_bytes)} and wrote "
        f"{format_size(guest.server.written_bytes)} into an overlay that is gone",
        *(f"while it ran: {problem}" for problem in problems[:5]),
    )
    return StepResult(
        name="boot",
        state=state,
        summary=summary,
        hint=hint,
        details=details,
        evidence=evidence,
        elapsed_s=elapsed,
        log=plain(seen.log),
        screen=picture,
    )


_Decision = tuple[Literal["passed", "failed", "unknown"], str, str, tuple[str, ...]]


async def _watch(guest: _Guest, machine: Machine, seen: _Seen) -> _Decision:
    """Look and listen until it can be told."""
    clock = time.monotonic
    ends = clock() + machine.timeout_s
    found: list[_Decision] = []

    async def listen() -> None:
        async for text in guest.serial():
            seen.hear(text)
        seen.ended = seen.ended or "the machine ended"
        seen.heard.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        failing_since = looked_at = 0.0
        while not found:
            with anyio.move_on_after(_LOOK_EVERY_S):
                await seen.heard.wait()
                await anyio.sleep(_LISTEN_S)
            seen.heard = anyio.Event()
            if clock() - looked_at >= _LOOK_EVERY_S:
                await guest.look(seen)
                looked_at = clock()
            now = clock()
            if came_up := _came_up(seen, machine.pattern):
                found.append(("passed", f"it came up: {came_up}", "", ()))
            elif find_symptom(seen.text) is not None:
                failing_since = failing_since or now
                if now - failing_since >= _LAST_WORDS_S or seen.ended:
                    found.append(_failed(seen))
            elif seen.resets > _RESETS_MAX:
                found.append(("failed", f"it restarts again and again ({seen.resets} times)", "", ()))
            elif seen.ended:
                found.append(_ended(seen, guest))
            elif _is_dead(seen, guest, now):
                found.append(_failed(seen, (NO_BOOT_CODE, "Booting from Hard Disk...")))
            elif now >= ends:
                found.append(_late(seen, machine, now))
        await guest.look(seen)
        tasks.cancel_scope.cancel()
    return found[0]


def _came_up(seen: _Seen, pattern: re.Pattern[str] | None) -> str:
    match = (pattern or LOGIN).search(seen.text)
    if match is None:
        return ""
    start = seen.text.rfind("\n", 0, match.start()) + 1
    return repr(seen.text[start : match.end()].strip()[-80:])


def _is_dead(seen: _Seen, guest: _Guest, now: float) -> bool:
    """Whether the boot code neither says nor reads anything."""
    if guest.server.read_bytes != seen.read_bytes:
        seen.read_bytes, seen.read_at = guest.server.read_bytes, now
    quiet_s = now - max(seen.changed_at, seen.read_at)
    return quiet_s >= _DEAD_S and not seen.log.strip() and HANDED_OVER.search(seen.letters) is not None


def _failed(seen: _Seen, found: tuple[Symptom, str] | None = None) -> _Decision:
    found = found or find_symptom(seen.text)
    assert found is not None, "asked only when there is one"
    symptom, line = found
    details = (f"it said: {line}",) + ((f"preflight looks for the cause: {symptom.rule}",) if symptom.rule else ())
    return "failed", symptom.reason, "", details


def _ended(seen: _Seen, guest: _Guest) -> _Decision:
    if "guest" in seen.ended:
        return "failed", f"{seen.ended} before it came up", "", ()
    return "unknown", f"{seen.ended}: {guest.complaint()}", "Is there enough memory? Look at the lines above.", ()


def _late(seen: _Seen, machine: Machine, now: float) -> _Decision:
    if not seen.log.strip() and seen.picture and not is_blank(seen.picture) and now - seen.changed_at >= _STILL_S:
        return _still(now - seen.changed_at)
    wait = format_duration(machine.timeout_s)
    last = next((line for line in reversed(plain(seen.log).splitlines()) if line.strip()), "")
    said = f'its last words were "{last.strip()[:100]}"' if last else "it said nothing on its serial console"
    hint = "Give it longer with --timeout; without a serial console (console=ttyS0) look at the screenshot."
    return "unknown", f"nothing decisive within {wait}; {said}", hint, ()


def _still(still_s: float) -> _Decision:
    return (
        "unknown",
        f"judged by its screen alone: it shows something, and has not changed for {format_duration(still_s)}",
        "It says nothing on its serial console (console=ttyS0) that means anything: look at the screenshot.",
        (),
    )


# ---- the machine -----------------------------------------------------------------------------------------------------


class _Guest:
    """A running QEMU: its serial console, its screen, its events."""

    def __init__(
        self, process: anyio.abc.Process, monitor: anyio.abc.ByteStream, server: NbdServer, folder: Path
    ) -> None:
        self.server = server
        self._process = process
        self._monitor = monitor
        self._folder = folder
        self._received = b""
        self._complaint = b""

    async def greet(self) -> None:
        """Begin to talk to the monitor."""
        await self._line()
        await self._order("qmp_capabilities")

    async def serial(self) -> AsyncIterator[str]:
        """What the guest writes to its serial console, until the machine ends."""
        assert self._process.stdout is not None, "a pipe"
        async for data in self._process.stdout:
            yield data.decode(errors="replace")

    async def listen_to_complaints(self) -> None:
        """Keep what QEMU says, a little of it."""
        assert self._process.stderr is not None, "a pipe"
        async for data in self._process.stderr:
            self._complaint = (self._complaint + data)[-4096:]

    def complaint(self) -> str:
        """What QEMU said last, in one line."""
        lines = [line for line in self._complaint.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit status {self._process.returncode}"

    async def look(self, seen: _Seen) -> None:
        """Take a picture of the screen, and read it where it shows text."""
        try:
            path = self._folder / "screen.ppm"
            await self._order("screendump", seen, filename=str(path))
            picture = _read_picture(path)
            letters = ""
            if is_text_mode(picture):
                dump = await self._order("human-monitor-command", seen, **{"command-line": "xp /2000hx 0xb8000"})
                letters = text_of(str(dump))
            # In text mode a blinking cursor changes the picture, and not the letters.
            if letters != seen.letters or (not letters and picture != seen.picture):
                seen.changed_at = time.monotonic()
            seen.picture, seen.letters = picture or seen.picture, letters
        except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError, TimeoutError):
            seen.ended = seen.ended or "the machine ended"

    async def _order(self, command: str, seen: _Seen | None = None, **arguments: object) -> Any:
        order = {"execute": command, **({"arguments": arguments} if arguments else {})}
        await self._monitor.send(json.dumps(order).encode() + b"\n")
        with anyio.fail_after(20):
            while True:
                answer = json.loads(await self._line())
                if "event" in answer and seen is not None:
                    self._note(answer, seen)
                if "return" in answer or "error" in answer:
                    return answer.get("return")

    def _note(self, event: dict[str, Any], seen: _Seen) -> None:
        reason = (event.get("data") or {}).get("reason", "")
        if event["event"] == "RESET" and (event.get("data") or {}).get("guest"):
            seen.resets += 1
        elif event["event"] == "SHUTDOWN":
            seen.ended = "the guest switched itself off" if "guest" in reason else f"the machine ended ({reason})"
        elif event["event"] == "GUEST_PANICKED":
            seen.hear("\n[the guest told its machine that it panicked]\nKernel panic\n")

    async def _line(self) -> bytes:
        while b"\n" not in self._received:
            if len(self._received) > MiB:
                raise anyio.EndOfStream
            self._received += await self._monitor.receive()
        line, _, self._received = self._received.partition(b"\n")
        return line


@asynccontextmanager
async def _running(disk: ServedDisk, machine: Machine, problems: list[str]) -> AsyncIterator[_Guest]:
    """A machine that runs while inside, with the disk served to it, on an overlay that goes with it."""
    user = _nobody()
    layer = open_layer(disk, None, limit=_OVERLAY_MAX)
    with scratch_folder() as folder, closing(layer):
        server = NbdServer(layer, on_problem=problems.append)
        socket = folder / "disk"
        listener = listen_on_socket(socket)
        variables = _copy_variables(folder) if machine.firmware == "uefi" else None
        for path in (folder, socket, *((variables,) if variables else ())):
            if user:
                os.chown(path, user, user)
        command = leashed(
            _command(machine, folder, socket, variables),
            signal=signal.SIGKILL,
            user=user,
            memory=machine.memory + _QEMU_MEMORY,
            cpu_s=int(4 * machine.timeout_s) + 60,
            file_size=64 * MiB,
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, listener)
            process = await anyio.open_process(command, stdin=None, env={"PATH": os.environ.get("PATH", os.defpath)})
            try:
                monitor = await _monitor(folder / "monitor", process)
                async with monitor:
                    guest = _Guest(process, monitor, server, folder)
                    tasks.start_soon(guest.listen_to_complaints)
                    await guest.greet()
                    yield guest
            finally:
                with anyio.CancelScope(shield=True):
                    if process.returncode is None:
                        process.kill()
                    with anyio.move_on_after(_END_S):
                        await process.wait()
            tasks.cancel_scope.cancel()


async def _monitor(path: Path, process: anyio.abc.Process) -> anyio.abc.SocketStream:
    """Connect to QEMU's monitor once it listens."""
    from pipeline.errors import PipelineError

    with anyio.move_on_after(20):
        while process.returncode is None:
            try:
                return await anyio.connect_unix(path)
            except OSError:
                await anyio.sleep(0.05)
    said = b""
    if process.stderr is not None:
        with anyio.move_on_after(1):
            async for data in process.stderr:
                said = (said + data)[-2000:]
    raise PipelineError(
        "the machine did not start", operation="boot", qemu=said.decode(errors="replace").strip()[-500:] or None
    )


def _read_picture(path: Path) -> bytes:
    """The file that QEMU wrote; empty where there is something else, for QEMU runs a stranger's system."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        return file.read() if stat.S_ISREG(status.st_mode) and status.st_size <= _PICTURE_MAX else b""


def _command(machine: Machine, folder: Path, socket: Path, variables: Path | None) -> list[str]:
    accelerator = ["-accel", "kvm", "-cpu", "host"] if machine.kvm else ["-accel", f"tcg,tb-size={_TRANSLATIONS_MIB}"]
    if not machine.kvm:
        accelerator += ["-cpu", "max"]
    code = _ovmf()
    firmware: list[str] = []
    if variables is not None and code is not None:
        firmware = ["-drive", f"if=pflash,format=raw,readonly=on,file={code[0]}"]
        firmware += ["-drive", f"if=pflash,format=raw,file={variables}"]
    blockdev = {
        "driver": "raw",
        "node-name": "disk",
        "discard": "unmap",
        "file": {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}, "export": ""},
    }
    return [
        *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc,vmport=off,usb=off"),
        *accelerator,
        *("-m", str(machine.memory // MiB), "-smp", "1"),
        # A guest that switches itself off, or panics, stands still, until it was asked why.
        "-no-shutdown",
        # The filter comes before the guest's first instruction: no new programs, no other user, no other priorities.
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-blockdev", json.dumps(blockdev), "-device", "virtio-blk-pci,drive=disk,bootindex=0"),
        # A card without a cable: what waits for one goes on sooner than without a card.
        *("-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-pci,netdev=net,romfile="),
        *("-device", "cirrus-vga" if machine.video == "cirrus" else "VGA"),
        *("-device", "virtio-rng-pci", "-device", "pvpanic"),
        *("-chardev", "stdio,id=serial,signal=off", "-serial", "chardev:serial"),
        *("-qmp", f"unix:{folder / 'monitor'},server=on,wait=off"),
        *firmware,
    ]


def _ovmf() -> tuple[str, str] | None:
    return next((pair for pair in _OVMF if all(Path(one).exists() for one in pair)), None)


def _copy_variables(folder: Path) -> Path:
    """The firmware's variables: the guest writes them, so it gets its own."""
    found = _ovmf()
    assert found is not None, "looked for before"
    path = folder / "variables.fd"
    shutil.copyfile(found[1], path)
    return path


def _nobody() -> int:
    """Who a machine runs as: nobody where we are root; 0: as ourselves."""
    if os.geteuid() != 0:
        return 0
    try:
        return pwd.getpwnam("nobody").pw_uid
    except KeyError:
        return 65534
