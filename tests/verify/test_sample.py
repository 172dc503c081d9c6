"""verify.sample: seeded, and it claims no more than it compared."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.units import MiB
from stages.checksum.leaves import LEAF, GuestDigest, LeafDigests, hash_leaves
from stages.verify.comparison import WINDOW, verify_image
from stages.verify.sample import Options
from stages.verify.sampling import ZERO_WINDOWS, Sample
from tests.chains import export, write_toml
from tests.decode.images import BytesReader
from tests.disks.letters import write_disk

TREE = Path(__file__).parents[2]


def large_digest(data_windows: int, windows: int) -> GuestDigest:
    """A disk whose first windows hold data and whose others are zero, without its bytes."""
    leaves = LeafDigests("xxh3-128", windows * WINDOW)
    leaves.add(random.Random(1).randbytes(16 * data_windows * (WINDOW // LEAF)))
    leaves.add_zeros((windows - data_windows) * (WINDOW // LEAF))
    return GuestDigest(leaves)


def test_choice_is_the_same_for_a_seed_and_another_for_another() -> None:
    digest = large_digest(1000, 10_000)
    first = Sample(seed="a", share=0.02).windows(digest, WINDOW)
    assert first == Sample(seed="a", share=0.02).windows(digest, WINDOW)
    assert first != Sample(seed="b", share=0.02).windows(digest, WINDOW)


def test_choice_holds_the_share_of_the_data_a_few_zeros_and_both_ends() -> None:
    digest = large_digest(1000, 10_000)
    chosen = [one.start // WINDOW for one in Sample(seed="a", share=0.02).windows(digest, WINDOW)]
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, 9_999)
    assert 20 <= sum(number < 1000 for number in chosen) <= 21
    assert sum(number >= 1000 for number in chosen) in (ZERO_WINDOWS, ZERO_WINDOWS + 1)


def test_least_amount_wins_over_a_small_share() -> None:
    chosen = Sample(seed="a", share=0.0, at_least=64 * MiB).windows(large_digest(1000, 10_000), WINDOW)
    assert sum(one.start < 1000 * WINDOW for one in chosen) >= 32


def test_disk_of_one_short_window_is_looked_at_whole() -> None:
    leaves = LeafDigests("xxh3-128", 700)
    leaves.add(b"".join(hash_leaves("xxh3-128", memoryview(b"x" * 700))))
    assert Sample(seed="a", share=0.01).windows(GuestDigest(leaves), WINDOW) == [range(700)]


async def judged(disk: bytes, image: bytes, share: float) -> tuple[str, float, str]:
    leaves = LeafDigests("xxh3-128", len(disk))
    leaves.add(b"".join(hash_leaves("xxh3-128", memoryview(disk))))
    verdict = await verify_image(
        BytesReader(image),
        "raw",
        GuestDigest(leaves),
        virtual_size=len(image),
        image_size=len(image),
        sample=Sample(seed="s", share=share),
    )
    assert verdict.level == "sample"
    return verdict.state, verdict.coverage, verdict.detail


async def test_verdict_says_how_much_was_compared() -> None:
    disk = random.Random(2).randbytes(40 * MiB)
    state, coverage, detail = await judged(disk, disk, 0.25)
    assert state == "identical"
    assert 0.25 <= coverage <= 0.35
    assert f"{coverage:.2%}" in detail
    assert "the rest was not looked at" in detail
    _, coverage, detail = await judged(disk, disk, 1)
    assert coverage == 1
    assert "the rest" not in detail


async def test_difference_inside_of_the_sample_is_found_and_one_outside_is_not() -> None:
    disk = random.Random(2).randbytes(16 * MiB)
    leaves = LeafDigests("xxh3-128", len(disk))
    leaves.add(b"".join(hash_leaves("xxh3-128", memoryview(disk))))
    looked = {one.start for one in Sample(seed="s", share=0.25).windows(GuestDigest(leaves), WINDOW)}
    for start in range(0, len(disk), WINDOW):
        image = bytearray(disk)
        image[start + 5] ^= 1
        state, _, _ = await judged(disk, bytes(image), 0.25)
        assert state == ("differs" if start in looked else "identical")


async def test_bytes_where_zeros_belong_are_found() -> None:
    disk = bytes(8 * MiB)
    image = bytearray(disk)
    image[1] = 1
    assert (await judged(disk, bytes(image), 0.5))[0] == "differs"


@pytest.mark.parametrize("stages", [("encode.qcow2",), ("encode.raw", "compress.lz4")])
async def test_sample_in_a_chain_and_by_the_command(tmp_path: Path, stages: tuple[str, ...]) -> None:
    disk = write_disk(tmp_path / "disk.raw", "ABCDEFGH" * 4 + "-" * 32)
    image = tmp_path / "image"
    toml = write_toml(
        tmp_path / "export.toml", f'read.disk; path = "{disk}"', "checksum.guest", "sparse.zeros", *stages,
        f'write.file; path = "{image}"', 'verify.sample; share = 0.1; bytes = "2 MiB"',
    )  # fmt: skip
    outcome = await export(toml)
    (verdict,) = outcome.verdicts
    assert (verdict.level, verdict.state) == ("sample", "identical")
    assert 0 < verdict.coverage < 1
    verify = [sys.executable, "-m", "pipeline", "verify", str(image)]
    done = subprocess.run(
        [*verify, "--level", "sample", "--seed", "x"], capture_output=True, text=True, check=False, cwd=TREE
    )
    assert done.returncode == 0, done.stderr
    assert "identical (sample)" in done.stdout
    assert subprocess.run(verify, capture_output=True, check=False, cwd=TREE).returncode == 0
    with open(image, "r+b") as file:
        file.truncate(image.stat().st_size - 100)
    done = subprocess.run([*verify, "--level", "sample"], capture_output=True, text=True, check=False, cwd=TREE)
    assert done.returncode == 3


async def test_sample_without_a_digest_is_refused(tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk.raw", "A")
    toml = write_toml(
        tmp_path / "export.toml", f'read.disk; path = "{disk}"', "encode.raw",
        f'write.file; path = "{tmp_path / "image"}"', "verify.sample",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"verify\.sample needs the guest digest"):
        await export(toml)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Options(share=share)
