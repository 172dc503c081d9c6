"""Server processes: started on free ports in a folder of their own, found again, killed, restarted, never left behind.

What runs is written to `process.json` in the folder, with each process' start time, so that any process of a test
session may ask for the same server and get the running one, and so that a pid that the kernel has given to somebody
else is never killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.stores import guard

START_DEADLINE_S = 30.0
# Swift ends in 0.03 s; SeaweedFS needs 15 s, so it is killed.
STOP_DEADLINE_S = 3.0
_KILL_DEADLINE_S = 10.0
_PROBE_INTERVAL_S = 0.03
_LOG_TAIL = 3000


class ServerError(Exception):
    """A server did not start, or did not end."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process, for ever: a pid alone is given to another process sooner or later.

    Attributes:
        started: clock ticks since boot.
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """Identify a running process; None where there is none with this pid."""
        started = guard.start_time(pid)
        return None if started is None else cls(pid, started)

    def is_running(self) -> bool:
        """True while this process runs; a zombie has ended."""
        return guard.start_time(self.pid) == self.started

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process; nothing happens when it ended, whoever has its pid now."""
        descriptor = guard.open_pidfd(self.pid, self.started)
        if descriptor is None:
            return
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            pass
        finally:
            os.close(descriptor)


def this_process() -> ProcessIdentity:
    """The identity of the caller's own process."""
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    return identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One program of a server.

    Attributes:
        name: its log is `NAME.log` in the server's folder.
        environment: added to PATH, LANG and HOME (the folder); nothing else of the caller's is passed on, because AWS_*
            would change what a store server accepts.
    """

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    guard: ProcessIdentity
    servers: tuple[ProcessIdentity, ...]

    def write(self, path: Path) -> None:
        state = {"guard": self._pair(self.guard), "servers": [self._pair(server) for server in self.servers]}
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(state))
        fresh.replace(path)

    @classmethod
    def read(cls, path: Path) -> _Running | None:
        try:
            state = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        return cls(
            guard=ProcessIdentity(*state["guard"]),
            servers=tuple(ProcessIdentity(*pair) for pair in state["servers"]),
        )

    def end(self, number: signal.Signals, *, deadline_s: float) -> None:
        """Send a signal and wait until everything is gone."""
        # Killed servers are reaped by their guard, which then ends. Were it killed, they would be zombies for pid 1 to
        # find.
        for process in self.servers if number == signal.SIGKILL else (self.guard,):
            process.signal(number)
        ends = time.monotonic() + deadline_s
        while any(process.is_running() for process in self.all()):
            if time.monotonic() > ends:
                raise ServerError(f"{self} does not end")
            time.sleep(0.005)
        _reap()

    @staticmethod
    def _pair(process: ProcessIdentity) -> tuple[int, int]:
        return process.pid, process.started

    def all(self) -> tuple[ProcessIdentity, ...]:
        return self.guard, *self.servers


class ServerProcess:
    """One server, which may be several programs, running for an owner.

    Two objects on the same folder are the same server: what one starts the other finds, in this process or another.
    Threads: any. Async tests call `start`, `stop`, `kill` and `restart` through `anyio.to_thread.run_sync`; they block
    for seconds.
    """

    def __init__(
        self,
        *,
        folder: Path,
        commands: Sequence[Command],
        is_ready: Callable[[], bool],
        owner: ProcessIdentity | None = None,
        leftovers: Sequence[Path] = (),
        start_deadline_s: float = START_DEADLINE_S,
        stop_deadline_s: float = STOP_DEADLINE_S,
    ) -> None:
        """Describe a server; nothing is started.

        Args:
            folder: exists; holds the logs and the state, and is where the programs run.
            is_ready: one quick look at whether the server answers; called until it says so.
            owner: when it ends the server is killed; this process where none is given.
            leftovers: files outside the folder that a killed server does not remove; removed when it ended.
        """
        self.folder = folder
        self._commands = tuple(commands)
        self._is_ready = is_ready
        self._owner = owner or this_process()
        self._leftovers = tuple(leftovers)
        self._start_deadline_s = start_deadline_s
        self._stop_deadline_s = stop_deadline_s
        self._state = folder / "process.json"

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens when it runs already.

        Raises:
            ServerError: it ended or did not answer in time; says the end of its log. Nothing is left running.
        """
        with locked(self.folder / "process.lock"):
            running = _Running.read(self._state)
            if running is None or not running.guard.is_running():
                running = self._spawn()
                running.write(self._state)
            try:
                self._wait_until_ready(running)
            except BaseException:
                self._end(running, signal.SIGKILL)
                raise

    def stop(self) -> None:
        """Ask the server to end (SIGTERM), kill it when it takes too long, and wait until it is gone."""
        with locked(self.folder / "process.lock"):
            if running := _Running.read(self._state):
                self._end(running, signal.SIGTERM)

    def kill(self) -> None:
        """End the server at once, as `kill -9` or a power failure of its machine would, and wait until it is gone."""
        with locked(self.folder / "process.lock"):
            if running := _Running.read(self._state):
                self._end(running, signal.SIGKILL)

    def restart(self) -> None:
        """Kill the server when it runs, and start it again: same ports, same data."""
        self.kill()
        self.start()

    def is_running(self) -> bool:
        """True while every program of the server runs."""
        running = _Running.read(self._state)
        return running is not None and all(process.is_running() for process in running.all())

    def processes(self) -> tuple[ProcessIdentity, ...]:
        """The guard, then the programs; empty when nothing was started."""
        running = _Running.read(self._state)
        return () if running is None else running.all()

    def resident_bytes(self) -> int:
        """Memory that the server's programs hold now, without the guard."""
        total = 0
        for process in self.processes()[1:]:
            if process.is_running():
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                total += pages * os.sysconf("SC_PAGE_SIZE")
        return total

    def log_tail(self) -> str:
        """The end of each program's log."""
        tails = []
        for command in self._commands:
            path = self._log(command)
            if path.exists():
                tails.append(f"--- {path}\n{path.read_text(errors='replace')[-_LOG_TAIL:]}")
        return "\n".join(tails)

    def _end(self, running: _Running, number: signal.Signals) -> None:
        running.end(number, deadline_s=self._stop_deadline_s + _KILL_DEADLINE_S)
        self._state.unlink(missing_ok=True)

    def _log(self, command: Command) -> Path:
        return self.folder / f"{command.name}.log"

    def _spawn(self) -> _Running:
        base = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": str(self.folder)}
        orders: guard.Orders = {
            "owner": (self._owner.pid, self._owner.started),
            "folder": str(self.folder),
            "stop_deadline_s": self._stop_deadline_s,
            "leftovers": [str(path) for path in self._leftovers],
            "commands": [
                {
                    "arguments": list(command.arguments),
                    "environment": base | dict(command.environment),
                    "log": str(self._log(command)),
                }
                for command in self._commands
            ],
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # A Ctrl-C on the terminal is for the owner; the guard follows when the owner ends.
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        with process.stdin as told, process.stdout as answers, process.stderr as complaint:
            told.write(json.dumps(orders).encode())
            told.close()
            line = answers.readline()
            identity = ProcessIdentity.of(process.pid)
            if not line or identity is None:
                raise ServerError(f"the guard did not start {self._commands[0].name}: {complaint.read().decode()}")
        _guards.append(process)
        return _Running(guard=identity, servers=tuple(ProcessIdentity(*pair) for pair in json.loads(line)))

    def _wait_until_ready(self, running: _Running) -> None:
        ends = time.monotonic() + self._start_deadline_s
        while not self._is_ready():
            if not running.guard.is_running():
                raise ServerError(f"a server in {self.folder} ended while it was starting\n{self.log_tail()}")
            if time.monotonic() > ends:
                raise ServerError(f"no answer from {self.folder} in {self._start_deadline_s} s\n{self.log_tail()}")
            time.sleep(_PROBE_INTERVAL_S)


# Guards that this process started: waited for once they ended, so that no zombie stays.
_guards: list[subprocess.Popen[bytes]] = []


def _reap() -> None:
    for process in list(_guards):
        if process.poll() is not None and process in _guards:
            _guards.remove(process)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes, and between threads; the file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def free_ports(count: int) -> tuple[int, ...]:
    """Find TCP ports on 127.0.0.1 that nobody uses.

    They lie below the range that the kernel gives to outgoing connections, so that while a server is down for a restart
    no client can be given its port.
    """
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(10_000, max(first_ephemeral, 20_000))
    found: list[int] = []
    for port in random.Random().sample(candidates, len(candidates)):  # Not seeded: two sessions must not try the same.
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return tuple(found)
    raise ServerError(f"no {count} free ports on 127.0.0.1")


def kept_ports(folder: Path, count: int) -> tuple[int, ...]:
    """The ports of the server in this folder: chosen the first time, the same ever after."""
    path = folder / "ports.json"
    with locked(folder / "ports.lock"):
        if path.exists():
            return tuple(json.loads(path.read_text()))
        ports = free_ports(count)
        path.write_text(json.dumps(ports))
        return ports


def cache_folder() -> Path:
    """Where servers are installed and keep their data: PIPELINE_TEST_CACHE, or `.cache/stores` in the project."""
    given = os.environ.get("PIPELINE_TEST_CACHE")
    folder = Path(given) if given else Path(__file__).parents[2] / ".cache" / "stores"
    return folder.absolute()


def run_folder(owner: ProcessIdentity | None = None) -> Path:
    """The folder for everything that lives as long as the owner does (this process where none is given).

    Not under /tmp: Swift needs extended attributes, which a tmpfs has only since Linux 6.6, and a disk of data fills
    one.
    """
    folder = _run_folder(owner or this_process())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run_folder(owner: ProcessIdentity) -> Path:
    return cache_folder() / "run" / f"{owner.pid}-{owner.started}"


def fresh_folder(name: str, owner: ProcessIdentity | None = None) -> Path:
    """A new empty folder that nobody else has, inside the owner's."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=run_folder(owner)))


def end_run(owner: ProcessIdentity | None = None) -> None:
    """Kill every server in the owner's folder (this process' where none is given) and remove the folder."""
    owner = owner or this_process()
    folder = _run_folder(owner)
    for state in folder.glob("*/process.json"):
        if running := _Running.read(state):
            running.end(signal.SIGKILL, deadline_s=_KILL_DEADLINE_S)
    shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Remove the folders of owners that ended without doing so; their servers ended with them."""
    for folder in (cache_folder() / "run").glob("*-*"):
        pid, _, started = folder.name.partition("-")
        if guard.start_time(int(pid)) != int(started):
            shutil.rmtree(folder, ignore_errors=True)
