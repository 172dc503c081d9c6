"""What the command line asks of every stage that there is."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.commands.stages import kind_text, markdown_lines
from pipeline.config.options import convert, option_fields
from pipeline.config.parse import example_text
from pipeline.config.wiring import ROLES, load_chain
from pipeline.errors import ConfigError
from pipeline.flow.stage import StageSpec
from stages.catalog import CATALOG

SPECS = list(CATALOG)


@pytest.mark.parametrize("spec", SPECS, ids=CATALOG.names)
def test_every_stage_has_a_role_that_the_wiring_knows(spec: StageSpec) -> None:
    assert spec.role in ROLES


@pytest.mark.parametrize("spec", SPECS, ids=CATALOG.names)
def test_every_option_has_a_sentence_and_a_type_in_plain_words(spec: StageSpec) -> None:
    for item in option_fields(spec.options):
        assert item.doc.endswith("."), f"{spec.name} {item.name}"
        assert "<class" not in kind_text(item.kind), f"{spec.name} {item.name}"


@pytest.mark.parametrize("spec", SPECS, ids=CATALOG.names)
def test_every_example_is_a_value_that_the_option_takes(spec: StageSpec) -> None:
    for item in option_fields(spec.options):
        if item.example:
            convert(tomllib.loads(f"value = {example_text(item)}")["value"], item.kind)


@pytest.mark.parametrize("writer", ["azure_page", "http"])
def test_option_that_makes_encoder_and_writer_fit_is_named_first(tmp_path: Path, writer: str) -> None:
    url = {"azure_page": "az://disks/x.vhd", "http": "https://h/x.vhd"}[writer]
    text = (
        'export.name = "x"\nstage = [{use = "read.disk", path = "/dev/sda"}, {use = "encode.vhd"}, '
        f'{{use = "write.{writer}", url = "{url}"}}]\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_chain(tmp_path / "x.toml", CATALOG, text=text)
    [fault] = caught.value.faults
    assert fault.hint.startswith(f'set variant = "fixed" in encode.vhd; write.{writer} works with encode.raw')
    load_chain(tmp_path / "x.toml", CATALOG, text=text.replace('"encode.vhd"', '"encode.vhd", variant = "fixed"'))


def test_the_document_names_every_stage() -> None:
    text = "\n".join(markdown_lines(CATALOG))
    assert all(f"### {name}\n" in text for name in CATALOG.names)


def test_the_catalog_imports_no_codec_and_no_client() -> None:
    code = (
        "import sys, stages.catalog\n"
        "list(stages.catalog.CATALOG)\n"
        "heavy = ('numpy', 'aiohttp', 'botocore', 'awscrt', 'isal', 'zlib_ng', 'zstandard', 'lz4', 'blake3')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
