"""Servers come up once, and none stays: not when it is stopped, not when its owner or its guard is killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores.process import (
    Command,
    ProcessIdentity,
    ServerError,
    ServerProcess,
    end_run,
    free_ports,
    kept_ports,
    run_folder,
)

STUBBORN = "trap '' TERM; while :; do sleep 1; done"


def server(folder: Path, *scripts: str, stop_deadline_s: float = 3.0) -> ServerProcess:
    """A server of shell scripts, ready at once."""
    return ServerProcess(
        folder=folder,
        commands=[
            Command(name=f"part{number}", arguments=("/bin/sh", "-c", script)) for number, script in enumerate(scripts)
        ],
        is_ready=lambda: True,
        stop_deadline_s=stop_deadline_s,
    )


def wait_until_gone(*processes: ProcessIdentity) -> None:
    """Wait for the end of processes that are not our children."""
    for process in processes:
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        try:
            if process.is_running():
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                assert poll.poll(5000), f"{process} stays"
        finally:
            os.close(descriptor)


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[ServerProcess]:
    process = server(tmp_path, "exec sleep 100", "exec sleep 100")
    yield process
    process.kill()


def test_server_is_one_and_the_same_for_all_who_ask(sleeper: ServerProcess) -> None:
    sleeper.start()
    first = sleeper.processes()
    again = server(sleeper.folder, "exec sleep 100", "exec sleep 100")
    again.start()
    assert again.processes() == first
    assert len(first) == 3
    assert all(process.is_running() for process in first)
    again.kill()
    assert not sleeper.is_running()
    assert not any(process.is_running() for process in first)


def test_stopped_server_can_be_started_again(sleeper: ServerProcess) -> None:
    sleeper.start()
    first = sleeper.processes()
    sleeper.stop()
    assert not any(process.is_running() for process in first)
    sleeper.start()
    assert sleeper.is_running()
    assert not set(first) & set(sleeper.processes())


def test_server_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    stubborn = server(tmp_path, STUBBORN, stop_deadline_s=0.1)
    stubborn.start()
    processes = stubborn.processes()
    stubborn.stop()
    assert not any(process.is_running() for process in processes)


def test_server_that_lost_one_program_ends(sleeper: ServerProcess) -> None:
    sleeper.start()
    guard, first, second = sleeper.processes()
    first.signal(signal.SIGKILL)
    wait_until_gone(guard, second)


def test_killed_guard_takes_its_server_along(sleeper: ServerProcess) -> None:
    sleeper.start()
    guard, *programs = sleeper.processes()
    guard.signal(signal.SIGKILL)
    wait_until_gone(*programs)


def test_killed_owner_leaves_no_server(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from tests.stores.test_process import server
process = server(Path({str(tmp_path)!r}), "exec sleep 100", {STUBBORN!r})
process.start()
print(*[number for each in process.processes() for number in (each.pid, each.started)], flush=True)
time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        numbers = [int(word) for word in owner.stdout.readline().split()]
        processes = [ProcessIdentity(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
        assert len(processes) == 3
        assert all(process.is_running() for process in processes)
        owner.kill()
    wait_until_gone(*processes)


def test_server_outlives_the_thread_that_started_it(sleeper: ServerProcess) -> None:
    thread = threading.Thread(target=sleeper.start)
    thread.start()
    thread.join()
    sleeper.start()  # Looks for the server, and would start another.
    assert sleeper.is_running()
    assert len(list(sleeper.folder.glob("*.log"))) == 2


def test_server_that_does_not_come_up_shows_its_log_and_leaves_nothing(tmp_path: Path) -> None:
    process = ServerProcess(
        folder=tmp_path,
        commands=[Command(name="broken", arguments=("/bin/sh", "-c", "echo no such option; exit 3"))],
        is_ready=lambda: False,
    )
    with pytest.raises(ServerError, match="no such option"):
        process.start()
    assert not process.is_running()


def test_silent_server_is_given_up_at_its_deadline(tmp_path: Path) -> None:
    process = ServerProcess(
        folder=tmp_path,
        commands=[Command(name="silent", arguments=("/bin/sh", "-c", "exec sleep 100"))],
        is_ready=lambda: False,
        start_deadline_s=0.2,
    )
    with pytest.raises(ServerError, match=r"no answer .* in 0\.2 s"):
        process.start()
    assert not process.is_running()


def test_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    process = ServerProcess(
        folder=tmp_path, commands=[Command(name="x", arguments=("/no/such/program",))], is_ready=lambda: True
    )
    with pytest.raises(ServerError, match="/no/such/program"):
        process.start()


def test_recycled_pid_is_never_killed() -> None:
    with subprocess.Popen(["sleep", "100"]) as bystander:
        identity = ProcessIdentity.of(bystander.pid)
        assert identity is not None
        before = ProcessIdentity(identity.pid, identity.started - 1)
        assert not before.is_running()
        before.signal(signal.SIGKILL)
        assert bystander.poll() is None
        identity.signal(signal.SIGKILL)
        assert bystander.wait() == -signal.SIGKILL
        assert not identity.is_running()


def test_server_sees_nothing_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ours")
    out = tmp_path / "environment"
    process = ServerProcess(
        folder=tmp_path,
        commands=[
            Command(name="env", arguments=("/bin/sh", "-c", f"env > {out}.new; mv {out}.new {out}; exec sleep 100"))
        ],
        is_ready=out.exists,
    )
    process.start()
    process.kill()
    assert "AWS_" not in out.read_text()
    assert f"HOME={tmp_path}" in out.read_text()


def test_ports_are_kept_and_lie_below_the_outgoing_ones(tmp_path: Path) -> None:
    first = kept_ports(tmp_path, 3)
    assert kept_ports(tmp_path, 3) == first
    assert len(set(first)) == 3
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(port < lowest_outgoing for port in (*first, *free_ports(5)))


def test_end_of_a_run_ends_its_servers_and_removes_their_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIPELINE_TEST_CACHE", str(tmp_path))
    folder = run_folder() / "server"
    folder.mkdir()
    process = server(folder, "exec sleep 100")
    process.start()
    running = process.processes()
    end_run()
    assert not any(each.is_running() for each in running)
    assert list((tmp_path / "run").iterdir()) == []
