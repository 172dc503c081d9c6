"""What write.s3 asks of a store beyond the bytes: class, tags, access, payment, parts, credentials that change."""

from __future__ import annotations

import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.events import Event, PartStored
from pipeline.units import MiB
from stages.write.s3 import Options, S3Writer
from tests.chains import export, write_toml
from tests.disks.letters import write_disk
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import S3Server
from tests.write.images import make_context, mixed


@pytest.fixture(autouse=True)
def _no_aws_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def chain(folder: Path, bucket: str, endpoint: str, options: str) -> Path:
    """An export of the disk in `folder`, in more than one part."""
    disk = write_disk(folder / "disk", "ABCDEFGH" * 3 + "I", MiB)
    return write_toml(
        folder / "export.toml",
        f'read.disk; path = "{disk}"',
        "checksum.guest",
        "sparse.zeros",
        "encode.raw",
        f'write.s3; url = "s3://{bucket}/disk.raw"; endpoint = "{endpoint}"; {options}',
        "verify.readback",
    )


async def test_the_object_is_made_with_what_was_asked_for(
    seaweedfs: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweedfs.environment().items():
        monkeypatch.setenv(name, value)
    bucket = seaweedfs.new_bucket()
    options = (
        'storage_class = "STANDARD_IA"; acl = "private"; requester_pays = true; '
        'tags = { "made by" = "tests", "a&b" = "c=d" }'
    )
    async with FaultProxy(seaweedfs.port) as proxy:
        await export(chain(tmp_path, bucket, proxy.url, options))
        (opened,) = proxy.requests("POST", query="^uploads=")
        assert opened.headers["x-amz-storage-class"] == "STANDARD_IA"
        assert opened.headers["x-amz-acl"] == "private"
        assert opened.headers["x-amz-tagging"] == "made%20by=tests&a%26b=c%3Dd"
        assert {seen.headers.get("x-amz-request-payer") for seen in proxy.seen} == {"requester"}
    told = seaweedfs.client().get_object_tagging(Bucket=bucket, Key="disk.raw")["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in told} == {"made by": "tests", "a&b": "c=d"}


def test_encryption_is_asked_for_in_headers() -> None:
    image = mixed(MiB)
    options = Options(url="s3://bucket/x", encryption="aws:kms", kms_key="arn:aws:kms:eu-west-1:1:key/2")
    assert S3Writer(options, make_context(image))._object_headers() == {
        "x-amz-server-side-encryption": "aws:kms",
        "x-amz-server-side-encryption-aws-kms-key-id": "arn:aws:kms:eu-west-1:1:key/2",
    }
    assert S3Writer(replace(options, encryption="", kms_key=""), make_context(image))._object_headers() == {}


async def test_a_key_without_its_kind_of_encryption_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        await export(chain(tmp_path, "bucket", "http://127.0.0.1:1", 'kms_key = "x"'))


async def test_parts_are_equal_where_they_have_to_be(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    events: list[Event] = []
    toml = chain(tmp_path, s3_server.new_bucket(), s3_server.endpoint, 'part_sizes = "equal"')
    await export(toml, events=events)
    sizes = [event.length_bytes for event in sorted(_parts(events), key=lambda event: event.number)]
    assert len(sizes) > 2
    assert len(set(sizes[:-1])) == 1


def _parts(events: list[Event]) -> list[PartStored]:
    return [event for event in events if isinstance(event, PartStored)]


async def test_credentials_that_end_are_fetched_anew_during_a_run(
    seaweedfs: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a program that hands out short-lived ones, as a role's or a single sign-on's are."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", seaweedfs.region)
    program = tmp_path / "credentials"
    who = seaweedfs.credentials
    program.write_text(
        f"#!{sys.executable}\n"
        "import datetime, json\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write('x')\n"
        "ends = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=5)\n"
        f"print(json.dumps({{'Version': 1, 'AccessKeyId': {who.access_key!r}, 'SecretAccessKey': {who.secret_key!r}, "
        "'Expiration': ends.isoformat()}))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {program}\n")
    outcome = await export(chain(tmp_path, seaweedfs.new_bucket(), seaweedfs.endpoint, "parts_in_flight = 1"))
    assert outcome.state == "identical"
    assert len((tmp_path / "calls").read_text()) > 3
