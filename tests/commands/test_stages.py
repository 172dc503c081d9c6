"""`pipeline stages` and docs/stages.md."""

from __future__ import annotations

import pytest

from pipeline.commands.stages import markdown_lines
from tests.commands.conftest import Call
from tests.config.small_catalog import SMALL_CATALOG


def test_the_list_has_every_stage_below_its_role(call: Call) -> None:
    said = call("stages")
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[:3] == [
        "Sources: one, first",
        "  read.disk         Read a disk.",
        "  read.image        A declaration.",
    ]
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(SMALL_CATALOG.names)


def test_one_stage_shows_its_ports_and_options(call: Call) -> None:
    assert call("stages", "read.disk").out == (
        """\
read.disk: Read a disk.
  takes nothing, gives blocks
  provides disk size

  path  (path; required, for example "/dev/sda")
      Block device or raw image file.

  partitions  (list of whole number or "all" or "needed"; default "all")
      Which partitions travel.

  rate_limit  (size, at least 1 KiB; optional)
      Bytes a second, at most.
"""
    )
    written = call("stages", "write.s3").out
    assert 'secret_key  (secret: { env = "NAME" }; optional)' in written
    assert 'deadline  (duration; default "120 s")' in written
    assert "headers  (table of text; optional)" in written
    assert "overwrite  (true or false; default false)" in written
    assert 'cluster_size  (size; default "64 KiB")' in call("stages", "encode.qcow2").out


@pytest.mark.parametrize(
    "name, hint", [("encode.qcow", 'did you mean "encode.qcow2"?'), ("zzz", "`pipeline stages` lists all")]
)
def test_a_wrong_name_is_wrong_usage_with_a_way_out(call: Call, name: str, hint: str) -> None:
    said = call("stages", name)
    assert said.code == 2
    assert f'There is no stage "{name}": {hint}' in said.err


def test_stages_as_json_are_one_object_each(call: Call) -> None:
    told = call("stages", "--json").objects
    assert [one["name"] for one in told] == list(SMALL_CATALOG.names)
    [one] = call("stages", "encode.qcow2", "--json").objects
    assert one["options"][0] == {
        "name": "level",
        "kind": '"fast" or "small"',
        "required": False,
        "minimum": None,
        "default": '"fast"',
        "choices": ["fast", "small"],
        "doc": "small takes longer.",
    }


def test_the_document_has_every_stage_and_every_option(call: Call) -> None:
    said = call("stages", "--markdown")
    assert said.out.splitlines() == list(markdown_lines(SMALL_CATALOG))
    for name in SMALL_CATALOG.names:
        assert f"### {name}\n" in said.out
    assert '| `level` | "fast" or "small" | "fast" | small takes longer. |' in said.out
    assert "| `path` | path | required | Block device or raw image file. |" in said.out
    assert "Takes blocks, gives pieces (head last, random)." in said.out
