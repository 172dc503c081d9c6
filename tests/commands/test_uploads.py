"""`pipeline uploads`: what runs left behind is found and removed, in real stores, and nothing else is."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.units import MiB
from stages.write.partial import is_partial, partial_name
from tests.commands.conftest import Said
from tests.stores.openssh import SftpServer
from tests.stores.s3 import S3Server


def call(*arguments: object) -> Said:
    """The command line in this process, with the real catalog."""
    result = CliRunner().invoke(main, ["uploads", *map(str, arguments)], prog_name="pipeline")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Said(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty bucket, reached by the AWS chain."""
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server.new_bucket()


def open_upload(server: S3Server, bucket: str, key: str, parts: int = 0) -> str:
    """As a killed run leaves it; returns its id."""
    client = server.client()
    upload_id: str = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    for number in range(1, parts + 1):
        client.upload_part(Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=bytes(5 * MiB))
    return upload_id


def test_open_uploads_of_a_store_are_listed_with_what_they_hold(s3_server: S3Server, bucket: str) -> None:
    first = open_upload(s3_server, bucket, "images/a b.qcow2", parts=2)
    second = open_upload(s3_server, bucket, "images/c.qcow2")
    said = call("list", f"s3://{bucket}/images/", "--endpoint", s3_server.endpoint, "--json")
    assert said.code == 0, said.err
    *uploads, total = said.objects
    found = {one["upload_id"]: (one["uri"], one["parts"], one["bytes"]) for one in uploads}
    assert found == {
        first: (f"s3://{bucket}/images/a b.qcow2", 2, 10 * MiB),
        second: (f"s3://{bucket}/images/c.qcow2", 0, 0),
    }
    assert all(0 <= one["age_s"] < 120 for one in uploads)
    assert total == {"type": "uploads", "count": 2, "bytes": 10 * MiB}
    text = call("list", f"s3://{bucket}/images/a b.qcow2", "--endpoint", s3_server.endpoint).out
    assert first in text
    assert "2 parts" in text
    assert second not in text


def test_only_what_the_url_names_is_aborted(s3_server: S3Server, bucket: str) -> None:
    open_upload(s3_server, bucket, "a", parts=1)
    open_upload(s3_server, bucket, "a")
    kept = open_upload(s3_server, bucket, "a.other")
    said = call("abort", f"s3://{bucket}/a", "--endpoint", s3_server.endpoint)
    assert said.code == 0, said.err
    assert "2 removed" in said.out
    assert s3_server.open_uploads(bucket) == [("a.other", kept)]
    again = call("abort", f"s3://{bucket}/a", "--endpoint", s3_server.endpoint)
    assert (again.code, again.out) == (0, f"nothing to remove under s3://{bucket}/a\n")


def test_one_of_several_is_aborted_by_its_id(s3_server: S3Server, bucket: str) -> None:
    gone, kept = open_upload(s3_server, bucket, "a"), open_upload(s3_server, bucket, "a")
    said = call("abort", f"s3://{bucket}", "--upload-id", gone, "--endpoint", s3_server.endpoint, "--json")
    assert said.code == 0, said.err
    assert [one["type"] for one in said.objects] == ["upload_aborted", "uploads_aborted"]
    assert s3_server.open_uploads(bucket) == [("a", kept)]


def test_young_uploads_are_left_alone(s3_server: S3Server, bucket: str) -> None:
    open_upload(s3_server, bucket, "a")
    assert call("abort", f"s3://{bucket}/", "--older-than", "1d", "--endpoint", s3_server.endpoint).code == 0
    assert len(s3_server.open_uploads(bucket)) == 1
    assert call("abort", f"s3://{bucket}/", "--older-than", "0s", "--endpoint", s3_server.endpoint).code == 0
    assert s3_server.open_uploads(bucket) == []


def test_a_whole_bucket_is_not_emptied_by_a_slip(s3_server: S3Server, bucket: str) -> None:
    open_upload(s3_server, bucket, "a")
    for url in (f"s3://{bucket}", f"s3://{bucket}/"):
        said = call("abort", url, "--endpoint", s3_server.endpoint)
        assert said.code == 2
        assert "--older-than" in said.err
    assert len(s3_server.open_uploads(bucket)) == 1


def test_what_can_t_be_removed_is_told_with_the_command(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.errors import StoreError
    from stages.store.s3 import S3Client

    upload_id = open_upload(s3_server, bucket, "a")

    async def refuse(self: S3Client, key: str, upload_id: str) -> None:
        raise StoreError("AccessDenied", status=403)

    monkeypatch.setattr(S3Client, "abort_upload", refuse)
    said = call("abort", f"s3://{bucket}/a", "--endpoint", s3_server.endpoint)
    assert said.code == 4
    assert f"aws s3api abort-multipart-upload --bucket {bucket} --key a --upload-id {upload_id}" in said.err


def test_a_bucket_that_is_not_there_exits_1(s3_server: S3Server, bucket: str) -> None:
    said = call("list", f"s3://{bucket}-absent/", "--endpoint", s3_server.endpoint)
    assert said.code == 1
    assert "NoSuchBucket" in said.err


# ---- temporary files -----------------------------------------------------------------------------------------------


def leave(folder: Path, target: str, *, age_s: float = 0.0, token: str = "123") -> Path:
    """A temporary file as a killed run leaves it."""
    path = folder / partial_name(target, "web01", token)
    path.write_bytes(bytes(8192))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_temporary_files_of_one_target_are_found_and_removed(tmp_path: Path) -> None:
    manifest = leave(tmp_path, "web01.qcow2")
    manifest = manifest.rename(tmp_path / f"{manifest.name}.manifest.json")
    mine = leave(tmp_path, "web01.qcow2", age_s=90_000)
    theirs = leave(tmp_path, "web02.qcow2", token="9")
    others = [
        tmp_path / name
        for name in ("web01.qcow2", ".web01.qcow2.swp", ".web01.qcow2.x.Y.partial", ".web01.qcow2.1.partial")
    ]
    for other in others:
        other.write_text("precious")
    target = tmp_path / "web01.qcow2"
    said = call("list", target, "--json")
    assert [one.get("upload_id") for one in said.objects] == [mine.name, manifest.name, None]
    assert call("abort", target, "--older-than", "1d").code == 0
    assert (mine.exists(), manifest.exists()) == (False, True)
    assert call("abort", f"file://{target}").code == 0
    assert sorted(tmp_path.iterdir()) == sorted([*others, theirs])


def test_a_folder_needs_no_slash_to_be_looked_into(tmp_path: Path) -> None:
    mine = leave(tmp_path, "web01.qcow2")
    for url in (tmp_path, f"{tmp_path}/", f"file://{tmp_path}"):
        assert [one.get("upload_id") for one in call("list", url, "--json").objects] == [mine.name, None]
        said = call("abort", url)
        assert said.code == 2
        assert "--older-than" in said.err
    assert mine.exists()
    assert call("abort", tmp_path, "--older-than", "0s").code == 0
    assert not mine.exists()


def test_commands_that_are_told_remove_what_was_listed(tmp_path: Path) -> None:
    folder = tmp_path / "my images"
    folder.mkdir()
    for url in (folder, folder / "a.raw"):
        leave(folder, "a.raw")
        leave(folder, "a.raw", token="9")
        other = leave(folder, "b.raw")
        paste(call("list", url).out)
        assert list(folder.iterdir()) == ([] if url == folder else [other])


def test_commands_that_are_told_abort_the_uploads_of_a_bucket(s3_server: S3Server, bucket: str) -> None:
    open_upload(s3_server, bucket, "a b", parts=1)
    open_upload(s3_server, bucket, "c")
    paste(call("list", f"s3://{bucket}/", "--endpoint", s3_server.endpoint).out)
    assert s3_server.open_uploads(bucket) == []


def paste(listing: str) -> None:
    """Run every command that a listing tells, just as it stands there."""
    commands = [line.strip() for line in listing.splitlines() if line.startswith("  pipeline uploads ")]
    assert commands
    for command in commands:
        said = call(*shlex.split(command)[2:])
        assert (said.code, said.out.splitlines()[-1]) == (0, "1 removed"), said.err


def test_a_missing_folder_exits_1(tmp_path: Path) -> None:
    said = call("list", tmp_path / "absent" / "image")
    assert said.code == 1
    assert "can't be read" in said.err


def test_temporary_files_of_an_sftp_server_are_found_and_removed(
    sftp_server: SftpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ssh = tmp_path / ".ssh"
    ssh.mkdir()
    (ssh / "id_ed25519").write_bytes(sftp_server.identity.read_bytes())
    (ssh / "known_hosts").write_bytes(sftp_server.known_hosts.read_bytes())
    name = f"{tmp_path.name}.raw"
    mine = leave(sftp_server.data, name, age_s=90_000, token="0badcafe")
    fresh = leave(sftp_server.data, name, token="0badf00d")
    (found, other, total) = call("list", sftp_server.url(name), "--json").objects
    assert found["upload_id"] == mine.name
    assert found["uri"] == sftp_server.url(mine.name)
    assert 89_000 < found["age_s"] < 91_000
    assert (other["upload_id"], total["bytes"]) == (fresh.name, 16384)
    assert call("abort", sftp_server.url(name), "--older-than", "1d").code == 0
    assert (mine.exists(), fresh.exists()) == (False, True)
    assert call("abort", sftp_server.url(""), "--upload-id", fresh.name).code == 0
    assert not fresh.exists()
    last = leave(sftp_server.data, name, token="0badf00d")
    folder = sftp_server.url("").rstrip("/")
    assert last.name in [one.get("upload_id") for one in call("list", folder, "--json").objects]
    refused = call("abort", folder)
    assert refused.code == 2
    assert "--older-than" in refused.err
    paste(call("list", folder).out)
    assert not last.exists()


@pytest.mark.parametrize("url", ["ftp://host/x", "nbd://host/x", "s3://"])
def test_where_nothing_can_be_left_is_wrong_usage(url: str) -> None:
    assert call("list", url).code == 2


def test_an_age_that_is_none_is_wrong_usage(tmp_path: Path) -> None:
    said = call("abort", tmp_path / "x", "--older-than", "long")
    assert said.code == 2
    assert "is not a duration" in said.err


@pytest.mark.parametrize("verb", ["list", "abort"])
def test_each_has_help_and_the_options_that_all_have(verb: str) -> None:
    said = call(verb, "--help")
    assert said.code == 0
    assert "--json" in said.out
    assert "--endpoint" in said.out


@pytest.mark.parametrize(
    "name, target, expected",
    [
        (partial_name("a.raw", "web", "12"), "a.raw", True),
        (partial_name("a.raw", "w/e.b", "12"), "a.raw", True),
        (partial_name("a.raw", "web", "12") + ".manifest.json", "a.raw", True),
        (partial_name("a.raw", "web", "12"), "a", False),
        ("a.raw", "", False),
        (".a.raw.partial", "a.raw", False),
    ],
)
def test_temporary_names_are_told_from_others(name: str, target: str, expected: bool) -> None:
    assert is_partial(name, target) == expected
