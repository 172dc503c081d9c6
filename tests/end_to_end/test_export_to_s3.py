"""Whole exports into real S3 stores, by the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.events import Event, PartReplayed, PartStored
from tests.chains import export, write_toml
from tests.disks.letters import letter_bytes
from tests.stores.faults import Nth, ResetRequest, Rule
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import S3Server

MiB = 1 << 20


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket of each store, which the AWS chain leads to."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server.new_bucket()


@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
@pytest.mark.parametrize("memory", ["96 MiB", "48 MiB"])
async def test_a_disk_is_exported_and_verified(
    s3_server: S3Server, bucket: str, tmp_path: Path, encoder: str, memory: str
) -> None:
    disk = tmp_path / "disk.raw"
    with Path("/dev/urandom").open("rb") as noise, disk.open("wb") as file:
        for offset in (0, 17 * MiB, 40 * MiB):
            file.seek(offset)
            file.write(noise.read(9 * MiB))
        file.truncate(60 * MiB + 512)
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.disk; path = "{disk}"',
        "checksum.guest",
        "sparse.zeros",
        encoder,
        f'write.s3; url = "s3://{bucket}/disk.image"',
        "verify.readback",
        memory=memory,
    )
    events: list[Event] = []
    outcome = await export(toml, events=events)
    assert outcome.state == "identical"
    assert s3_server.keys(bucket) == ["disk.image", "disk.image.manifest.json"]
    assert s3_server.open_uploads(bucket) == []
    assert sum(event.guest_bytes for event in events if isinstance(event, PartStored)) == 60 * MiB + 512
    if encoder == "encode.raw":
        assert s3_server.get(bucket, "disk.image") == disk.read_bytes()


@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
async def test_a_part_that_was_streamed_and_lost_is_read_and_encoded_again(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoder: str
) -> None:
    """With so little memory that parts of 8 MiB are streamed."""
    for name, value in seaweedfs.environment().items():
        monkeypatch.setenv(name, value)
    bucket, disk = seaweedfs.new_bucket(), tmp_path / "disk.raw"
    with Path("/dev/urandom").open("rb") as noise:
        disk.write_bytes(noise.read(40 * MiB))
    rule = Rule(ResetRequest(after_bytes=5 * MiB), query="partNumber=3&", when=Nth(1))
    async with FaultProxy(seaweedfs.port, rules=[rule]) as proxy:
        toml = write_toml(
            tmp_path / "export.toml",
            f'read.disk; path = "{disk}"',
            "checksum.guest",
            "sparse.zeros",
            encoder,
            f'write.s3; url = "s3://{bucket}/disk.image"; endpoint = "{proxy.url}"',
            "verify.readback",
            memory="40 MiB",
        )
        events: list[Event] = []
        outcome = await export(toml, events=events)
    assert outcome.state == "identical"
    assert [event.number for event in events if isinstance(event, PartReplayed)]


@pytest.mark.timeout(60)
async def test_a_part_with_a_little_of_very_many_windows_does_not_take_all_buffers(
    tmp_path: Path, seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cluster a window: 8 MiB of image are slices of more windows than there are buffers."""
    for name, value in seaweedfs.environment().items():
        monkeypatch.setenv(name, value)
    disk = tmp_path / "disk"
    with open(disk, "wb") as file:
        file.truncate(1 << 30)
        for window in range(256):
            file.seek((window << 22) + (window % 60 << 16))
            file.write(letter_bytes("A", 65536))
    bucket = seaweedfs.new_bucket()
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.disk; path = "{disk}"',
        "checksum.guest",
        "sparse.zeros",
        'encode.qcow2; compression = "none"',
        f'write.s3; url = "s3://{bucket}/image"; endpoint = "{seaweedfs.endpoint}"',
        "verify.readback",
    )
    outcome = await export(toml)
    assert outcome.state == "identical"
    assert outcome.image_size > 16 << 20
