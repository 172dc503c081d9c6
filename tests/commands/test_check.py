"""`pipeline check`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.chains import write_toml
from tests.commands.conftest import Call
from tests.disks.letters import write_disk
from tests.end_to_end.command import call as call_installed


def test_a_good_file_shows_its_chain(call: Call, export_file: Path) -> None:
    said = call("check", export_file)
    assert (said.code, said.err) == (0, "")
    assert said.out == (
        f"{export_file} is fine: read.disk -> checksum.guest -> sparse.zeros -> encode.qcow2 -> write.s3 -> "
        f"verify.readback\n"
        f'Pieces travel in the order "head last". The next step: pipeline plan {export_file}\n'
    )


def test_a_good_file_is_one_json_object(call: Call, export_file: Path) -> None:
    [told] = call("check", export_file, "--json", "--set", "export.name=other").objects
    assert told["type"] == "checked"
    assert told["name"] == "other"
    assert told["chain"][-2:] == ["write.s3", "verify.readback"]
    assert told["order"] == "head last"


def test_faults_go_to_stderr_and_exit_2(call: Call, export_file: Path) -> None:
    export_file.write_text(export_file.read_text().replace('level = "small"', "levl = 1"))
    said = call("check", export_file, "--set", "export.memory=1 MiB")
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines() == [
        f'{export_file}:17:1: unknown option "levl" for encode.qcow2',
        "   17 | levl = 1",
        '      | ^^^^ did you mean "level"?',
        "--set: export.memory: 1 MiB is too little",
        "        at least 32 MiB",
        "2 faults in the configuration; nothing was touched",
    ]


def test_faults_are_json_objects_with_their_places(call: Call, export_file: Path) -> None:
    export_file.write_text(export_file.read_text().replace('level = "small"', "levl = 1"))
    said = call("check", export_file, "--json")
    fault, failed = said.objects
    assert said.code == 2
    assert fault == {
        "type": "fault",
        "reason": 'unknown option "levl" for encode.qcow2',
        "hint": 'did you mean "level"?',
        "file": str(export_file),
        "line": 17,
        "column": 1,
        "width": 4,
    }
    assert failed == {
        "type": "check_failed",
        "error": "1 fault in the configuration",
        "hint": "",
        "exit_code": 2,
    }


def test_a_log_that_cannot_be_opened_is_a_fault(call: Call, export_file: Path, tmp_path: Path) -> None:
    said = call("check", export_file, "--log-file", tmp_path / "no" / "log")
    assert said.code == 2
    assert said.err.startswith(f"--log-file: {tmp_path}/no/log can't be opened: no such file or directory\n")


@pytest.mark.parametrize("verb, following", [("check", "plan"), ("plan", "run")])
def test_the_next_step_is_a_command_that_can_be_pasted(tmp_path: Path, verb: str, following: str) -> None:
    """With the same overrides, and whatever the file is called."""
    disk = write_disk(tmp_path / "disk", "A", 4096)
    target = f"write.file.path={tmp_path}/other name.raw"
    toml = write_toml(tmp_path / "it's.toml", f'read.disk; path = "{disk}"', "encode.raw", 'write.file; path = "/x/y"')
    done = call_installed(verb, toml, "--set", target)
    assert done.code == 0, done.err
    told = done.out.splitlines()[-1].partition("The next step: ")[2]
    assert shlex.split(told) == ["pipeline", following, str(toml), "--set", target]
