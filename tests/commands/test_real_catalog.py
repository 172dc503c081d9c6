"""What the command line asks of every stage that there is."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from pipeline.commands.stages import kind_text, markdown_lines
from pipeline.config.options import convert, option_fields
from pipeline.config.parse import example_text
from pipeline.config.wiring import ROLES
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
