"""What is wrong before the first byte: a clear message, exit code 2 (or 1 where a store is down), nothing touched."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.chains import write_toml
from tests.end_to_end.command import call, run
from tests.end_to_end.places import CHAIN, Place, unused_name
from tests.stores.faults import Rule, error_reply
from tests.stores.proxy import FaultProxy


def file_toml(folder: Path, disk: Path, *more: str) -> Path:
    return write_toml(
        folder / "export.toml",
        f'read.disk; path = "{disk}"',
        *CHAIN,
        "encode.qcow2",
        f'write.file; path = "{folder / "disk.qcow2"}"',
        *more,
    )


@pytest.mark.parametrize("verb", ["run", "check", "plan"])
def test_unknown_stage_option_and_section_and_a_wrong_type_are_told_at_once(
    tmp_path: Path, letters: Path, verb: str
) -> None:
    toml = file_toml(tmp_path, letters)
    text = toml.read_text().replace('"encode.qcow2"', '"encode.qcow"\nlevel = 3')
    text = text.replace('use = "sparse.zeros"', 'use = "sparse.zeros"\ngrian = "64 KiB"')
    text = text.replace('use = "checksum.guest"', 'use = "checksum.guest"\nalgorithm = 3')
    toml.write_text(text + '\n[exprot]\nname = "x"\n')
    said = call(verb, toml)
    assert said.code == 2
    assert said.has(
        'export.toml:9:13: algorithm: 3 is not one of "xxh3-128", "blake3"',
        'unknown option "grian" for sparse.zeros',
        'did you mean "grain"?',
        'unknown stage "encode.qcow"',
        'did you mean "encode.qcow2"?',
        "exprot",
        'did you mean "export"?',
        "4 faults in the configuration; nothing was touched",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["export.toml"]


@pytest.mark.parametrize(
    "stages, words",
    [
        (("{read}", "encode.raw", "checksum.guest", "{write}"), ("checksum.guest stands in the wrong place",)),
        (("{read}", "sparse.zeros", "checksum.guest", "encode.raw", "{write}"), ("digest is taken of what was read",)),
        (("{write}", "encode.raw", "{read}"), ("stands in the wrong place", "read.disk -> encode.raw -> write.file")),
        (("{read}", "{write}"), ("the chain has no encoder", "encode.qcow2")),
        (
            ("{read}", "encode.raw", "{write}", "verify.readback"),
            ("needs the guest digest", "Add checksum.guest after the source."),
        ),
    ],
)
def test_wrong_order_of_stages_shows_the_right_one(
    tmp_path: Path, letters: Path, stages: tuple[str, ...], words: tuple[str, ...]
) -> None:
    names = {"read": f'read.disk; path = "{letters}"', "write": f'write.file; path = "{tmp_path}/disk.image"'}
    toml = write_toml(tmp_path / "export.toml", *(stage.format_map(names) for stage in stages))
    said = call("run", toml)
    assert said.code == 2
    assert said.has(*words, "nothing was touched")
    assert [path.name for path in tmp_path.iterdir()] == ["export.toml"]


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_missing_credentials_are_told_with_where_they_are_looked_for(one_place: Place, verb: str) -> None:
    said = call(verb, one_place.toml(), env={"AWS_ENDPOINT_URL_S3": one_place.server.endpoint})
    assert said.code == 2
    assert said.has("there are no credentials for the store", "AWS_ACCESS_KEY_ID", "~/.aws")
    assert one_place.nothing_is_left()


def test_wrong_credentials_are_told_with_their_origin_but_not_with_the_secret(place: Place) -> None:
    secret = "wrong-secret-of-somebody"
    said = call("run", place.toml(), env={**place.env, "AWS_SECRET_ACCESS_KEY": secret})
    assert said.code == 2
    assert said.has("the store refuses", "environment variables", place.server.credentials.access_key)
    assert secret not in said.err
    unknown = call("run", place.toml(), env={**place.env, "AWS_ACCESS_KEY_ID": "nobody"})
    assert unknown.code == 2
    assert unknown.has("the store refuses", "Check key, secret")
    assert place.nothing_is_left()


def test_credentials_that_may_not_write_leave_nothing(place: Place) -> None:
    """Swift refuses this identity in planning, SeaweedFS lets it look and refuses the upload."""
    said = call("run", place.toml(), env=place.server.as_limited().environment())
    assert said.code in (1, 2)
    assert said.has("AccessDenied", "They need to list the bucket, and to read, put and delete this object.")
    assert place.nothing_is_left()


def test_missing_bucket_is_named(place: Place) -> None:
    name = unused_name()
    said = call("run", place.toml(), "--set", f"write.s3.url=s3://{name}/disk", env=place.env)
    assert said.code == 2
    assert said.has("NoSuchBucket", f'Create the bucket "{name}"')
    assert place.nothing_is_left()


@pytest.mark.parametrize("taken", ["disk.image", "disk.image.manifest.json"])
def test_target_that_exists_is_refused_and_left_alone(place: Place, taken: str) -> None:
    place.server.put(place.bucket, taken, b"somebody's")
    said = call("run", place.toml(), env=place.env)
    assert said.code == 2
    assert said.has("the target exists", f"{place.bucket}/{taken}", "overwrite = true")
    assert place.server.keys(place.bucket) == [taken]
    assert place.server.get(place.bucket, taken) == b"somebody's"
    assert place.no_file_is_left()


@pytest.mark.parametrize("taken", ["disk.qcow2", "disk.qcow2.manifest.json"])
def test_target_file_that_exists_is_refused_and_left_alone(tmp_path: Path, letters: Path, taken: str) -> None:
    (tmp_path / taken).write_bytes(b"somebody's")
    said = call("run", file_toml(tmp_path, letters))
    assert said.code == 2
    assert said.has("the target exists", taken, "overwrite = true")
    assert (tmp_path / taken).read_bytes() == b"somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == [taken, "export.toml"]


def test_folder_of_the_target_has_to_be_there(tmp_path: Path, letters: Path) -> None:
    said = call("run", file_toml(tmp_path, letters), "--set", f"write.file.path={tmp_path}/no/such/disk.qcow2")
    assert said.code == 2
    assert said.has("the target's folder does not exist", f"mkdir -p {tmp_path}/no/such")


@pytest.mark.parametrize(
    "source, words",
    [
        ("missing.raw", ("can't open the source: No such file or directory", "lsblk")),
        (".", ("neither a block device nor a file",)),
        ("/dev/null", ("neither a block device nor a file",)),
        ("empty.raw", ("the source is empty",)),
        ("pipe", ("neither a block device nor a file",)),
    ],
)
def test_source_that_is_no_disk_is_refused(tmp_path: Path, source: str, words: tuple[str, ...]) -> None:
    (tmp_path / "empty.raw").touch()
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it: opening it the usual way waits for ever
    said = call("run", file_toml(tmp_path, tmp_path / source))
    assert said.code == 2
    assert said.has(*words, source)


def test_store_that_is_not_there_is_told_in_planning(one_place: Place) -> None:
    """A refused connection is worth some retries: it may be starting."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it
        port = taken.getsockname()[1]
        said = call("run", one_place.toml(options="attempts = 2"), env=one_place.through(f"http://127.0.0.1:{port}"))
    assert said.code == 1
    assert said.has("can't connect", f"http://127.0.0.1:{port}", 'Check "endpoint", that the store runs')
    assert one_place.nothing_is_left()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "http://h/path"])
def test_endpoint_that_is_no_url_is_refused(one_place: Place, endpoint: str) -> None:
    said = call("run", one_place.toml(options=f'endpoint = "{endpoint}"'), env=one_place.env)
    assert said.code == 2
    assert said.has("is not the URL of a store", "https://HOST")


@pytest.mark.parametrize("url", ["s3://bucket/", "bucket/key"])
def test_url_that_names_no_object_is_refused(one_place: Place, url: str) -> None:
    said = call("run", one_place.toml(), "--set", f'write.s3.url="{url}"', env=one_place.env)
    assert said.code == 2
    assert said.has("does not name an object", "s3://BUCKET/NAME")


async def test_refusal_of_the_list_of_uploads_is_no_obstacle(one_place: Place) -> None:
    """Many credentials may put objects and not list uploads."""
    rule = Rule(error_reply(403, "AccessDenied"), method="GET", query="uploads")
    async with FaultProxy(one_place.server.port, rules=[rule]) as proxy:
        said = await run("run", one_place.toml(), env=one_place.through(proxy.url))
    assert said.code == 0, said.err
    assert one_place.server.keys(one_place.bucket) == ["disk.image", "disk.image.manifest.json"]


def test_plan_sends_nothing(place: Place) -> None:
    said = call("plan", place.toml(), env=place.env)
    assert said.code == 0, said.err
    assert "Nothing was sent" in said.out
    assert place.nothing_is_left()
