"""How the code is laid out: who imports whom, what modules are called, what is documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "stages")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = ("numpy", "aiohttp", "botocore", "awscrt", "isal", "zlib_ng", "zstandard", "lz4", "blake3", "deflate", "rich")
# Hosts of package registries; a file that names one works on one machine only.
REGISTRIES = re.compile(r"https?://[^\s\"'/]*(pypi|pythonhosted|npmjs|crates\.io|artifactory|nexus)[^\s\"'/]*")


def tracked() -> list[Path]:
    """Every file that git keeps, and those that are not ignored; all files where there is no git."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.splitlines() if (path := ROOT / name).is_file()]


def imports(path: Path) -> Iterator[str]:
    """The modules that a module imports anywhere in it, by their full names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (str(one.value) for one in node.args[:1] if isinstance(one, ast.Constant))


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in MODULES if short(path).startswith("pipeline/")], ids=short)
def test_the_engine_knows_no_stage(path: Path) -> None:
    """But the commands, which put both together."""
    found = [name for name in imports(path) if name.partition(".")[0] == "stages"]
    assert not found or short(path).startswith("pipeline/commands/"), found


def test_nothing_of_the_product_needs_the_tests() -> None:
    for path in MODULES:
        assert not [name for name in imports(path) if name.partition(".")[0] in ("tests", "perf")], short(path)


def test_catalog_and_verbs_bring_nothing_heavy_with_them() -> None:
    """`pipeline --help` and `pipeline check` stay quick: nothing heavy comes with the catalog or the verbs."""
    verbs = [f"pipeline.commands.{path.stem}" for path in (ROOT / "pipeline/commands").glob("[a-z]*.py")]
    names = ", ".join(("sys", "stages.catalog", *verbs))
    code = f"import {names}\nlist(stages.catalog.CATALOG)\nprint([one for one in {HEAVY} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc", "core", "lib"}
    folders = [path for package in (*PACKAGES, "tests", "perf") for path in (ROOT / package).rglob("*")]
    named = [path for path in folders if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")]
    assert not [short(path) for path in named if path.stem in empty]


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_every_module_and_everything_public_in_it_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if node.name == "Options":
                continue  # every field of it has a sentence of its own
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_packages_hold_a_docstring_and_reexports_only() -> None:
    for path in MODULES:
        if path.name == "__init__.py":
            allowed = ast.Expr | ast.Import | ast.ImportFrom | ast.Assign
            assert all(isinstance(node, allowed) for node in ast.parse(path.read_text()).body), short(path)


@pytest.mark.parametrize("option, page", [("--markdown", "stages.md"), ("--formats", "formats.md")])
def test_pages_about_stages_say_what_the_catalog_says(option: str, page: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "stages", option], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == (ROOT / "docs" / page).read_text(), "run `make docs`"


def test_no_file_names_a_machine_or_a_registry() -> None:
    machine = "/" + "work/"
    for path in tracked():
        text = path.read_bytes().decode(errors="replace")
        assert machine not in text, f"{short(path)} names a path of one machine"
        assert not REGISTRIES.search(text), f"{short(path)} names a registry"


def test_links_of_the_documents_lead_somewhere() -> None:
    for path in tracked():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
                assert (path.parent / target).exists(), f"{short(path)} links to {target}"
