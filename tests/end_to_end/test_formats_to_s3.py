"""Every image format goes into a real S3 store in parts, and what was stored is judged by other tools."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.events import Event, PartStored
from pipeline.units import MiB
from tests.chains import export, write_toml
from tests.decode.images import run
from tests.encode.judges import compare, unpack_7zz
from tests.stores.s3 import S3Server

SIZE = 44 * MiB

# The encoder with its options; qemu-img's name of what it makes, and 7-Zip's.
FORMATS = {
    "vhd-dynamic": ('encode.vhd; variant = "dynamic"', "vpc", "VHD"),
    "vhd-fixed": ('encode.vhd; variant = "fixed"', "vpc", "VHD"),
    "vmdk-stream": ('encode.vmdk; variant = "streamOptimized"', "vmdk", "VMDK"),
    "vmdk-sparse": ('encode.vmdk; variant = "monolithicSparse"', "vmdk", "VMDK"),
    "vhdx": ("encode.vhdx", "vhdx", "VHDX"),
    "ova": ("encode.ova", "", ""),
    "gce": ("encode.gce", "", ""),
}
CASES: list[object] = [
    pytest.param("seaweedfs", format, marks=[pytest.mark.slow] if format == "gce" else []) for format in FORMATS
]
# Formats whose first part goes last, into the other store as well.
CASES += [("swift", format) for format in ("vhd-dynamic", "vhdx", "ova")]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough noise for several parts, some text, zeros and holes between."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    with Path("/dev/urandom").open("rb") as noise, path.open("wb") as file:
        for offset in (0, 17 * MiB + 512, 30 * MiB):
            file.seek(offset)
            file.write(noise.read(7 * MiB))
        file.seek(40 * MiB)
        file.write(b"words and words\n" * (MiB // 16) + bytes(MiB))
        file.truncate(SIZE)
    return path


@pytest.mark.parametrize("store, format", CASES)
async def test_stored_image_is_what_other_tools_read(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    disk: Path,
    store: str,
    format: str,
) -> None:
    server: S3Server = request.getfixturevalue(store)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = server.new_bucket()
    encode, qemu, kind = FORMATS[format]
    events: list[Event] = []
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.disk; path = "{disk}"',
        "checksum.guest",
        "sparse.zeros",
        encode,
        f'write.s3; url = "s3://{bucket}/image"',
        "verify.readback",
    )
    outcome = await export(toml, events=events)
    assert outcome.state == "identical"
    assert len([event for event in events if isinstance(event, PartStored)]) > 1
    assert server.open_uploads(bucket) == []
    image = tmp_path / "image"
    image.write_bytes(server.get(bucket, "image"))
    server.delete_bucket(bucket)
    if format == "ova":
        image = unpack_ova(image)
        qemu, kind = "vmdk", "VMDK"
    elif format == "gce":
        run("tar", "-xzf", str(image), "-C", str(tmp_path))
        compare(padded(disk, tmp_path, (tmp_path / "disk.raw").stat().st_size), tmp_path / "disk.raw", "raw")
        return
    if qemu != "vpc":
        run("qemu-img", "check", "-f", qemu, str(image))
    compare(disk, image, qemu)
    unpack_7zz(disk, image, kind)


def unpack_ova(image: Path) -> Path:
    """Its disk, after `sha256sum` agreed to the manifest inside."""
    folder = image.parent / "ova"
    folder.mkdir()
    run("tar", "-xf", str(image), "-C", str(folder))
    (manifest,) = folder.glob("*.mf")
    digests = []
    for line in manifest.read_text().splitlines():
        name, _, digest = line.removeprefix("SHA256(").partition(")= ")
        digests.append(f"{digest}  {name}\n")
    assert len(digests) == 2
    subprocess.run(["sha256sum", "--check", "--strict"], input="".join(digests), text=True, cwd=folder, check=True)
    (vmdk,) = folder.glob("*.vmdk")
    return vmdk


def padded(disk: Path, folder: Path, size: int) -> Path:
    """The disk with the zeros that rounding up adds."""
    path = folder / "padded.raw"
    run("cp", "--sparse=always", str(disk), str(path))
    with path.open("r+b") as file:
        file.truncate(size)
    return path
