"""Profiles: data with sources, a typed loader with places, users' own, the provider's command."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.commands.profiles import facts_of, profile_lines
from pipeline.errors import ConfigError
from stages.preflight.importing import import_steps
from stages.preflight.profile import Profile, find_profile, load_profile, names
from stages.preflight.rules import all_rules

EXPECTED = {
    "tencent",
    "tencent-migrate",
    "aws-import",
    "azure",
    "gcp",
    "openstack",
    "alibaba",
    "oci",
    "proxmox",
    "generic",
}


def test_the_promised_profiles_are_there() -> None:
    assert set(names()) == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_everything_a_profile_says_has_a_source_that_was_read(name: str) -> None:
    profile = find_profile(name)
    text = (Path(__file__).parents[2] / "stages/preflight/profiles" / f"{name}.toml").read_text()
    said = {one.name for one in dataclasses.fields(Profile)} - {"name", "title", "notes", "told_by", "source"}
    written = {one for one in said if re.search(rf"^\[*{one}\b\s*[=\]]", text, re.M)}
    assert written == set(profile.told_by), "each field has a line in [told_by], and no other"
    for field, keys in profile.told_by.items():
        assert keys, field
        assert set(keys) <= set(profile.source), field
    assert all(re.fullmatch(r"20\d\d-\d\d", one.checked) for one in profile.source.values())
    assert profile.name == name


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_severities_name_rules_that_exist(name: str) -> None:
    ids = [rule.id for rule in all_rules()]
    for weight in find_profile(name).severity:
        assert any(id == weight.id or (weight.id.endswith("*") and id.startswith(weight.id[:-1])) for id in ids), weight


@pytest.mark.parametrize("name", sorted(EXPECTED))
@pytest.mark.parametrize("mode", ["bios", "uefi"])
def test_the_import_command_names_the_object(name: str, mode: str) -> None:
    steps = import_steps(find_profile(name), "s3://images/nightly/web01.qcow2", boot_mode=mode)  # type: ignore[arg-type]  # one of two
    assert steps
    assert any("web01" in step for step in steps)
    assert not any("{" in step.replace("${", "").replace("'[{", "").replace("={", "") for step in steps), steps


def test_a_faulty_profile_is_told_with_every_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\ntitel = "Mine"\nmax_virtual = "lots"\n[drivers]\nblok = []\n'
        '[[severity]]\nid = "x"\nlevel = "hard"\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_profile(file)
    told = str(caught.value)
    assert 'mine.toml:2:1: unknown option "titel"' in told
    assert 'did you mean "title"?' in told
    assert "mine.toml:3:1: max_virtual" in told
    assert 'mine.toml:5:1: unknown option "blok"' in told
    assert "level" in told
    assert 'missing option "title"' in told


def test_a_profile_that_is_no_toml_or_no_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("name = ")
    for name, said in (
        (str(tmp_path / "a.toml"), "a.toml:1"),
        (str(tmp_path / "b.toml"), "can't be read"),
        ("azur", "azure"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_profile(name)


def test_the_command_lists_and_explains() -> None:
    listed = CliRunner().invoke(main, ["profiles"])
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in EXPECTED)
    one = CliRunner().invoke(main, ["profiles", "tencent", "--url", "s3://images/web01.qcow2"])
    assert "ImportImage" in one.stdout
    assert "s3://images/web01.qcow2" in one.stdout
    assert "at most 500 GiB  [T5]" in one.stdout
    assert "read 2026-11" in one.stdout


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_whatever_a_profile_says_of_a_cloud_is_explained_with_its_sources(name: str) -> None:
    profile = find_profile(name)
    assert {field for _, _, field in facts_of(profile)} >= set(profile.told_by) - {"steps"}
    lines = list(profile_lines(profile, "s3://images/web01.qcow2"))
    for field in set(profile.told_by) - {"steps"}:
        assert any(f"  [{', '.join(profile.told_by[field])}]" in line for line in lines), field
    assert all(any(line.startswith(f"  [{key}] ") for line in lines) for key in profile.source)
