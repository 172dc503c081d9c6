"""From the text of a file to options, or to every fault at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.options import Secret
from pipeline.config.parse import MEMORY_MIN, ExportConfig, load_config
from pipeline.errors import ConfigError, Fault
from pipeline.units import GiB, KiB, MiB
from tests.config.small_catalog import GOOD, SMALL_CATALOG


def load(folder: Path, text: str, *overrides: str) -> ExportConfig:
    file = folder / "export.toml"
    file.write_text(text)
    return load_config(file, SMALL_CATALOG, overrides)


def faults(folder: Path, text: str, *overrides: str) -> list[Fault]:
    with pytest.raises(ConfigError) as raised:
        load(folder, text, *overrides)
    return raised.value.faults


def rendered(folder: Path, text: str, *overrides: str) -> str:
    """All that a person sees, without the folder of the test."""
    return "\n".join(fault.render() for fault in faults(folder, text, *overrides)).replace(f"{folder}/", "")


def only(folder: Path, text: str, *overrides: str) -> tuple[int, str, str]:
    """Line, reason and hint of the one fault."""
    [fault] = faults(folder, text, *overrides)
    return fault.line, fault.reason, fault.hint


def test_a_good_file_becomes_typed_options(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.export.name == "web01"
    assert config.export.memory == 64 * MiB
    assert config.observe.log_level == "info"
    assert [stage.name for stage in config.stages][3:5] == ["encode.qcow2", "write.s3"]
    assert config.stages[0].options.path == Path("/dev/sda")
    assert config.stages[3].options.level == "small"
    assert config.stages[3].place == (16, 9)
    assert config.stages[3].index == 3


def test_a_value_below_the_least_is_a_fault_at_its_place(tmp_path: Path) -> None:
    text = GOOD.replace('path = "/dev/sda"', 'path = "/dev/sda"\nrate_limit = "0"')
    text = text.replace('url = "s3://images/web01.qcow2"', 'url = "s3://images/web01.qcow2"\nattempts = 0')
    assert rendered(tmp_path, text) == (
        'export.toml:8:14: rate_limit: at least 1 KiB is wanted, not the text "0"\n'
        '    8 | rate_limit = "0"\n'
        "      |              ^^^\n"
        "export.toml:23:12: attempts: at least 1 is wanted, not the number 0\n"
        "   23 | attempts = 0\n"
        "      |            ^"
    )
    overridden = faults(tmp_path, GOOD, "write.s3.attempts=-1")
    assert [fault.reason for fault in overridden] == ["write.s3.attempts: at least 1 is wanted, not the number -1"]
    assert load(tmp_path, text.replace('"0"', '"1 KiB"').replace("= 0", "= 1")).stages[-2].options.attempts == 1


def test_a_misspelt_option_is_shown_as_in_the_style_guide(tmp_path: Path) -> None:
    text = GOOD.replace('use = "checksum.guest"', 'use = "checksum.guest"\nalgoritm = "xxh3-128"')
    assert rendered(tmp_path, text) == (
        'export.toml:11:1: unknown option "algoritm" for checksum.guest\n'
        '   11 | algoritm = "xxh3-128"\n'
        '      | ^^^^^^^^ did you mean "algorithm"?'
    )


def test_every_fault_of_a_file_is_told_at_once_and_in_its_order(tmp_path: Path) -> None:
    text = """\
[export]
nam = "web01"
memory = "96 Mb per day"

[observe]
log_level = "loud"

[cloud]
profile = "tencent"

[[stage]]
use = "read.disk"
partitions = "some"

[[stage]]
use = "encode.qcow"
levl = "never looked at"

[[stage]]
path = "x"

[[stage]]
use = "write.s3"
url = 7
overwrite = "yes"
"""
    assert rendered(tmp_path, text, "write.s3.deadlin=3 s", "export") == (
        """\
export.toml:1:1: missing option "name" for [export]
    1 | [export]
      | ^^^^^^^^ add name = "web01"
export.toml:2:1: unknown option "nam" for [export]
    2 | nam = "web01"
      | ^^^ did you mean "name"?
export.toml:3:10: memory: "96 Mb per day" is not a size; write for example "4 MiB", "512 KiB" or "10 GiB"
    3 | memory = "96 Mb per day"
      |          ^^^^^^^^^^^^^^^
export.toml:6:13: log_level: "loud" is not one of "debug", "info", "warning", "error"
    6 | log_level = "loud"
      |             ^^^^^^
export.toml:8:2: unknown section [cloud]
    8 | [cloud]
      |  ^^^^^ known are export, target, observe, stage
export.toml:12:7: missing option "path" for read.disk
   12 | use = "read.disk"
      |       ^^^^^^^^^^^ add path = "/dev/sda"
export.toml:13:14: partitions: a list is wanted, not the text "some" or "some" is not one of "all", "needed"
   13 | partitions = "some"
      |              ^^^^^^
export.toml:16:7: unknown stage "encode.qcow"
   16 | use = "encode.qcow"
      |       ^^^^^^^^^^^^^ did you mean "encode.qcow2"?
export.toml:19:1: this stage has no use
   19 | [[stage]]
      | ^^^^^^^^^ name it: use = "read.disk"; `pipeline stages` lists all
export.toml:24:7: url: a text is wanted, not the number 7
   24 | url = 7
      |       ^
export.toml:25:13: overwrite: true or false is wanted, not the text "yes"
   25 | overwrite = "yes"
      |             ^^^^^
--set: "export" is not stage.name.option=value
        For example --set encode.qcow2.level=small or --set export.memory=1GiB.
--set: write.s3.deadlin: unknown option "deadlin" for write.s3
        did you mean "deadline"?"""
    )


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "no.toml", SMALL_CATALOG)
    assert str(raised.value) == (
        f"{tmp_path}/no.toml: can't be read: no such file or directory\n        Give the path of an export file."
    )


def test_a_directory_and_a_disk_image_are_not_export_files(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(2 * MiB))
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path, SMALL_CATALOG)
    with pytest.raises(ConfigError, match="larger than 1 MiB, which no export file is"):
        load_config(disk, SMALL_CATALOG)


def test_text_that_is_not_utf8_is_told_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "export.toml"
    file.write_bytes('[export]\nname = "Müller"\n'.encode("latin-1"))
    with pytest.raises(ConfigError) as raised:
        load_config(file, SMALL_CATALOG)
    [fault] = raised.value.faults
    assert (fault.line, fault.column, fault.reason) == (2, 10, "not UTF-8 text")


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "export.toml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_config(file, SMALL_CATALOG).stages[3].place == (16, 9)


def test_a_syntax_error_has_a_place_and_a_way_out(tmp_path: Path) -> None:
    assert rendered(tmp_path, '[export]\nname = web01\nmemory = "1 GiB"\n') == (
        "export.toml:2:8: not valid TOML: invalid value\n"
        "    2 | name = web01\n"
        '      |        ^ a text stands in double quotes: key = "value"'
    )


def test_absurd_toml_is_a_fault_and_no_crash(tmp_path: Path) -> None:
    assert only(tmp_path, "a = " + "[" * 5000 + "]" * 5000)[1] == "arrays or tables are nested too deeply"
    assert "not valid TOML" in only(tmp_path, "a = " + "1" * 5000)[1]


def test_an_empty_file_lacks_section_and_stages(tmp_path: Path) -> None:
    assert [fault.reason for fault in faults(tmp_path, "")] == [
        "there is no [export] section",
        "there is no [[stage]]",
    ]


def test_a_single_bracket_stage_is_explained(tmp_path: Path) -> None:
    assert only(tmp_path, '[export]\nname = "a"\n[stage]\nuse = "read.disk"\n') == (
        3,
        "a stage is written [[stage]]",
        "with two brackets",
    )


@pytest.mark.parametrize("text", ["stage = 1", 'stage = ["read.disk"]'])
def test_stages_that_are_no_tables_are_a_fault(tmp_path: Path, text: str) -> None:
    assert only(tmp_path, f'export.name = "a"\n{text}\n')[1] == '"stage" is not a list of stages'


def test_a_section_that_is_a_value_is_a_fault(tmp_path: Path) -> None:
    assert faults(tmp_path, "observe = 1\n" + GOOD)[0].reason == '"observe" is not a section'


def test_an_option_outside_of_its_section_is_sent_home(tmp_path: Path) -> None:
    assert only(tmp_path, 'memory = "1 GiB"\n' + GOOD) == (
        1,
        'option "memory" stands outside of any section',
        "it belongs below [export]",
    )


def test_a_use_that_is_no_text_is_a_fault(tmp_path: Path) -> None:
    assert only(tmp_path, GOOD.replace('"sparse.zeros"', "3"))[:2] == (13, "use: the name of a stage is wanted")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("encode.qcow", 'did you mean "encode.qcow2"?'),
        ("qcow2", 'did you mean "encode.qcow2"?'),
        ("Encode.QCOW2", 'did you mean "encode.qcow2"?'),
        ("verify.everything", "known are verify.readback, verify.receipt, verify.histogram"),
        ("read", "known are read.disk, read.image"),
        ("write.ss3", 'did you mean "write.s3"?'),
        ("read.zeros", "known are read.disk, read.image"),
        ("zzz", "`pipeline stages` lists all"),
    ],
)
def test_an_unknown_stage_comes_with_what_was_meant(tmp_path: Path, name: str, hint: str) -> None:
    assert only(tmp_path, GOOD.replace("encode.qcow2", name)) == (16, f'unknown stage "{name}"', hint)


def test_an_option_of_a_stage_without_options_is_told_so(tmp_path: Path) -> None:
    text = GOOD.replace('use = "sparse.zeros"', 'use = "sparse.zeros"\ngrain = 1')
    assert only(tmp_path, text) == (14, 'unknown option "grain" for sparse.zeros', "it has no options")


def test_a_wrong_choice_comes_with_the_one_that_was_meant(tmp_path: Path) -> None:
    text = GOOD.replace('"small"', '"smal"')
    assert only(tmp_path, text) == (17, 'level: "smal" is not one of "fast", "small"', 'did you mean "small"?')


def test_what_a_stage_refuses_is_told_at_the_option(tmp_path: Path) -> None:
    text = GOOD.replace('level = "small"', 'cluster_size = "3 KiB"')
    assert rendered(tmp_path, text) == (
        "export.toml:17:16: cluster_size must be a power of two\n"
        '   17 | cluster_size = "3 KiB"\n'
        "      |                ^^^^^^^"
    )


def test_what_a_stage_refuses_is_told_beside_its_other_faults(tmp_path: Path) -> None:
    text = GOOD.replace('level = "small"', 'cluster_size = "3 KiB"\nlevel = "smaal"')
    assert [fault.line for fault in faults(tmp_path, text)] == [17, 18]


def test_too_little_memory_is_a_fault(tmp_path: Path) -> None:
    assert only(tmp_path, GOOD.replace("64 MiB", "31 MiB")) == (3, "memory: 31 MiB is too little", "at least 32 MiB")
    assert load(tmp_path, GOOD.replace("64 MiB", "32 MiB")).export.memory == MEMORY_MIN == 32 * MiB


@pytest.mark.parametrize("name", ["", " ", ".hidden", "a\\nb", "a/b", "a" * 101, "\N{SNOWMAN}" * 34])
def test_a_name_that_cannot_be_part_of_a_file_name_is_a_fault(tmp_path: Path, name: str) -> None:
    assert only(tmp_path, GOOD.replace('"web01"', f'"{name}"'))[0] == 2


@pytest.mark.parametrize("option", ["read.disk.path", "write.s3.url", "export.name", "observe.report"])
def test_a_nul_character_is_a_fault_wherever_it_stands(tmp_path: Path, option: str) -> None:
    """TOML can write it; no path, header or argument can hold it."""
    [fault] = faults(tmp_path, GOOD, f'{option}="a\\u0000b"')
    assert "a NUL character can't be part of it" in fault.reason


@pytest.mark.parametrize("option", ["journal", "manifest"])
def test_a_path_that_was_taken_for_a_switch_is_refused(tmp_path: Path, option: str) -> None:
    """It would become a file of that name."""
    text = GOOD.replace("[export]", f'[export]\n{option} = "on"')
    assert only(tmp_path, text)[1] == f'{option}: "on" is no path'


def test_keep_without_a_journal_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace("[export]", '[export]\njournal = "off"\non_failure = "keep"')
    assert only(tmp_path, text)[1] == "on_failure: nothing can be kept without a journal"


def test_a_secret_comes_from_the_environment_and_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPORT_KEY", "hunter2")
    config = load(tmp_path, GOOD.replace("web01.qcow2", 'web01.qcow2"\nsecret_key = { env = "EXPORT_KEY" }#'))
    secret = config.stages[4].options.secret_key
    assert isinstance(secret, Secret)
    assert secret.reveal() == "hunter2"
    assert "hunter2" not in repr(config)


def test_an_unset_secret_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPORT_KEY", raising=False)
    text = GOOD.replace('web01.qcow2"', 'web01.qcow2"\nsecret_key = { env = "EXPORT_KEY" }')
    assert only(tmp_path, text)[:2] == (22, "secret_key: the environment variable EXPORT_KEY is not set")


def test_a_secret_written_as_text_is_refused_without_showing_it(tmp_path: Path) -> None:
    text = GOOD.replace('web01.qcow2"', "web01.qcow2\"\nsecret_key = 'hunter2' # old")
    assert rendered(tmp_path, text) == (
        'export.toml:22:14: secret_key: a secret is written { env = "NAME" }, never as text in the file\n'
        "   22 | secret_key = ********* # old\n"
        "      |              ^^^^^^^^^"
    )
    assert "hunter2" not in rendered(tmp_path, GOOD, "write.s3.secret_key=hunter2")


def test_environment_variables_are_not_expanded_elsewhere(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD.replace("/dev/sda", "$HOME/disk")).stages[0].options.path == Path("$HOME/disk")


def test_a_fault_below_a_tab_keeps_its_caret_in_place(tmp_path: Path) -> None:
    text = GOOD.replace('level = "small"', "\tlevel =\t7")
    assert rendered(tmp_path, text).splitlines()[1:] == ["   17 |  level = 7", "      |          ^"]


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        GOOD,
        "encode.qcow2.level=fast",
        "encode.qcow2.cluster_size=128 KiB",
        "export.memory=1GiB",
        "observe.log_level=debug",
        "export.name=2026",
        'write.s3.url="s3://b/c"',
        "write.s3.overwrite=true",
        "write.s3.headers={ a = 'b' }",
        "read.disk.partitions=[1, 2]",
        "read.disk.path=/dev/disk/by-id/x=y",
    )
    assert config.export.memory == GiB
    assert config.export.name == "2026"
    assert config.observe.log_level == "debug"
    assert config.stages[3].options.level == "fast"
    assert config.stages[3].options.cluster_size == 128 * KiB
    assert config.stages[4].options.url == "s3://b/c"
    assert config.stages[4].options.overwrite is True
    assert config.stages[4].options.headers == {"a": "b"}
    assert config.stages[0].options.partitions == (1, 2)
    assert config.stages[0].options.path == Path("/dev/disk/by-id/x=y")


def test_an_override_mends_a_fault_of_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD.replace("64 MiB", "no"), "export.memory=40MiB").export.memory == 40 * MiB
    assert load(tmp_path, GOOD.replace('name   = "web01"', ""), "export.name=x").export.name == "x"


@pytest.mark.parametrize(
    "override, reason, hint",
    [
        ("encode.qcow2.levl=1", 'encode.qcow2.levl: unknown option "levl" for encode.qcow2', 'did you mean "level"?'),
        ("encode.qcow2.use=encode.raw", 'encode.qcow2.use: unknown option "use" for encode.qcow2', None),
        (
            "encode.qcow2.level=smal",
            'encode.qcow2.level: "smal" is not one of "fast", "small"',
            'did you mean "small"?',
        ),
        ("export.memory=1", "export.memory: 1 B is too little", "at least 32 MiB"),
        ("encode.qcow2.cluster_size=3", "encode.qcow2.cluster_size must be a power of two", ""),
        ("encode.raw.x=1", 'encode.raw.x: there is no stage or section "encode.raw" in export.toml', None),
        (
            "exprt.memory=1",
            'exprt.memory: there is no stage or section "exprt" in export.toml',
            'did you mean "export"?',
        ),
        ("export.memory", '"export.memory" is not stage.name.option=value', None),
        ("=x", '"" is not stage.name.option=value', None),
    ],
)
def test_wrong_overrides_are_faults(tmp_path: Path, override: str, reason: str, hint: str | None) -> None:
    [fault] = faults(tmp_path, GOOD, override)
    assert (fault.file, fault.line, fault.reason) == ("--set", 0, reason)
    assert hint is None or fault.hint == hint


def test_an_override_cannot_smuggle_in_a_second_option(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, "write.s3.url=1\nx = 2")
    assert config.stages[4].options.url == "1\nx = 2"
