"""Real disks through the real command line into real stores and files: the image is the disk, by every judge."""

from __future__ import annotations

import os
import random
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import planning
from pipeline.flow.manifest import Manifest
from pipeline.units import GiB, KiB, MiB
from tests.chains import export, write_toml
from tests.disks.demo import build_demo_disk
from tests.disks.mounts import loop_device, needs_root
from tests.end_to_end.command import call
from tests.end_to_end.places import CHAIN, Place, new_place
from tests.stores.s3 import S3Server

FORMATS = {
    "plain qcow2": 'encode.qcow2; compression = "none"',
    "zlib qcow2": "encode.qcow2",
    "zstd qcow2": 'encode.qcow2; compression = "zstd"; level = "small"',
    "raw": "encode.raw",
}


@pytest.fixture(scope="module")
def demo_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MiB: MBR, ext4 with files, holes, zeros and deleted data."""
    path = tmp_path_factory.mktemp("demo") / "demo.raw"
    build_demo_disk(path, 64 * MiB)
    return path


@pytest.fixture(scope="module")
def digest(demo_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    """What checksum.guest says of the demo disk, read as a file and stored raw."""
    folder = tmp_path_factory.mktemp("digest")
    return manifest_of(to_file(folder, demo_disk, "encode.raw")).digest


def to_file(folder: Path, disk: Path, encoder: str) -> Path:
    """Export to a file by the command line; returns the image."""
    image = folder / "disk.image"
    said = call("run", file_toml(folder, disk, encoder))
    assert said.code == 0, said.err
    return image


def file_toml(folder: Path, disk: Path, encoder: str) -> Path:
    target = f'write.file; path = "{folder / "disk.image"}"; overwrite = true'
    source = f'read.disk; path = "{disk}"; blocks = "all"'
    return write_toml(folder / "export.toml", source, *CHAIN, encoder, target, "verify.readback")


def manifest_of(image: Path) -> Manifest:
    return Manifest.from_json(image.with_name(image.name + ".manifest.json").read_bytes(), where=str(image))


def qemu_agrees(image: Path, disk: Path, encoder: str) -> bool:
    """Whether qemu-img finds nothing wrong with the image, and the same bytes as on the disk."""
    kind = "raw" if "raw" in encoder else "qcow2"
    if kind == "qcow2":
        subprocess.run(["qemu-img", "check", "-f", kind, image], check=True, capture_output=True)
    command = ["qemu-img", "compare", "-f", kind, "-F", "raw", str(image), str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return True


@needs_root
@pytest.mark.parametrize("name, sector", [(name, (512, 4096)[n % 2]) for n, name in enumerate(FORMATS)])
def test_block_device_is_stored_verified_fetched_and_the_same(
    s3_server: S3Server, tmp_path: Path, demo_disk: Path, digest: object, name: str, sector: int
) -> None:
    encoder = FORMATS[name]
    with loop_device(demo_disk, sector=sector) as device:
        place = new_place(s3_server, tmp_path, device)
        toml = place.toml(encoder, verifiers=("verify.receipt", "verify.readback"))
        said = call("run", toml, "--json", env=place.env)
    assert said.code == 0, said.err
    verdicts = {one["stage"]: one["state"] for one in said.objects if one["type"] == "image_verified"}
    assert verdicts == {"verify.receipt": "identical", "verify.readback": "identical"}
    assert said.last("run_finished")["bottleneck"]

    image = tmp_path / "disk.image"
    image.write_bytes(s3_server.get(place.bucket, "disk.image"))
    assert qemu_agrees(image, demo_disk, encoder)
    manifest = s3_server.get(place.bucket, "disk.image.manifest.json")
    assert manifest == (tmp_path / "disk.image.manifest.json").read_bytes()
    assert manifest_of(image).digest == digest

    s3_server.delete_bucket(place.bucket)


@pytest.mark.parametrize("name", ["zlib qcow2", pytest.param("raw", marks=pytest.mark.slow)])
def test_stored_image_is_verified_any_time_later_and_a_changed_one_is_found(
    s3_server: S3Server, tmp_path: Path, demo_disk: Path, name: str
) -> None:
    place = new_place(s3_server, tmp_path, demo_disk)
    assert call("run", place.toml(FORMATS[name], verifiers=()), env=place.env).code == 0
    for level in ("receipt", "readback"):
        verified = call("verify", place.url, "--level", level, env=place.env)
        assert verified.code == 0, verified.err + verified.out
        assert f"identical ({level})" in verified.out
    changed = bytearray(s3_server.get(place.bucket, "disk.image"))
    middle = len(changed) * 3 // 4  # behind the head, which has room that nothing refers to
    changed[middle : middle + 4 * KiB] = (byte ^ 0x55 for byte in changed[middle : middle + 4 * KiB])
    s3_server.put(place.bucket, "disk.image", bytes(changed))
    assert call("verify", place.url, env=place.env).code == 3
    # A store that states no checksum of what somebody else put there proves nothing (SeaweedFS).
    assert call("verify", place.url, "--level", "receipt", env=place.env).code in (1, 3)
    s3_server.delete_bucket(place.bucket)


@pytest.mark.parametrize("name", FORMATS)
def test_digest_and_disk_are_the_same_whatever_the_format(
    tmp_path: Path, demo_disk: Path, digest: object, name: str
) -> None:
    image = to_file(tmp_path, demo_disk, FORMATS[name])
    assert manifest_of(image).digest == digest
    assert qemu_agrees(image, demo_disk, FORMATS[name])
    assert call("verify", image).code == 0


@pytest.mark.parametrize("encoder", FORMATS.values(), ids=FORMATS)
async def test_image_is_the_same_whatever_the_thread_count_and_fusing(
    tmp_path: Path, demo_disk: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = file_toml(tmp_path, demo_disk, encoder)
    divide, images = planning.divide_memory, set()
    for workers, fuse in ((1, True), (6, True), (2, False)):
        monkeypatch.setattr(
            planning,
            "divide_memory",
            lambda *given, count=workers, **how: replace(divide(*given, **how), workers=count),
        )
        assert (await export(toml, fuse=fuse)).state == "identical"
        images.add((tmp_path / "disk.image").read_bytes())
    assert len(images) == 1


# -- a disk of 2 TiB that is one hole but for 64 MiB -------------------------------------------------------------------


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 TiB with 64 stretches of 1 MiB; some at odd places."""
    path = tmp_path_factory.mktemp("huge") / "disk.raw"
    chance = random.Random(7)
    size = 2048 * GiB
    with path.open("wb") as file:
        for number in range(64):
            file.seek(number * (size // 64) + chance.randrange(0, GiB, 512))
            file.write(chance.randbytes(MiB))
        file.truncate(size)
    return path


def clusters(size: str) -> str:
    return f'encode.qcow2; compression = "none"; cluster_size = "{size}"'


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """The processes that run and end inside take no more time of a processor, whatever else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < seconds


@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2", clusters("2 MiB")])
def test_huge_sparse_disk_goes_to_a_file(tmp_path: Path, huge: Path, encoder: str) -> None:
    with no_longer_than(20):
        image = to_file(tmp_path, huge, encoder)
    assert image.stat().st_blocks * 512 < (300 if "2 MiB" in encoder else 100) * MiB
    if "qcow2" in encoder:
        subprocess.run(["qemu-img", "check", "-f", "qcow2", image], check=True, capture_output=True)


def test_huge_sparse_disk_goes_to_a_store(one_place: Place, huge: Path) -> None:
    with no_longer_than(20):
        said = call("run", one_place.toml("encode.qcow2", disk=huge), "--json", env=one_place.env)
    assert said.code == 0, said.err
    assert said.last("run_finished")["verified"] == "identical"
    one_place.server.delete_bucket(one_place.bucket)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", ["2 KiB", "4 KiB"])
def test_huge_sparse_disk_fits_into_the_smallest_clusters(one_place: Place, huge: Path, size: str) -> None:
    image = to_file(one_place.folder, huge, clusters(size))
    subprocess.run(["qemu-img", "check", "-f", "qcow2", image], check=True, capture_output=True)
    said = call("run", one_place.toml(clusters(size), disk=huge), env=one_place.env)
    assert said.code == 0, said.err
    one_place.server.delete_bucket(one_place.bucket)


@pytest.mark.parametrize("size", ["512 B", "1 KiB"])
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_clusters_that_are_too_small_for_a_disk_are_refused_with_the_smallest_that_works(
    tmp_path: Path, huge: Path, size: str, verb: str
) -> None:
    said = call(verb, file_toml(tmp_path, huge, clusters(size)))
    assert said.code == 2
    assert said.has("2 KiB", "cluster_size")
    assert [path.name for path in tmp_path.iterdir()] == ["export.toml"]


def test_large_sparse_disk_goes_to_a_store_raw(one_place: Place) -> None:
    """An object has no holes: what is not stored on the disk is sent as zeros."""
    disk = one_place.folder / "sparse.raw"
    with disk.open("wb") as file:
        file.seek(120 * MiB + 512)
        file.write(os.urandom(64 * KiB))
        file.truncate(160 * MiB)
    said = call("run", one_place.toml("encode.raw", disk=disk), "--json", env=one_place.env)
    assert said.code == 0, said.err
    assert said.last("run_finished")["stored_bytes"] == 160 * MiB
    one_place.server.delete_bucket(one_place.bucket)
