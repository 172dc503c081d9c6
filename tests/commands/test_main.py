"""The program as such: verbs, help, wrong usage."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import __version__
from pipeline.__main__ import VERBS
from tests.chains import write_toml
from tests.commands.conftest import Call
from tests.disks.letters import write_disk

HEAVY = ("anyio", "asyncio", "structlog", "rich", "numpy", "aiohttp", "botocore", "stages", "tomllib")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_and_version_import_nothing_that_takes_time(arguments: list[str]) -> None:
    """Imports are counted, not seconds: seconds depend on what else the machine does."""
    code = (
        "import sys\n"
        "from pipeline.__main__ import main\n"
        "try: main(prog_name='pipeline')\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_python_m_pipeline_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"pipeline, version {__version__}\n"


def test_help_lists_every_verb(call: Call) -> None:
    said = call("--help")
    assert said.code == 0
    for verb, (_, summary) in VERBS.items():
        assert f"  {verb}" in said.out
        assert summary in said.out


@pytest.mark.parametrize("verb", ["run", "check", "plan", "stages"])
def test_every_verb_has_help_and_the_options_that_all_have(call: Call, verb: str) -> None:
    said = call(verb, "--help")
    assert said.code == 0
    for option in ("--json", "--log-file", "--version"):
        assert option in said.out
    assert call(verb, "--version").out == f"pipeline, version {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_the_module_of_a_verb_is_named_like_it(verb: str) -> None:
    assert VERBS[verb][0] == f"pipeline.commands.{verb}"
    if importlib.util.find_spec(VERBS[verb][0]):
        assert importlib.import_module(VERBS[verb][0]).command.name == verb


def test_a_misspelt_verb_is_wrong_usage_with_a_way_out(call: Call) -> None:
    said = call("chek", "x")
    assert said.code == 2
    assert 'There is no verb "chek": did you mean "check"?' in said.err
    assert 'There is no verb "zzz": there are run, check, plan, verify, ' in call("zzz").err


@pytest.mark.parametrize("arguments", [["check"], ["check", "a", "b"], ["run", "--fast"], ["--fast"]])
def test_wrong_usage_exits_2(call: Call, arguments: list[str]) -> None:
    assert call(*arguments).code == 2


def test_a_run_imports_nothing_before_its_first_byte_that_its_chain_does_not_need(tmp_path: Path) -> None:
    """Disk to file, no log: neither the log's library nor a store's client is on the way."""
    write_disk(tmp_path / "disk.raw", "A")
    toml = write_toml(
        tmp_path / "x.toml",
        f'read.disk; path = "{tmp_path / "disk.raw"}"',
        "checksum.guest",
        "sparse.zeros",
        "encode.qcow2",
        f'write.file; path = "{tmp_path / "out.qcow2"}"',
        "verify.readback",
    )
    heavy = (
        "structlog",
        "rich",
        "aiohttp",
        "botocore",
        "awscrt",
        "asyncssh",
        "urllib.request",
        "stages.decode.opening",
    )
    code = (
        "import os, sys\n"
        "from stages.read.disk import DiskReader\n"
        "def stop(*_):\n"
        f"    print([name for name in {heavy} if name in sys.modules], flush=True)\n"
        "    os._exit(0)\n"
        "DiskReader.load = stop\n"
        "from pipeline.__main__ import main\n"
        "main(prog_name='pipeline')"
    )
    arguments = [sys.executable, "-c", code, "run", str(toml), "--quiet"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_closed_standard_streams_are_given_to_no_file() -> None:
    """Or what a library says on stderr would end up in the image."""
    script = "from pipeline.__main__ import main; import os, sys; main(['stages', '--json'], standalone_mode=False); "
    script += "sys.exit(os.open('/', os.O_RDONLY))"
    done = subprocess.run(f"exec {sys.executable} -c {shlex.quote(script)} <&- >&- 2>&-", shell=True, check=False)
    assert done.returncode > 2
