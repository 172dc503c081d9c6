"""checksum.image: the same digests whatever the pieces and their order."""

from __future__ import annotations

import base64
import hashlib
import random
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import xxhash
from awscrt import checksums

from pipeline.errors import ConfigError, StageError
from pipeline.units import KiB, MiB, TiB
from stages.checksum.image_digest import CHUNK, WINDOW, Crc, ImageDigest
from tests.chains import export, write_toml
from tests.disks.letters import write_disk

SIZE = 27 * MiB + 12345
DRAW = random.Random(5)
IMAGE = bytearray(DRAW.randbytes(SIZE))
IMAGE[9 * MiB : 26 * MiB + 7] = bytes(17 * MiB + 7)
IMAGE[100:300_000] = bytes(299_900)


def expected(image: bytes) -> tuple[str, bytes]:
    """Root and windows, by the definition alone."""
    windows = b""
    for start in range(0, len(image), WINDOW):
        window = image[start : start + WINDOW]
        chunks = (window[at : at + CHUNK] for at in range(0, len(window), CHUNK))
        windows += xxhash.xxh3_128_digest(b"".join(map(xxhash.xxh3_128_digest, chunks)))
    root = xxhash.xxh3_128(b"image digest, version 1\0" + len(image).to_bytes(8, "little") + windows)
    return root.hexdigest(), windows


def digest(spans: list[tuple[int, int]], crc: Crc = "crc64nvme") -> tuple[dict[str, Any], int]:
    """Of the image, taken in as these spans; and how many bytes had to wait."""
    made = ImageDigest(crc)
    waited = 0
    for start, stop in spans:
        if any(IMAGE[start:stop]):
            made.add(start, bytes(IMAGE[start:stop]))
        else:
            made.add_zeros(start, stop - start)
        waited = max(waited, made.waiting_bytes)
    return made.finish(), waited


def cut(*more: int, seed: int = 1) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    edges = sorted({0, SIZE, 9 * MiB, 26 * MiB + 7, *more, *(draw.randrange(SIZE) for _ in range(40))})
    return list(pairwise(edges))


WHOLE, _ = digest([(0, SIZE)])


def test_digests_are_what_they_are_defined_to_be() -> None:
    root, windows = expected(bytes(IMAGE))
    assert WHOLE["root"] == root
    assert zlib.decompress(base64.b64decode(WHOLE["windows"])) == windows
    assert int(WHOLE["crc64nvme"], 16) == checksums.crc64nvme(bytes(IMAGE))
    assert int(digest(cut(), "crc32c")[0]["crc32c"], 16) == checksums.crc32c(bytes(IMAGE))


@pytest.mark.parametrize("head", [512, 64 * KiB, 1536 + 4096, 5 * MiB, 9 * MiB])
def test_head_that_comes_last_changes_nothing_and_little_waits_for_it(head: int) -> None:
    spans = cut(head)
    late = [span for span in spans if span[0] >= head] + [span for span in spans if span[0] < head]
    made, waited = digest(late)
    assert made == WHOLE
    assert waited < CHUNK


def test_pieces_that_overtake_each_other_change_nothing() -> None:
    spans = cut(seed=3)
    for index in range(0, len(spans) - 1, 2):
        spans[index], spans[index + 1] = spans[index + 1], spans[index]
    assert digest(spans)[0] == WHOLE


def test_gap_is_an_error() -> None:
    spans = cut()
    del spans[7]
    with pytest.raises(StageError, match="bytes of the image are missing"):
        digest(spans)


def test_byte_that_comes_twice_is_an_error() -> None:
    with pytest.raises(StageError, match="came twice"):
        digest([*cut(), (5, 9)])


def test_terabytes_of_zeros_take_no_time_a_byte() -> None:
    made = ImageDigest("crc64nvme")
    made.add_zeros(0, 2 * TiB)
    found = made.finish()
    other = ImageDigest("crc64nvme")
    for start in range(0, 2 * TiB, TiB // 4):
        other.add_zeros(start, TiB // 4)
    assert other.finish() == found


def test_empty_image_has_digests() -> None:
    assert ImageDigest("crc64nvme").finish()["size"] == 0


def chain(folder: Path, *stages: str) -> Path:
    disk = write_disk(folder / "disk.raw", "AB0-A" + "-" * 9 + "C0", tail=1024)
    return write_toml(
        folder / "export.toml", f'read.disk; path = "{disk}"', "checksum.guest", "sparse.zeros", *stages,
        f'write.file; path = "{folder / "image"}"', "verify.readback",
    )  # fmt: skip


@pytest.mark.parametrize(
    "encoder", ["encode.raw", "encode.qcow2", "encode.vhd", "encode.vhdx", 'encode.vmdk; variant = "monolithicSparse"']
)
async def test_digest_in_the_manifest_is_that_of_the_stored_file(tmp_path: Path, encoder: str) -> None:
    outcome = await export(chain(tmp_path, encoder, "checksum.image"))
    image = (tmp_path / "image").read_bytes()
    found = outcome.manifest.facts["image digest"]
    assert found["size"] == len(image)
    assert found["root"] == expected(image)[0]
    assert int(found["crc64nvme"], 16) == checksums.crc64nvme(image)


async def test_digest_behind_a_compressor_is_that_of_the_stream(tmp_path: Path) -> None:
    outcome = await export(chain(tmp_path, "encode.raw", "compress.gzip", "checksum.image; sha256 = true"))
    assert (
        outcome.manifest.facts["image digest"]["sha256"]
        == hashlib.sha256((tmp_path / "image").read_bytes()).hexdigest()
    )


async def test_sha256_of_an_image_whose_head_comes_last_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        await export(chain(tmp_path, "encode.qcow2", "checksum.image; sha256 = true"))
    assert 'checksum.image takes pieces "sequential", and encode.qcow2 gives them "head last"' in str(caught.value)
    assert "from its first byte to its last" in str(caught.value)


@pytest.mark.parametrize("stages", [("checksum.image", "encode.raw"), ("encode.raw", "checksum.image", "compress.lz4")])
async def test_it_stands_right_before_the_writer(tmp_path: Path, stages: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="stands in the wrong place"):
        await export(chain(tmp_path, *stages))


async def test_second_compressor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compress\.zstd is a second compressor"):
        await export(chain(tmp_path, "encode.raw", "compress.lz4", "compress.zstd"))
