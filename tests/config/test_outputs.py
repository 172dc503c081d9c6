"""Nothing that a run writes for itself may replace what it reads, what it stores, or the file that says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config.wiring import load_chain
from pipeline.errors import ConfigError
from stages.catalog import CATALOG
from tests.chains import write_toml

OUTPUTS = ("export.manifest", "export.journal", "observe.log_file", "observe.report", "observe.prometheus")


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """An export of disk.prom into out.prom: names that every one of these files may have."""
    (tmp_path / "disk.prom").write_bytes(bytes(4096))
    return write_toml(
        tmp_path / "export.prom",
        f'read.disk; path = "{tmp_path / "disk.prom"}"',
        "encode.raw",
        f'write.file; path = "{tmp_path / "out.prom"}"',
    )


def faults(toml: Path, *overrides: str) -> list[str]:
    try:
        load_chain(toml, CATALOG, overrides)
    except ConfigError as error:
        return [fault.reason for fault in error.faults]
    return []


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    "file, what", [("disk", "path of read.disk"), ("out", "path of write.file"), ("export", "this export file")]
)
def test_a_file_of_the_run_is_nothing_else(toml: Path, output: str, file: str, what: str) -> None:
    place = toml.with_name(f"{file}.prom")
    name = output.partition(".")[2]
    assert faults(toml, f"{output}={place}") == [f"{name}: {place} is {what}"]


def test_links_and_other_names_of_the_source_are_known(toml: Path) -> None:
    disk, hard, soft = (toml.with_name(name) for name in ("disk.prom", "hard.html", "soft.html"))
    os.link(disk, hard)
    soft.symlink_to(disk)
    for place in (hard, soft, toml.parent / "nowhere" / ".." / "disk.prom"):
        assert faults(toml, f"observe.report={place}") == [f"report: {place} is path of read.disk"]


def test_the_manifest_of_the_image_is_replaced_by_nothing_but_its_own_copy(toml: Path) -> None:
    place = toml.with_name("out.prom.manifest.json")
    assert faults(toml, f"observe.report={place}") == [f"report: {place} is the manifest of the image"]
    assert faults(toml, f"export.manifest={place}") == []


def test_two_files_of_a_run_are_two(toml: Path) -> None:
    place = toml.with_name("x.prom")
    both = (f"observe.report={place}", f"observe.prometheus={place}")
    assert faults(toml, *both) == [f"report: {place} is also prometheus in [observe]"]


def test_a_device_is_not_replaced_by_a_file_but_a_log_may_go_to_a_terminal(toml: Path) -> None:
    assert faults(toml, "observe.report=/dev/null") == ["report: /dev/null is no file, and would be replaced by one"]
    assert faults(toml, "observe.log_file=/dev/null") == []


def test_the_place_in_the_file_is_told(toml: Path) -> None:
    disk = toml.with_name("disk.prom")
    toml.write_text(toml.read_text() + f'\n[observe]\nreport = "{disk}"\n')
    with pytest.raises(ConfigError) as caught:
        load_chain(toml, CATALOG)
    [fault] = caught.value.faults
    assert fault.text == f'report = "{disk}"'
    assert fault.column == len("report = ") + 1


def test_an_override_is_not_told_at_the_line_that_it_overrides(toml: Path) -> None:
    toml.write_text(toml.read_text() + '\n[observe]\nreport = "good.html"\n')
    with pytest.raises(ConfigError) as caught:
        load_chain(toml, CATALOG, [f"observe.report={toml.with_name('disk.prom')}"])
    [fault] = caught.value.faults
    assert (fault.file, fault.line) == ("--set", 0)
