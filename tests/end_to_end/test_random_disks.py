"""Random disks through the whole chain, for every encoder option: judged by qemu-img, the own reader and the digest."""

from __future__ import annotations

import random
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.units import KiB, MiB
from stages.checksum.leaves import GuestDigest
from tests.chains import export, write_toml
from tests.end_to_end.places import CHAIN

ENCODERS = [
    "encode.raw",
    *(f'encode.qcow2; compression = "{kind}"' for kind in ("none", "zlib", "zstd")),
    *(f'encode.qcow2; compression = "{kind}"; level = "small"' for kind in ("zlib", "zstd")),
    *(f'encode.qcow2; compression = "{kind}"; cluster_size = "512 B"' for kind in ("none", "zlib")),
    *(f'encode.qcow2; compression = "{kind}"; cluster_size = "2 MiB"' for kind in ("none", "zstd")),
]


class Stretch(NamedTuple):
    """A stretch of a disk: `noise`, `text` (compresses), `zeros` (stored) or `hole`."""

    kind: str
    length: int


def stretches(longest: int, most: int) -> st.SearchStrategy[list[Stretch]]:
    # Odd lengths, and edges of everything: sectors, clusters, leaves, windows.
    edges = [512, 4 * KiB, 64 * KiB, MiB, 2 * MiB, 4 * MiB]
    lengths = st.one_of(
        st.integers(1, longest),
        st.sampled_from(
            [edge + shift for edge in edges for shift in (-512, -1, 0, 1, 512) if 0 < edge + shift <= longest]
        ),
    )
    kinds = st.sampled_from(["noise", "text", "zeros", "hole"])
    return st.lists(st.builds(Stretch, kinds, lengths), min_size=1, max_size=most)


def write(path: Path, disk: list[Stretch]) -> int:
    """Write the disk, and round it up to a whole sector: a size that disks have. Returns the size."""
    chance = random.Random(str(disk))
    with path.open("wb") as file:
        for kind, length in disk:
            if kind == "hole":
                file.seek(length, 1)
            elif kind == "zeros":
                file.write(bytes(length))
            elif kind == "noise":
                file.write(chance.randbytes(length))
            else:
                line = chance.randbytes(24).hex().encode() + b" the quick brown fox\n"
                file.write((line * (length // len(line) + 1))[:length])
        size = -(-file.tell() // 512) * 512
        file.truncate(size)
    return size


async def judge(disk: list[Stretch], encoder: str) -> None:
    """Export and compare by every judge."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, image = folder / "disk.raw", folder / "disk.image"
        size = write(source, disk)
        toml = write_toml(
            folder / "export.toml",
            f'read.disk; path = "{source}"',
            *CHAIN,
            encoder,
            f'write.file; path = "{image}"',
            "verify.readback",
        )
        outcome = await export(toml)
        assert outcome.state == "identical"
        assert outcome.disk_size == size
        assert outcome.manifest.digest is not None
        # The digest depends on nothing but the disk's bytes.
        seen = GuestDigest.from_json(outcome.manifest.digest)
        if encoder == ENCODERS[0]:
            assert image.read_bytes() == source.read_bytes()
        else:
            raw = write_toml(
                folder / "raw.toml",
                f'read.disk; path = "{image}"; block_size = "4 MiB"',  # the image's own bytes: another disk
                *CHAIN,
                "encode.raw",
                f'write.file; path = "{folder / "other"}"',
            )
            assert GuestDigest.from_json((await export(raw)).manifest.digest or {}) != seen
            subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(image)], check=True, capture_output=True)
        kind = "raw" if encoder == ENCODERS[0] else "qcow2"
        command = ["qemu-img", "compare", "-q", "-f", kind, "-F", "raw", str(image), str(source)]
        subprocess.run(command, check=True, capture_output=True)


QUICK = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("encoder", ENCODERS)
@QUICK
@given(disk=stretches(3 * MiB, 5))
async def test_image_of_a_random_disk_is_that_disk(encoder: str, disk: list[Stretch]) -> None:
    await judge(disk, encoder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("encoder", ENCODERS)
@LONG
@given(disk=stretches(64 * MiB, 12))
async def test_image_of_a_large_random_disk_is_that_disk(encoder: str, disk: list[Stretch]) -> None:
    await judge(disk, encoder)
