"""How a run looks where it is watched: a pipe, a reader that goes away, a narrow terminal, a program."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from tests.chains import write_toml
from tests.end_to_end.command import PROGRAM, call, environment
from tests.end_to_end.places import CHAIN

COLUMNS = 60


@pytest.fixture
def toml(tmp_path: Path, letters: Path) -> Path:
    target = f'write.file; path = "{tmp_path / "disk.qcow2"}"'
    source = f'read.disk; path = "{letters}"'
    return write_toml(tmp_path / "export.toml", source, *CHAIN, "encode.qcow2", target, "verify.readback")


def test_in_a_pipe_the_result_is_plain_lines_and_the_progress_too(toml: Path) -> None:
    said = call("run", toml)
    assert said.code == 0
    assert said.out.startswith("verified: identical\n")
    assert "sealed: " in said.err
    assert "\x1b" not in said.out + said.err
    assert "\r" not in said.out + said.err


@pytest.mark.parametrize("option", [(), ("--quiet",), ("--log-file", "/dev/null")])
def test_what_went_another_way_than_planned_is_told_once(
    toml: Path, option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the progress, in words; where there is none, by the log on stderr."""
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/state")
    said = call("run", toml, *option)
    assert said.code == 0
    assert said.err.count("no journal at ") == 1, said.err


@pytest.mark.parametrize("limit", [7, 8, 10])
def test_too_few_open_files_are_told_with_the_way_out(toml: Path, limit: int) -> None:
    command = f"ulimit -n {limit}; exec {' '.join(PROGRAM)} run {toml}"
    done = subprocess.run(
        ["bash", "-c", command], env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode in (1, 2), done.stderr
    assert "ulimit -n 1024" in done.stderr
    assert "Traceback" not in done.stderr


def test_quiet_says_the_result_only(toml: Path) -> None:
    said = call("run", toml, "--quiet")
    assert said.code == 0
    assert said.err == ""
    assert said.out.startswith("verified: identical\n")


def test_every_line_for_a_program_is_an_object_with_a_type(toml: Path) -> None:
    said = call("run", toml, "--json")
    kinds = [one["type"] for one in said.objects]
    assert (kinds[0], kinds[-1]) == ("run_planned", "run_finished")
    again = call("run", toml, "--json")
    assert again.code == 2
    assert again.last("run_failed")["hint"].startswith("Choose another name")


def test_reader_that_goes_away_does_not_end_the_run(toml: Path, tmp_path: Path) -> None:
    command = f"{' '.join(PROGRAM)} run {toml} --json | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "disk.qcow2.manifest.json").exists()


def test_narrow_terminal_shows_a_bar_and_no_line_that_breaks_it(toml: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    env = environment({"TERM": "xterm-256color"})
    process = subprocess.Popen([*PROGRAM, "run", str(toml)], env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # EIO: the other side is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "verify.readback" in text
    assert "100.0%" in text
    assert "verified: identical" in text
    bars = [line for line in re.split(r"[\r\n]+", text) if "━" in line]
    assert bars
    assert max(map(len, bars)) <= COLUMNS
