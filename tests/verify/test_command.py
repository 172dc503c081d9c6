"""`pipeline verify` on files: exit codes, what it prints, and manifests that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeline.commands import verify
from pipeline.commands.verify import command
from pipeline.events import EventStream, RetryScheduled
from pipeline.flow.items import Verdict
from pipeline.flow.manifest import DiskRecord, ImageRecord, Manifest
from pipeline.units import MiB
from stages.checksum.leaves import GuestDigest, LeafDigests, hash_leaves
from tests.decode.images import Patched, mixed_disk, qemu_convert

DISK = mixed_disk(3 * MiB, seed=31)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with its manifest beside it."""
    path = tmp_path / "web 01.qcow2"
    path.write_bytes(qemu_convert(tmp_path, DISK))
    write_manifest(path)
    return path


def write_manifest(image: Path, *, with_digest: bool = True, **changes: Any) -> None:
    leaves = LeafDigests("xxh3-128", len(DISK))
    leaves.add(b"".join(hash_leaves("xxh3-128", memoryview(DISK))))
    manifest = Manifest(
        name="web01",
        created="2026-11-23T00:00:00+00:00",
        disk=DiskRecord(size=len(DISK), identity={}, totals={}, runs=""),
        image=ImageRecord(
            uri=str(image),
            format="qcow2",
            size=image.stat().st_size,
            virtual_size=len(DISK),
            window=2 * MiB,
            order="sparse",
            head_length=0,
        ),
        state="identical",
        facts={"guest digest": GuestDigest(leaves).to_json()} if with_digest else {},
        options={},
    )
    value = json.loads(manifest.to_json())
    for path, change in changes.items():
        *parents, name = path.split("__")
        place = value
        for parent in parents:
            place = place[parent]
        place[name] = change
    manifest_of(image).write_text(json.dumps(value))


def manifest_of(image: Path) -> Path:
    return image.with_name(image.name + ".manifest.json")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments], prog_name="verify")


@pytest.mark.parametrize("as_url", [False, True])
def test_an_intact_image_is_identical_and_exits_0(image: Path, as_url: bool) -> None:
    result = call(image.as_uri() if as_url else image)
    assert result.exit_code == 0, result.output
    assert "identical (readback)" in result.output
    assert f"all {len(DISK)} bytes" in result.output


def test_the_manifest_may_be_named_instead_of_the_image(image: Path) -> None:
    assert call(manifest_of(image)).exit_code == 0


def test_a_changed_byte_exits_3_and_says_where(image: Path) -> None:
    patched = Patched(image.read_bytes())
    patched.bytes[(patched.u64(patched.plain[-1]) & 0xFF_FFFF_FFFF_FE00) + 5] ^= 1
    image.write_bytes(patched.bytes)
    result = call(image)
    assert result.exit_code == 3
    assert f"differs: 1 MiB ({MiB} bytes) at guest offset {2 * MiB}" in result.output


def test_a_truncated_image_exits_3(image: Path) -> None:
    size = image.stat().st_size
    image.write_bytes(image.read_bytes()[:-512])
    result = call(image)
    assert result.exit_code == 3
    assert f"{size - 512} bytes, {size} were written" in result.output


def test_json_has_one_object_a_line_and_nothing_else_on_stdout(image: Path) -> None:
    result = call(image, "--json")
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert told[-1]["type"] == "verified"
    assert told[-1]["state"] == "identical"
    assert told[-1]["differing"] == []
    assert {one["type"] for one in told[:-1]} <= {"verify_progressed"}


def test_what_can_not_be_told_exits_1_with_the_way_out(image: Path) -> None:
    result = call(image, "--level", "receipt")
    assert result.exit_code == 1
    assert "verify.readback" in result.output
    write_manifest(image, with_digest=False)
    result = call(image)
    assert result.exit_code == 1
    assert "checksum.guest" in result.output


def test_a_missing_manifest_or_image_exits_1_and_names_the_file(image: Path, tmp_path: Path) -> None:
    manifest_of(image).rename(tmp_path / "kept")
    result = call(image)
    assert result.exit_code == 1
    assert str(manifest_of(image)) in result.output
    (tmp_path / "kept").rename(manifest_of(image))
    image.unlink()
    result = call(image)
    assert result.exit_code == 1
    assert "web 01.qcow2" in result.output


@pytest.mark.parametrize(
    "changes",
    [
        {"image__size": "large"},
        {"image__size": -1},
        {"image__virtual_size": None},
        {"image__format": 7},
        {"disk__size": 2 * MiB},
        {"facts": []},
        {"facts__guest digest__root": "00"},
        {"facts__guest digest": ["x"]},
        {"facts__guest digest__runs": [1 << 70]},
        {"receipt": [["a", "b"]]},
        {"version": 99},
        {"disk": None},
    ],
    ids=str,
)
def test_a_manifest_that_can_not_be_used_exits_3_without_a_traceback(image: Path, changes: dict[str, Any]) -> None:
    write_manifest(image, **changes)
    result = call(image)
    assert result.exit_code == 3, result.output
    assert "Traceback" not in result.output
    assert "internal error" not in result.output


def test_a_manifest_that_is_no_json_exits_3(image: Path) -> None:
    manifest_of(image).write_bytes(b"\xff\x00{")
    result = call(image)
    assert result.exit_code == 3
    assert "not a manifest" in result.output


def test_an_unknown_scheme_exits_2_and_names_those_that_are_known() -> None:
    result = call("ftp://somewhere/image.qcow2")
    assert result.exit_code == 2
    assert "s3://" in result.output


def test_a_log_gets_what_happens(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries of a store are events; without a terminal nobody else shows them."""
    real = verify._compare

    async def compare(*arguments: Any) -> Verdict:
        [events] = [one for one in arguments if isinstance(one, EventStream)]
        events.emit(RetryScheduled(stage="verify", operation="read", attempt=2, wait_s=1.0, reason="503 SlowDown"))
        return await real(*arguments)

    monkeypatch.setattr(verify, "_compare", compare)
    log = tmp_path / "log"
    assert CliRunner().invoke(command, [str(image), "--log-file", str(log)]).exit_code == 0
    [line] = [json.loads(one) for one in log.read_text().splitlines()]
    assert (line["event"], line["reason"]) == ("retry_scheduled", "503 SlowDown")
