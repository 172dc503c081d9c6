"""The stores start, keep what they acknowledged, and answer as the writers and verifiers rely on."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.stores.process import ProcessIdentity
from tests.stores.s3 import Answer, S3Server, StoreProcess

MIB = 1024 * 1024
PART = bytes(5 * MIB)
OTHER_PART = b"\x01" * (5 * MIB)
SMALL = b"the last part may be small"


def crc32(data: bytes) -> str:
    """The value of x-amz-checksum-crc32."""
    return base64.b64encode(struct.pack(">I", zlib.crc32(data))).decode()


def md5(data: bytes) -> bytes:
    """For Content-MD5 and ETags only."""
    return hashlib.md5(data, usedforsecurity=False).digest()


def open_upload(server: S3Server, bucket: str, key: str) -> str:
    """Begin a multipart upload."""
    answer = server.request("POST", f"/{bucket}/{key}", {"uploads": ""})
    found = re.search(rb"<UploadId>(.+)</UploadId>", answer.body)
    assert found, answer
    return found[1].decode()


def put_part(server: S3Server, bucket: str, key: str, upload: str, number: int, data: bytes) -> str:
    """Store one part; returns its ETag."""
    answer = server.request("PUT", f"/{bucket}/{key}", {"partNumber": str(number), "uploadId": upload}, body=data)
    assert answer.status == 200, answer
    return answer.headers["etag"]


def complete(
    server: S3Server, bucket: str, key: str, upload: str, parts: dict[int, str], headers: dict[str, str] | None = None
) -> Answer:
    """Make the parts, number to ETag, an object."""
    listed = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>" for number, etag in parts.items()
    )
    body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
    return server.request("POST", f"/{bucket}/{key}", {"uploadId": upload}, headers, body)


def test_object_comes_back_as_it_was_stored(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    etag = s3_server.put(bucket, "folder/an object", SMALL)
    assert etag.strip('"') == md5(SMALL).hex()
    assert s3_server.get(bucket, "folder/an object") == SMALL
    assert s3_server.request("GET", f"/{bucket}/folder/an object").body == SMALL
    assert s3_server.keys(bucket) == ["folder/an object"]
    s3_server.delete_bucket(bucket)
    assert s3_server.request("HEAD", f"/{bucket}").status == 404


def test_parts_come_in_any_order_with_gaps_and_replaced(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    upload = open_upload(s3_server, bucket, "image")
    last = put_part(s3_server, bucket, "image", upload, 10_000, SMALL)
    put_part(s3_server, bucket, "image", upload, 3, OTHER_PART)
    second = put_part(s3_server, bucket, "image", upload, 7, OTHER_PART)
    first = put_part(s3_server, bucket, "image", upload, 3, PART)
    assert s3_server.open_uploads(bucket) == [("image", upload)]
    answer = complete(s3_server, bucket, "image", upload, {3: first, 7: second, 10_000: last})
    assert (answer.status, answer.code) == (200, "")
    assert s3_server.open_uploads(bucket) == []
    assert s3_server.get(bucket, "image") == PART + OTHER_PART + SMALL
    etag = s3_server.request("HEAD", f"/{bucket}/image").headers["etag"]
    assert etag.strip('"') == md5(md5(PART) + md5(OTHER_PART) + md5(SMALL)).hex() + "-3"


def test_second_complete_of_a_lost_reply_succeeds(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    upload = open_upload(s3_server, bucket, "image")
    parts = {1: put_part(s3_server, bucket, "image", upload, 1, SMALL)}
    assert [complete(s3_server, bucket, "image", upload, parts).status for _ in range(2)] == [200, 200]


def test_existing_object_is_not_replaced_when_asked_not_to(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    s3_server.put(bucket, "image", b"first")
    only_new = {"If-None-Match": "*"}
    assert s3_server.request("PUT", f"/{bucket}/image", headers=only_new, body=SMALL).status == 412
    upload = open_upload(s3_server, bucket, "image")
    parts = {1: put_part(s3_server, bucket, "image", upload, 1, SMALL)}
    assert complete(s3_server, bucket, "image", upload, parts, only_new).status == 412
    assert s3_server.get(bucket, "image") == b"first"
    assert s3_server.open_uploads(bucket) == [("image", upload)]


@pytest.mark.parametrize(
    "name, value",
    [("x-amz-checksum-crc32", crc32(b"other")), ("Content-MD5", base64.b64encode(md5(b"other")).decode())],
)
def test_wrong_checksum_is_refused_and_nothing_stored(s3_server: S3Server, name: str, value: str) -> None:
    bucket = s3_server.new_bucket()
    answer = s3_server.request("PUT", f"/{bucket}/image", headers={name: value}, body=SMALL)
    assert (answer.status, answer.code) == (400, "BadDigest")
    assert s3_server.keys(bucket) == []


def test_small_middle_part_and_aborted_upload_are_refused(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    upload = open_upload(s3_server, bucket, "image")
    etag = put_part(s3_server, bucket, "image", upload, 1, SMALL)
    put_part(s3_server, bucket, "image", upload, 2, SMALL)
    assert complete(s3_server, bucket, "image", upload, {1: etag, 2: etag}).code == "EntityTooSmall"
    assert s3_server.request("DELETE", f"/{bucket}/image", {"uploadId": upload}).status == 204
    assert complete(s3_server, bucket, "image", upload, {1: etag}).code == "NoSuchUpload"
    assert s3_server.keys(bucket) == []


def test_who_may_not_write_cannot(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    limited = s3_server.as_limited()
    assert limited.request("PUT", f"/{bucket}/image", body=SMALL).code == "AccessDenied"
    assert limited.request("POST", f"/{bucket}/image", {"uploads": ""}).code == "AccessDenied"


def test_wrong_signature_and_missing_bucket_are_refused(s3_server: S3Server) -> None:
    forged = replace(s3_server.credentials, secret_key="guessed")
    bucket = s3_server.new_bucket()
    answer = replace(s3_server, credentials=forged).request("PUT", f"/{bucket}/image", body=SMALL)
    assert (answer.status, answer.code) == (403, "SignatureDoesNotMatch")
    assert s3_server.request("PUT", f"/{bucket}-other/image", body=SMALL).code == "NoSuchBucket"


def test_client_that_does_not_know_the_authority_refuses_the_server(seaweedfs_tls: S3Server) -> None:
    bucket = seaweedfs_tls.new_bucket()
    seaweedfs_tls.put(bucket, "image", SMALL)
    assert seaweedfs_tls.request("GET", f"/{bucket}/image").body == SMALL
    context = ssl.create_default_context()
    with socket.create_connection(("127.0.0.1", seaweedfs_tls.port)) as plain:
        with pytest.raises(ssl.SSLCertVerificationError):
            context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_http_and_https_reach_the_same_store(seaweedfs: S3Server, seaweedfs_tls: S3Server) -> None:
    bucket = seaweedfs.new_bucket()
    seaweedfs.put(bucket, "image", SMALL)
    assert seaweedfs_tls.get(bucket, "image") == SMALL


def test_killed_store_keeps_its_port_and_every_acknowledged_part(own_store: StoreProcess) -> None:
    server = own_store.server
    bucket = server.new_bucket()
    upload = open_upload(server, bucket, "image")
    parts = {1: put_part(server, bucket, "image", upload, 1, PART)}
    own_store.kill()
    with pytest.raises(ConnectionRefusedError):
        server.request("HEAD", f"/{bucket}")
    own_store.start()
    assert own_store.server == server
    parts[2] = put_part(server, bucket, "image", upload, 2, SMALL)
    assert complete(server, bucket, "image", upload, parts).status == 200
    assert server.get(bucket, "image") == PART + SMALL
    assert 20 * MIB < own_store.resident_bytes() < 1500 * MIB


SHARED_TEST = """
import os, time
from pathlib import Path
import pytest
from tests.stores.process import run_folder
from tests.stores.fixtures import _session

@pytest.mark.parametrize("number", range(4))
def test_same_server(swift, number):
    state = (run_folder(_session()) / "swift" / "process.json").read_text()
    Path(os.environ["SEEN"], f"{os.getpid()}-{number}").write_text(swift.endpoint + " " + state)
    assert swift.new_bucket()
"""


def test_workers_share_a_server_that_ends_with_the_session(tmp_path: Path) -> None:
    """Two pytest-xdist workers get the same Swift, and when the session is over it is gone with its data."""
    test_file = tmp_path / "test_shared.py"
    test_file.write_text(SHARED_TEST)
    seen = tmp_path / "seen"
    seen.mkdir()
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "tests.stores.fixtures", "--rootdir", str(tmp_path)]
    command += ["-p", "no:hypothesispytest", "-o", "asyncio_default_fixture_loop_scope=function"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    project = str(Path(__file__).parents[2])
    subprocess.run(
        [*command, str(test_file)],
        check=True,
        env=environment | {"SEEN": str(seen), "PYTHONPATH": project},
        cwd=tmp_path,
        capture_output=True,
    )
    notes = list(seen.iterdir())
    assert len({note.name.partition("-")[0] for note in notes}) == 2, "both workers took part"
    assert len({note.read_text() for note in notes}) == 1
    pairs = re.findall(r"\[(\d+), (\d+)\]", notes[0].read_text())
    assert len(pairs) == 5
    assert not any(ProcessIdentity(int(pid), int(started)).is_running() for pid, started in pairs)


def test_demo_gives_its_command_a_store_and_its_exit_code_back(tmp_path: Path) -> None:
    script = """
import botocore.session, os, sys
client = botocore.session.Session().create_client("s3", region_name=os.environ["AWS_REGION"])
old = [entry["Key"] for entry in client.list_objects_v2(Bucket="images").get("Contents", ())]
client.put_object(Bucket="images", Key="image", Body=b"data")
print(old)
sys.exit(7)
"""
    project = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.stores.demo", "--folder", str(tmp_path / "store"), "--"]
    results = [
        subprocess.run(
            [*command, sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=False
        )
        for _ in range(2)
    ]
    assert [result.returncode for result in results] == [7, 7], results
    assert [result.stdout.strip() for result in results] == ["[]", "['image']"]
