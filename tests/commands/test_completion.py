"""The Tab key in real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.catalog import CATALOG

SCRIPTS = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{SCRIPTS}:{os.environ.get('PATH', '')}"}


def in_bash(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last word, after the script was evaluated as the help says."""
    quoted = " ".join(f"'{word}'" for word in words)
    script = (
        'eval "$(pipeline completion bash)"\n'
        f"COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}\n"
        f"_pipeline_completion pipeline '{words[-1]}' '{words[-2]}'\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """TOML files beside other files, and some in folders."""
    for name in ("export.toml", "extra.toml", "export.log", "configs/a.toml", "configs/b.toml", "deep/er/c.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden.toml").touch()
    return tmp_path


def test_bash_completes_verbs(folder: Path) -> None:
    assert in_bash(folder, "pipeline", "ver") == ["verify"]


def test_bash_completes_stage_names(folder: Path) -> None:
    expected = [name for name in CATALOG.names if name.startswith("encode.")]
    assert in_bash(folder, "pipeline", "stages", "encode.") == expected
    assert in_bash(folder, "pipeline", "stages", "nothing") == []


@pytest.mark.parametrize("verb", ["run", "check", "plan"])
def test_bash_completes_export_files_and_the_folders_on_the_way(folder: Path, verb: str) -> None:
    assert in_bash(folder, "pipeline", verb, "ex") == ["export.toml", "extra.toml"]
    assert in_bash(folder, "pipeline", verb, "configs/") == ["configs/a.toml", "configs/b.toml"]


def test_a_lone_folder_is_walked_into(folder: Path) -> None:
    """bash puts a space behind a lone word; behind a slash nobody wants it."""
    assert in_bash(folder, "pipeline", "run", "con") == ["configs/a.toml", "configs/b.toml"]
    assert in_bash(folder, "pipeline", "run", "dee") == ["deep/er/c.toml"]


def test_bash_completes_options_and_choices(folder: Path) -> None:
    assert in_bash(folder, "pipeline", "run", "--q") == ["--quiet"]
    assert in_bash(folder, "pipeline", "verify", "--level", "rea") == ["readback"]


def test_hidden_files_are_offered_only_when_asked_for(folder: Path) -> None:
    assert ".hidden.toml" not in in_bash(folder, "pipeline", "run", "")
    assert in_bash(folder, "pipeline", "run", ".hid") == [".hidden.toml"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script_with_the_line_that_installs_it(shell: str) -> None:
    done = subprocess.run(
        [SCRIPTS / "pipeline", "completion", shell], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    first, _, script = done.stdout.partition("\n")
    assert first.startswith("#")
    assert f"completion {shell}" in first
    assert "_PIPELINE_COMPLETE" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_ask_the_same_program(folder: Path, shell: str) -> None:
    words = {"COMP_WORDS": "pipeline stages verify.rec", "COMP_CWORD": "2" if shell == "zsh" else "verify.rec"}
    done = subprocess.run(
        [SCRIPTS / "pipeline"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**ENVIRONMENT, **words, "_PIPELINE_COMPLETE": f"{shell}_complete"},
        check=True,
    )
    assert "verify.receipt" in done.stdout


def test_another_shell_is_wrong_usage() -> None:
    done = subprocess.run(
        [SCRIPTS / "pipeline", "completion", "csh"], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 2
