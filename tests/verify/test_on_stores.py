"""`pipeline verify` on images in real S3 stores."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.commands.verify import command
from tests.decode.images import Patched
from tests.stores.s3 import S3Server
from tests.verify.test_command import image, manifest_of  # noqa: F401  # a fixture


@pytest.fixture
def url(s3_server: S3Server, image: Path, monkeypatch: pytest.MonkeyPatch) -> str:  # noqa: F811
    """The image and its manifest in a bucket of their own, and credentials in the environment."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.new_bucket()
    s3_server.put(bucket, "web01.qcow2", image.read_bytes())
    s3_server.put(bucket, "web01.qcow2.manifest.json", manifest_of(image).read_bytes())
    return f"s3://{bucket}/web01.qcow2"


def call(server: S3Server, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(command, [*arguments, "--endpoint", server.endpoint], prog_name="verify")
    return done.exit_code, done.output


def test_an_image_in_a_store_is_read_back_and_a_changed_one_is_found(s3_server: S3Server, url: str) -> None:
    code, output = call(s3_server, url)
    assert code == 0, output
    assert "identical (readback)" in output
    bucket = url.split("/")[2]
    patched = Patched(s3_server.get(bucket, "web01.qcow2"))
    patched.bytes[(patched.u64(patched.plain[0]) & 0xFF_FFFF_FFFF_FE00) + 9] ^= 1
    s3_server.put(bucket, "web01.qcow2", bytes(patched.bytes))
    code, output = call(s3_server, url)
    assert code == 3, output
    s3_server.put(bucket, "web01.qcow2", bytes(patched.bytes[:-65536]))
    assert call(s3_server, url)[0] == 3


def test_a_missing_manifest_in_a_store_is_named(s3_server: S3Server, url: str) -> None:
    code, output = call(s3_server, url + ".other")
    assert code == 1, output
    assert "web01.qcow2.other.manifest.json" in output
