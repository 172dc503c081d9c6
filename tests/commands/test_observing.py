"""`[observe] report` and `prometheus` on real runs: good ones, failed ones, places that can't be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from pipeline.__main__ import main
from pipeline.errors import SourceError
from pipeline.flow.items import Block
from stages.read.disk import DiskReader
from tests.chains import write_toml
from tests.commands.conftest import Said
from tests.disks.letters import write_disk


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A small disk into a raw file, verified."""
    write_disk(tmp_path / "disk.raw", "AB0-A")
    return write_toml(
        tmp_path / "export.toml",
        f'read.disk; path = "{tmp_path / "disk.raw"}"',
        "checksum.guest",
        "sparse.zeros",
        "encode.raw",
        f'write.file; path = "{tmp_path / "out.raw"}"',
        "verify.readback",
    )


def call(verb: str, *arguments: object) -> Said:
    result = CliRunner().invoke(main, [verb, *(str(one) for one in arguments)], prog_name="pipeline")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Said(result.exit_code, result.stdout, result.stderr)


def run(toml: Path, *arguments: object) -> Said:
    folder = toml.parent
    report, metrics = f"observe.report={folder / 'x.html'}", f"observe.prometheus={folder / 'x.prom'}"
    return call("run", toml, "--quiet", "--set", report, "--set", metrics, *arguments)


def metric(path: Path, name: str, **labels: str) -> float:
    [value] = [
        one.value
        for family in text_string_to_metric_families(path.read_text())
        for one in family.samples
        if one.name == f"disk_pipeline_{name}" and labels.items() <= one.labels.items()
    ]
    return value


def fail_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has a bad sector."""

    def load(self: DiskReader, block: Block, buffer: memoryview) -> None:
        raise SourceError("the medium is failing", operation="read", hint="Rescue it first.")

    monkeypatch.setattr(DiskReader, "load", load)


def test_a_good_run_leaves_a_page_and_metrics(toml: Path) -> None:
    assert run(toml).code == 0
    page = (toml.parent / "x.html").read_text()
    assert "Verified: identical" in page
    assert "5242880 bytes" in page
    assert metric(toml.parent / "x.prom", "phase", phase="finished", export="test") == 1
    assert metric(toml.parent / "x.prom", "acknowledged_bytes_total") == 5 << 20
    assert not [path for path in toml.parent.iterdir() if path.name.endswith(".new")]


def test_the_page_can_be_drawn_from_the_manifest_later(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toml.parent)
    assert run(toml).code == 0
    for named in ("out.raw.manifest.json", "out.raw", str(toml.parent / "out.raw")):
        (toml.parent / "out.raw.html").unlink(missing_ok=True)
        said = call("report", named)
        assert (said.code, said.out) == (0, "out.raw.html: test, identical\n")
        assert "Verified: identical" in (toml.parent / "out.raw.html").read_text()
    [told] = call("report", "out.raw", "-o", "other.html", "--json").objects
    assert (told["type"], told["file"], told["state"]) == ("reported", "other.html", "identical")
    assert (toml.parent / "other.html").exists()


def test_a_failed_run_leaves_a_page_that_says_why(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_reading(monkeypatch)
    assert run(toml).code == 1
    page = (toml.parent / "x.html").read_text()
    assert "Failed" in page
    assert "the medium is failing" in page
    assert "Rescue it first." in page
    assert "How far it came" in page
    assert metric(toml.parent / "x.prom", "phase", phase="failed") == 1
    assert metric(toml.parent / "x.prom", "exit_code") == 1


def test_a_run_that_never_began_leaves_the_page_of_the_last_one_alone(toml: Path) -> None:
    assert run(toml).code == 0
    before = (toml.parent / "x.html").read_bytes()
    assert run(toml).code == 2, "the target exists"
    assert (toml.parent / "x.html").read_bytes() == before
    assert metric(toml.parent / "x.prom", "exit_code") == 2


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_folder_that_is_not_there_is_told_before_anything_is_touched(toml: Path, verb: str) -> None:
    said = call(
        verb,
        toml,
        "--set",
        f"observe.report={toml.parent}/no/x.html",
        "--set",
        f"observe.prometheus={toml.parent}/no/x.prom",
    )
    assert said.code == 2
    assert f"[observe] report: the folder {toml.parent}/no does not exist" in said.err
    assert f"[observe] prometheus: the folder {toml.parent}/no does not exist" in said.err
    assert f"mkdir -p {toml.parent}/no" in said.err
    assert sorted(path.name for path in toml.parent.iterdir()) == ["disk.raw", "export.toml"]


def test_a_folder_in_place_of_the_file_is_told(toml: Path) -> None:
    (toml.parent / "x.html").mkdir()
    said = run(toml)
    assert said.code == 2
    assert f"{toml.parent}/x.html is a folder" in said.err


@pytest.mark.parametrize("length", [300, 255])
def test_a_name_that_is_too_long_is_told_before_anything_is_touched(toml: Path, length: int) -> None:
    said = call("run", toml, "--set", f"observe.report={toml.parent}/{'x' * length}")
    assert said.code == 2
    assert "can't be written: File name too long" in said.err


def test_metrics_that_node_exporter_would_not_read_are_refused(toml: Path) -> None:
    said = call("check", toml, "--set", "observe.prometheus=web01.txt")
    assert said.code == 2
    assert "prometheus must end in .prom" in said.err


@pytest.mark.parametrize("fails", [False, True])
def test_a_place_that_went_away_is_a_warning_and_fails_nothing(
    toml: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    gone = toml.parent / "gone"
    gone.mkdir()
    if fails:
        fail_reading(monkeypatch)
    real = os.access

    def look_and_remove(path: Path, mode: int) -> bool:
        found = real(path, mode)
        if path == gone:
            gone.rename(toml.parent / "elsewhere")
        return found

    monkeypatch.setattr("pipeline.observe.whole_files.os.access", look_and_remove)
    said = call("run", toml, "--quiet", "--set", f"observe.report={gone}/x.html")
    assert said.code == (1 if fails else 0)
    assert f"no report at {gone}/x.html" in said.err
    assert "no such file or directory" in said.err
    assert (toml.parent / "out.raw").exists() != fails


@pytest.mark.parametrize(
    "text, code, reason",
    [
        (None, 1, "x.raw does not exist, and neither does"),
        ("{}", 3, "this is not a manifest of an export"),
        ("not json", 3, "this is not a manifest of an export"),
    ],
)
def test_a_manifest_that_is_none_is_told(tmp_path: Path, text: str | None, code: int, reason: str) -> None:
    if text is not None:
        (tmp_path / "x.raw.manifest.json").write_text(text)
    said = call("report", tmp_path / "x.raw.manifest.json", "-o", tmp_path / "x.html")
    assert said.code == code
    assert reason in said.err
    assert not (tmp_path / "x.html").exists()


def test_a_missing_file_is_named_as_it_was_given(tmp_path: Path) -> None:
    said = call("report", tmp_path / "nosuch.json")
    assert said.code == 1
    assert f"{tmp_path / 'nosuch.json'} does not exist, and neither does {tmp_path / 'nosuch.json'}.man" in said.err
    (tmp_path / "nosuch.json").write_text("{}")
    assert "the manifest can't be read" in call("report", tmp_path / "nosuch.json").err


def test_a_page_that_cannot_be_written_is_told(toml: Path) -> None:
    assert run(toml).code == 0
    said = call("report", toml.parent / "out.raw", "-o", toml.parent / "no" / "x.html")
    assert said.code == 2
    assert "the page can't be written: no such file or directory" in said.err
