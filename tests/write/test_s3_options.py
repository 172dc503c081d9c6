"""What write.s3 asks of a store beyond the bytes: class, tags, access, payment, parts, credentials that change."""

from __future__ import annotations

import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, LeftBehindError, StoreError
from pipeline.events import Event, PartStored, RetryScheduled
from pipeline.units import MiB
from stages.write.s3 import Options, S3Writer
from tests.chains import export, write_toml
from tests.disks.letters import write_disk
from tests.stores.front import FrontDoor, Session
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


def _session(number: int, requests: int) -> Session:
    return Session(
        access_key=f"ASIA{number}", secret_key=f"secret of {number}", token=f"token/of+{number}==", requests=requests
    )


@pytest.fixture
def by_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that the AWS chain takes credentials from."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    return path


async def test_session_tokens_that_end_on_the_way_are_taken_anew_and_buckets_stand_in_host_names(
    seaweedfs: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_file: Path
) -> None:
    """A program outside writes new ones into the file, as those of single sign-on do; they say no time of expiry."""
    bucket = seaweedfs.new_bucket()  # before the proxy is set, which the test's own client must not take
    first, second = _session(1, 6), _session(2, 1000)
    by_file.write_text(first.in_a_file())
    events: list[Event] = []

    def renew() -> None:
        by_file.write_text(second.in_a_file())

    async with FrontDoor(seaweedfs, host="s3.example", sessions=[first, second], on_end=renew) as front:
        monkeypatch.setenv("http_proxy", front.url)
        toml = chain(tmp_path, bucket, "http://s3.example", "parts_in_flight = 4")
        outcome = await export(toml, events=events)
        told = {seen.status for seen in front.seen}
    assert outcome.state == "identical"
    assert front.used.count("ASIA1") == 6
    assert front.used.count("ASIA2") > 3
    assert told >= {200, 400}
    retried = [event for event in events if isinstance(event, RetryScheduled)]
    assert retried
    assert all("ExpiredToken" in event.reason and event.wait_s == 0 for event in retried)
    assert "token/of" not in str(events)


async def test_session_token_that_ended_for_good_is_told_with_the_way_on(
    seaweedfs: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_file: Path
) -> None:
    bucket, session = seaweedfs.new_bucket(), _session(1, 6)
    by_file.write_text(session.in_a_file())
    async with FrontDoor(seaweedfs, host="s3.example", sessions=[session]) as front:
        monkeypatch.setenv("http_proxy", front.url)
        toml = chain(tmp_path, bucket, "http://s3.example", "parts_in_flight = 1")
        with pytest.raises(LeftBehindError) as caught:  # what was stored can't be removed without credentials either
            await export(toml)
        told = [seen.status for seen in front.seen]
    assert told.count(400) <= 4, "asked again and again although nothing is new"
    assert "ExpiredToken" in str(caught.value)
    assert "abort-multipart-upload" in caught.value.commands[0]
    assert isinstance(caught.value.cause, StoreError)
    assert "--resume" in caught.value.cause.hint
