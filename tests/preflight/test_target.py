"""`[target]` of an export file: faults of the chain at their places, sizes in the plan, the gate before any byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.units import MiB
from stages.preflight.profile import find_profile, names
from tests.preflight.disks import grub_sectors

FILE = """\
[export]
name = "web01"

[target]
profile = "{profile}"
{more}

[[stage]]
use  = "read.disk"
path = "{disk}"

[[stage]]
use = "encode.{encoder}"
{options}

[[stage]]
use  = "write.file"
path = "{out}"
"""


def write_export(folder: Path, *, disk: Path | None = None, profile: str = "tencent", more: str = "",
                 encoder: str = "qcow2", options: str = "") -> Path:  # fmt: skip
    """An export file in a folder of its own."""
    file = folder / "export.toml"
    out = folder / "image"
    text = FILE.format(
        profile=profile, more=more, disk=disk or folder / "disk", encoder=encoder, options=options, out=out
    )
    file.write_text(text)
    return file


def call(*words: object) -> tuple[int, str, str]:
    """The program with the real catalog."""
    done = CliRunner().invoke(main, [str(one) for one in words], prog_name="pipeline")
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(
    "profile, encoder, options, said",
    [
        ("azure", "vhd", "", 'write use = "encode.vhd" with variant = "fixed"'),
        ("azure", "qcow2", "", 'write use = "encode.vhd" with variant = "fixed"'),
        ("tencent", "qcow2", 'compression = "zstd"', 'with compression = "zlib"'),
        ("tencent", "vhdx", "", 'write use = "encode.qcow2" with compression = "zlib"'),
        ("gcp", "raw", "", 'write use = "encode.gce"'),
        ("aws-import", "vmdk", 'variant = "monolithicSparse"', 'with variant = "streamOptimized"'),
    ],
)
def test_a_format_that_is_not_taken_is_told_with_the_right_one(
    tmp_path: Path, profile: str, encoder: str, options: str, said: str
) -> None:
    file = write_export(tmp_path, profile=profile, encoder=encoder, options=options)
    code, _, err = call("check", file)
    assert code == 2
    assert "export.toml:13:7: " in err
    assert f"{profile} does not take" in err
    assert said in err


@pytest.mark.parametrize("name", names())
def test_what_a_profile_proposes_first_is_taken(tmp_path: Path, name: str) -> None:
    format, _, variant = find_profile(name).formats[0].partition(":")
    option = {"vhd": "variant", "vmdk": "variant", "qcow2": "compression"}.get(format)
    options = f'{option} = "{variant}"' if variant else ""
    assert call("check", write_export(tmp_path, profile=name, encoder=format, options=options))[0] == 0


def test_every_fault_of_the_section_has_its_place(tmp_path: Path) -> None:
    file = write_export(tmp_path, profile="tencent-migrate", more='boot_mode = "uefi"\nignore = ["disk.tabel"]')
    code, _, err = call("check", file)
    assert code == 2
    assert "export.toml:6:13: boot_mode: tencent-migrate starts machines by bios" in err
    assert 'there is no rule "disk.tabel"' in err
    assert 'did you mean "disk.table"?' in err


def test_an_unknown_profile_is_a_fault_with_what_was_meant(tmp_path: Path) -> None:
    code, _, err = call("check", write_export(tmp_path, profile="tencnet"))
    assert code == 2
    assert "export.toml:5:11: there is no profile" in err
    assert 'did you mean "tencent"?' in err


def test_a_compressed_stream_is_refused(tmp_path: Path) -> None:
    file = write_export(tmp_path, encoder="raw")
    text = file.read_text().replace(
        '[[stage]]\nuse  = "write.file"', '[[stage]]\nuse = "compress.zstd"\n[[stage]]\nuse  = "write.file"'
    )
    file.write_text(text)
    code, _, err = call("check", file)
    assert code == 2
    assert "takes no image inside of a compressed stream" in err


def test_a_profile_of_ones_own_is_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\ntitle = "Ours"\nformats = ["raw"]\n')
    code, _, err = call("check", write_export(tmp_path, profile="./mine.toml"))
    assert code == 2
    assert "mine does not take qcow2" in err


def test_the_plan_refuses_a_disk_that_is_too_large(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(600 << 30)
    code, _, err = call("plan", write_export(tmp_path, disk=disk))
    assert code == 2
    assert "tencent takes disks of 500 GiB" in err
    assert call("plan", write_export(tmp_path, disk=disk, more='ignore = ["out.size"]'))[0] == 0


def test_the_plan_refuses_a_size_that_is_no_whole_unit(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB + 512))
    code, _, err = call("plan", write_export(tmp_path, disk=disk))
    assert code == 2
    assert "whole 1 MiB" in err


def data_disk(path: Path) -> Path:
    """A disk without a table and without a system."""
    path.write_bytes(bytes(4 * MiB))
    return path


def test_the_gate_stops_a_run_before_the_first_byte(tmp_path: Path) -> None:
    """A disk that cannot boot: exit 5, nothing is stored, the remedy is one command away."""
    disk = data_disk(tmp_path / "disk")
    disk.write_bytes(grub_sectors()[0] + bytes(4 * MiB - 512))
    code, out, err = call("run", write_export(tmp_path, disk=disk), "--quiet")
    assert code == 5, err
    assert "no system was found on the disk" in err
    assert "pipeline preflight" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "export.toml"]
    code, out, _ = call("run", write_export(tmp_path, disk=disk), "--json")
    told = [json.loads(line) for line in out.splitlines()]
    done = next(one for one in told if one["type"] == "preflight_done")
    assert done["verdict"] == "blocked"
    assert [one["id"] for one in done["findings"] if one["severity"] == "block"] == ["layout.system"]


def test_a_data_disk_passes_and_what_was_found_is_in_the_manifest_and_the_report(tmp_path: Path) -> None:
    disk = data_disk(tmp_path / "disk")
    file = write_export(tmp_path, disk=disk, more='kind = "data"\nignore = ["fs.clean"]')
    file.write_text(file.read_text() + f'\n[observe]\nreport = "{tmp_path}/report.html"\n')
    code, _, err = call("run", file, "--quiet")
    assert code == 0, err
    manifest = json.loads((tmp_path / "image.manifest.json").read_text())
    assert manifest["preflight"]["profile"] == "tencent"
    assert manifest["preflight"]["kind"] == "data"
    assert manifest["preflight"]["ignored"] == ["fs.clean"]
    assert [one["id"] for one in manifest["preflight"]["findings"]] == ["fs.clean"]
    assert manifest["options"]["target"]["profile"] == "tencent"
    page = (tmp_path / "report.html").read_text()
    assert "Will it boot there?" in page
    assert "fs.clean: ignored" in page


@pytest.mark.parametrize("name", names())
def test_init_writes_an_export_for_a_profile_that_passes_the_check(tmp_path: Path, name: str) -> None:
    disk = data_disk(tmp_path / "disk.raw")
    file = tmp_path / "made.toml"
    code, _, err = call("init", disk, tmp_path / "image", "--profile", name, "-o", file)
    assert code == 0, err
    assert f'profile = "{name}"' in file.read_text()
    code, _, err = call("check", file)
    assert code == 0, err
