"""Peak memory stays within `memory` + 128 MiB, whatever the disk's size."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.flow.manifest import Manifest
from pipeline.units import GiB, MiB, TiB
from tests.chains import write_toml

MEMORY = 96 * MiB
BASE = 128 * MiB


@contextmanager
def started_sink(folder: Path, fail_from: int) -> Iterator[int]:
    """The port of a store that keeps checksums only, and refuses the first part of at least `fail_from` bytes once."""
    port_file = folder / "port"
    command = [sys.executable, "-m", "tests.stores.sink", str(port_file), "--fail-from", str(fail_from)]
    process = subprocess.Popen(command)
    try:
        while not port_file.exists():
            assert process.poll() is None
            os.sched_yield()
        yield int(port_file.read_text())
    finally:
        process.kill()
        process.wait()


def run_with_few_parts(toml: Path, port: int, parts: int) -> tuple[int, str]:
    """Export to the sink in a process of its own; returns its peak memory in bytes and what it told on stderr."""
    credentials = {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "tests.end_to_end.small_limits", str(parts), "run", str(toml)]
    done = subprocess.run(command, env=os.environ | credentials, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stderr.strip().splitlines()[-1]), done.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "size, parts, longest, encoder",
    [
        (64 * GiB, 64, 5 * GiB, 'encode.qcow2; compression = "none"'),
        (GiB, 12, 240 * MiB, "encode.qcow2"),
        (2 * GiB, 12, 547 * MiB, "encode.raw"),
    ],
)
def test_disk_far_larger_than_memory_travels_in_bounded_memory(
    tmp_path: Path, size: int, parts: int, longest: int, encoder: str
) -> None:
    """So few parts that late ones are far longer than memory: streamed, and made again: one of the longest is refused.

    It is one, because each costs its length twice: of a few lengths, the longest is the one that matters.
    """
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.synthetic; size = "{size // MiB} MiB"',
        "checksum.guest",
        "sparse.zeros",
        encoder,
        'write.s3; url = "s3://images/disk"',
        "verify.receipt",
        memory=f"{MEMORY // MiB} MiB",
    )
    with started_sink(tmp_path, longest * 9 // 10) as port:
        peak, told = run_with_few_parts(toml, port, parts)
    assert peak <= MEMORY + BASE, f"{peak / MiB:.0f} MiB"
    manifest = Manifest.from_json((tmp_path / "disk.manifest.json").read_bytes(), where="here")
    assert manifest.state == "identical"
    assert manifest.image.size >= size
    assert "InternalError" in told, "no part was refused"


# What may be 8 TiB large, and the dynamic VHD at its limit. GCE's archive has no holes: 8 TiB of zeros are 8 GiB there.
LARGE = [
    ("encode.raw", 8 * TiB),
    ("encode.qcow2", 8 * TiB),
    ('encode.qcow2; compression = "none"', 8 * TiB),
    ("encode.vhdx", 8 * TiB),
    ('encode.vhd; variant = "fixed"', 8 * TiB),
    ("encode.vhd", 2040 * GiB),
    ("encode.vmdk", 8 * TiB),
    ("encode.ova", 8 * TiB),
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("encoder, size", LARGE)
def test_tables_of_a_huge_virtual_disk_take_no_memory(tmp_path: Path, encoder: str, size: int) -> None:
    """A file of holes with a little data at both ends and between: a process of its own."""
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        for offset in (0, size // 3 // MiB * MiB, size - MiB):
            file.seek(offset)
            file.write(os.urandom(MiB))
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.disk; path = "{disk}"; blocks = "all"',
        "checksum.guest",
        "sparse.zeros",
        encoder,
        f'write.file; path = "{tmp_path / "image"}"',
        "verify.readback",
        memory=f"{MEMORY // MiB} MiB",
    )
    # Not by wait4: Linux counts the memory of whoever forks towards the peak of the child.
    command = [sys.executable, "-m", "tests.end_to_end.small_limits", "10000", "run", "--quiet", str(toml)]
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stderr.strip().splitlines()[-1])
    assert peak <= MEMORY + BASE, f"{peak / MiB:.0f} MiB"
    manifest = Manifest.from_json((tmp_path / "image.manifest.json").read_bytes(), where="here")
    assert manifest.state == "identical"
    assert manifest.image.virtual_size >= size
