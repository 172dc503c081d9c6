"""The program as such: verbs, help, wrong usage."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from pipeline import __version__
from pipeline.__main__ import VERBS
from tests.commands.conftest import Call

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
    assert 'There is no verb "zzz": there are run, check, plan, verify, stages' in call("zzz").err


@pytest.mark.parametrize("arguments", [["check"], ["check", "a", "b"], ["run", "--fast"], ["--fast"]])
def test_wrong_usage_exits_2(call: Call, arguments: list[str]) -> None:
    assert call(*arguments).code == 2
