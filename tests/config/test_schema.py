"""The JSON Schema of export files: what editors show while somebody types."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.commands.stages import schema_text
from pipeline.config.parse import load_config
from pipeline.config.schema import json_schema
from pipeline.errors import ConfigError
from pipeline.flow.stage import Catalog
from stages.catalog import CATALOG
from tests.config.small_catalog import GOOD, SMALL_CATALOG

PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((PROJECT / "configs").glob("*.toml"))


def faults(text: str, catalog: Catalog = SMALL_CATALOG) -> list[str]:
    """What an editor would underline."""
    validator = jsonschema.Draft7Validator(json_schema(catalog))
    return [error.message for error in validator.iter_errors(tomllib.loads(text))]


def loads(text: str, folder: Path) -> bool:
    """Whether the program takes it."""
    file = folder / "export.toml"
    file.write_text(text)
    try:
        load_config(file, SMALL_CATALOG)
    except ConfigError:
        return False
    return True


def test_the_schema_is_a_schema() -> None:
    for catalog in (SMALL_CATALOG, CATALOG):
        jsonschema.Draft7Validator.check_schema(json_schema(catalog))


def test_the_document_is_what_the_stages_say() -> None:
    written = (PROJECT / "docs" / "export.schema.json").read_text()
    assert written == schema_text(CATALOG) + "\n", "docs/export.schema.json is stale: make docs"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_of_the_project_is_valid(file: Path) -> None:
    assert faults(file.read_text(), CATALOG) == []


GOOD_VALUES = [
    'memory = "64MiB"',
    'memory = "0.5 gib"',
    "memory = 67108864",
    'manifest = "/srv/web01.json"',
]
GOOD_STAGES = [
    'use = "read.disk"\npath = "/dev/sda"\npartitions = "needed"',
    'use = "read.disk"\npath = "/dev/sda"\npartitions = [1, 2]\nrate_limit = "200 MB"',
    'use = "write.s3"\nurl = "s3://a/b"\nsecret_key = { env = "HOME" }\ndeadline = "2 min"\noverwrite = true',
    'use = "write.s3"\nurl = "s3://a/b"\ndeadline = 1.5\nheaders = { a = "b" }',
    'use = "encode.qcow2"\ncluster_size = "1 MiB"',
]
BAD_VALUES = [
    "memory = true",
    'memory = "lots"',
    'memory = "64 parsecs"',
    "memory = -1",
    "name = 7",
    'on_failure = "ignore"',
    "nmae = 'x'",
    'manifest = ""',
]
BAD_STAGES = [
    'path = "/dev/sda"',  # no use
    'use = "read.dsik"\npath = "/dev/sda"',
    "use = 7",
    'use = "read.disk"',  # no path
    'use = "read.disk"\npath = ""',
    'use = "read.disk"\npath = "/dev/sda"\npartitions = "some"',
    'use = "read.disk"\npath = "/dev/sda"\npartitions = ["1"]',
    'use = "read.disk"\npath = "/dev/sda"\nlevel = "small"',  # another stage's option
    'use = "encode.qcow2"\nlevl = "small"',
    'use = "encode.qcow2"\nlevel = "Small"',
    'use = "write.s3"\nurl = "s3://a/b"\nsecret_key = "in plain text"',
    'use = "write.s3"\nurl = "s3://a/b"\nsecret_key = { file = "x" }',
    'use = "write.s3"\nurl = "s3://a/b"\ndeadline = "soon"',
    'use = "write.s3"\nurl = "s3://a/b"\noverwrite = "yes"',
    'use = "write.s3"\nurl = "s3://a/b"\nheaders = { a = 1 }',
    'use = "sparse.zeros"\ngrain = 1',
    'use = "write.s3"\nurl = "s3://a/b"\nattempts = 0',
    'use = "read.disk"\npath = "/dev/sda"\nrate_limit = 1023',
]


def with_value(line: str) -> str:
    """The good file with this line in [export], in place of its own memory and name."""
    key = line.split(" ")[0]
    kept = [one for one in GOOD.splitlines() if one.split(" ")[0] != key]
    return "\n".join([kept[0], line, *kept[1:]])


@pytest.mark.parametrize("line", GOOD_VALUES)
def test_a_value_that_the_program_takes_is_valid(line: str, tmp_path: Path) -> None:
    assert loads(with_value(line), tmp_path)
    assert faults(with_value(line)) == []


@pytest.mark.parametrize("line", BAD_VALUES)
def test_a_value_that_the_program_refuses_is_underlined(line: str, tmp_path: Path) -> None:
    assert not loads(with_value(line), tmp_path)
    assert faults(with_value(line))


@pytest.mark.parametrize("stage", GOOD_STAGES)
def test_a_stage_that_the_program_takes_is_valid(stage: str, tmp_path: Path) -> None:
    text = f'[export]\nname = "web01"\n[[stage]]\n{stage}\n'
    assert loads(text, tmp_path)
    assert faults(text) == []


@pytest.mark.parametrize("stage", BAD_STAGES)
def test_a_stage_that_the_program_refuses_is_underlined(stage: str, tmp_path: Path) -> None:
    text = f'[export]\nname = "web01"\n[[stage]]\n{stage}\n'
    assert not loads(text, tmp_path)
    assert faults(text)


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("[export]", "[exports]"),
        "[export]\nname = 'a'\n",
        "[export]\nname = 'a'\n[stage]\nuse = 'encode.raw'\n",
        GOOD + "\n[extra]\n",
        GOOD.replace('name   = "web01"\n', ""),
        GOOD + '\n[observe]\nlog_level = "loud"\n',
    ],
)
def test_a_file_of_the_wrong_shape_is_underlined(text: str) -> None:
    assert faults(text)


def test_every_option_has_its_sentence_and_its_default() -> None:
    schema: dict[str, Any] = json.loads(schema_text(SMALL_CATALOG))
    level = schema["definitions"]["encode.qcow2"]["properties"]["level"]
    assert level == {"description": "small takes longer.", "enum": ["fast", "small"], "default": "fast"}
    assert schema["definitions"]["encode.qcow2"]["properties"]["cluster_size"]["default"] == "64 KiB"
    assert schema["definitions"]["write.s3"]["properties"]["deadline"]["default"] == "120 s"
    assert schema["properties"]["stage"]["items"]["properties"]["use"]["enum"] == list(SMALL_CATALOG.names)
