"""`pipeline serve` as people call it: another process, tools beside it, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.decode.images import mixed_disk, run
from tests.end_to_end.command import call, environment
from tests.stores.s3 import S3Server

SIZE = 5 * 1024 * 1024


@contextmanager
def serving(*words: object, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command while it serves, and the URL that it printed; ended with SIGINT, which must be well."""
    command = [sys.executable, "-m", "pipeline", "serve", *(str(word) for word in words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(env))
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline().strip()
        assert line, process.stderr.read()
        yield process, line
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0, process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A compressed qcow2 beside the disk that it holds."""
    (tmp_path / "disk.raw").write_bytes(mixed_disk(SIZE))
    run("qemu-img", "convert", "-c", "-O", "qcow2", str(tmp_path / "disk.raw"), str(tmp_path / "disk.qcow2"))
    return tmp_path / "disk.qcow2"


def test_a_socket_is_served_and_removed(image: Path, tmp_path: Path) -> None:
    socket = tmp_path / "s"
    with serving(image, "--socket", socket) as (_, url):
        assert url == f"nbd+unix:///?socket={socket}"
        run("nbdcopy", url, str(tmp_path / "out"))
        assert (tmp_path / "out").read_bytes() == mixed_disk(SIZE)
    assert not socket.exists()


def test_a_port_is_on_loopback_unless_told_otherwise(image: Path, tmp_path: Path) -> None:
    with serving(image, "--name", "web01", "--json") as (process, line):
        told = json.loads(line)
        assert told["type"] == "serving"
        assert told["url"].startswith("nbd://127.0.0.1:")
        assert told["url"].endswith("/web01")
        assert (told["size"], told["can_write"], told["format"]) == (SIZE, False, "qcow2")
        run("nbdcopy", told["url"], str(tmp_path / "out"))
        listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=False).stdout
        ours = [line.split()[3] for line in listening.splitlines() if f"pid={process.pid}," in line]
        assert all(one.startswith("127.0.0.1:") for one in ours)
    assert (tmp_path / "out").read_bytes() == mixed_disk(SIZE)


def test_an_overlay_outlives_the_server_and_the_image_is_not_touched(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    expected = bytearray(mixed_disk(SIZE))
    for number in (1, 2):
        with serving(image, "--socket", tmp_path / "s", "--overlay", tmp_path / "layer") as (_, url):
            run("qemu-io", "-f", "raw", "-c", f"write -P {number} {number}M 64k", url)
            expected[number << 20 : (number << 20) + 65536] = bytes([number]) * 65536
            run("nbdcopy", url, str(tmp_path / "out"))
            assert (tmp_path / "out").read_bytes() == expected
    assert image.read_bytes() == before


def test_an_image_in_a_bucket_is_read_by_ranges(image: Path, seaweedfs: S3Server, tmp_path: Path) -> None:
    bucket = seaweedfs.new_bucket()
    url = f"s3://{bucket}/disk.qcow2"
    assert call("convert", str(image), url, "--endpoint", seaweedfs.endpoint, env=seaweedfs.environment()).code == 0
    with serving(url, "--endpoint", seaweedfs.endpoint, env=seaweedfs.environment()) as (_, place):
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", place, str(tmp_path / "disk.raw"))
    seaweedfs.delete_bucket(bucket)


def test_what_is_wrong_is_said_before_anything_is_served(image: Path, tmp_path: Path) -> None:
    assert call("serve", str(tmp_path / "nosuch")).code == 1
    assert call("serve", str(image), "--socket", "x", "--port", "1").code == 2
    (tmp_path / "layer").write_bytes(b"x" * 100)
    said = call("serve", str(image), "--overlay", str(tmp_path / "layer"))
    assert said.code == 2
    assert "no layer over this disk" in said.err
    assert os.listdir(tmp_path).count("layer") == 1
