"""`pipeline inspect`: info, check and map of any format by ranges, and what its exit codes mean."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.units import GiB, KiB, MiB
from tests.commands.conftest import Said
from tests.decode.images import mixed_disk, run
from tests.decode.large import DATA, SIZE, make_large_qcow2
from tests.decode.made import QEMU_NAMES
from tests.decode.mutations import MUTATIONS, Mutation, good_images
from tests.disks.letters import write_disk
from tests.stores.ranged import ranged_server
from tests.stores.s3 import S3Server

Inspect = Callable[..., Said]

CODES = {"corrupt": 3, "leaks": 0, "warning": 0, "refused": 2}


@pytest.fixture
def inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inspect:
    """`inspect(image, ...)` with the real catalog."""
    monkeypatch.chdir(tmp_path)

    def call_it(*arguments: object) -> Said:
        result = CliRunner().invoke(main, ["inspect", *map(str, arguments)], prog_name="pipeline")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return Said(result.exit_code, result.stdout, result.stderr)

    return call_it


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return good_images(tmp_path_factory.mktemp("images"))


def test_good_image_of_every_format_is_clean(inspect: Inspect, images: dict[str, bytes], tmp_path: Path) -> None:
    for base, data in images.items():
        image = tmp_path / base.replace(" ", "-")
        image.write_bytes(data)
        said = inspect(image, "-f", base.split()[0], "--deep", "--map")
        assert said.code == 0, (base, said.out, said.err)
        assert "clean (every stored block was unpacked)" in said.out
        assert "virtual size" in said.out
        told = inspect(image, "-f", base.split()[0], "--json").objects[-1]
        assert told["type"] == "inspected"
        assert told["verdict"] == "clean"
        assert told["info"]["file_size"] == len(data)


# One of every rule and verdict: all of them against the checker itself is tests/decode/test_mutations.py.
CHOSEN = list({(one.format, one.expected): one for one in MUTATIONS if one.mode != "strict"}.values())


@pytest.mark.parametrize("mutation", CHOSEN, ids=lambda one: f"{one.format}-{one.expected}-{one.name}")
def test_exit_code_says_what_was_found(
    inspect: Inspect, images: dict[str, bytes], tmp_path: Path, mutation: Mutation
) -> None:
    data = bytearray(images[mutation.base])
    mutation.change(data)
    (tmp_path / "image").write_bytes(data)
    deep = ["--deep"] if mutation.mode == "deep" else []
    said = inspect("image", "-f", mutation.format, *deep)
    assert said.code == CODES[mutation.expected], said.out + said.err
    assert mutation.finding in said.out + said.err
    if mutation.expected == "corrupt":
        assert "CORRUPT" in said.out
    if mutation.expected == "leaks":
        assert said.err.startswith("warning: ")
        assert "no corruption" in said.out
    if mutation.expected == "refused":
        assert said.out == ""


def test_truncated_image_is_corrupt(inspect: Inspect, images: dict[str, bytes], tmp_path: Path) -> None:
    for base in ("qcow2", "vmdk stream", "vhdx", "gce"):
        (tmp_path / "image").write_bytes(images[base][: len(images[base]) // 2])
        assert inspect("image", "-f", base.split()[0], "--deep").code == 3, base


@pytest.mark.parametrize("kept", [20, 300, 5000, -1])
def test_truncated_archive_is_corrupt_declared_or_not(
    inspect: Inspect, images: dict[str, bytes], tmp_path: Path, kept: int
) -> None:
    (tmp_path / "disk.tar.gz").write_bytes(images["gce"][:kept])
    for arguments in ((), ("-f", "gce")):
        said = inspect("disk.tar.gz", "--deep", *arguments)
        assert said.code == 3, (arguments, said.out + said.err)


def test_what_can_not_be_told_is_not_called_corrupt(inspect: Inspect, tmp_path: Path) -> None:
    assert inspect("nothing-there.qcow2").code == 1
    (tmp_path / "disk.vdi").write_bytes(bytes(64) + b"\x7f\x10\xda\xbe" + bytes(4 * KiB))
    said = inspect("disk.vdi")
    assert said.code == 2
    assert "VDI" in said.err
    (tmp_path / "short.qcow2").write_bytes(b"hello")
    said = inspect("short.qcow2")
    assert said.code == 2
    assert "cut short" in said.err


QCOW2 = [(), ("-c",), ("-o", "cluster_size=4k"), ("-o", "compat=0.10")]


@pytest.mark.parametrize("arguments", QCOW2, ids=lambda one: "-".join(one) or "plain")
def test_map_of_qcow2_is_the_one_of_qemu_img(inspect: Inspect, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "disk.raw").write_bytes(mixed_disk(5 * MiB + 512))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *arguments, "disk.raw", "image.qcow2")
    if "compat=0.10" not in arguments:
        run("qemu-io", "-c", "write -z 1M 300k", "-c", "write -z -u 3M 64k", "image.qcow2")
    assert mapped(inspect("image.qcow2", "--map", "--json")) == of_qemu("qcow2", "image.qcow2")


@pytest.mark.parametrize("letters", ["A-B0", "----", "A", "-A--"])
def test_map_of_a_raw_disk_is_the_one_of_qemu_img(inspect: Inspect, tmp_path: Path, letters: str) -> None:
    write_disk(tmp_path / "disk.raw", letters)
    assert mapped(inspect("-f", "raw", "disk.raw", "--map", "--json")) == of_qemu("raw", "disk.raw")


OTHERS = {
    "vhd": ("vhd", "force_size=on"),
    "vhd-fixed": ("vhd", "subformat=fixed,force_size=on"),
    "vmdk": ("vmdk", "subformat=monolithicSparse"),
    "vmdk-stream": ("vmdk", "subformat=streamOptimized"),
    "vmdk-flat": ("vmdk", "subformat=monolithicFlat"),
    "vmdk-parts": ("vmdk", "subformat=twoGbMaxExtentSparse"),
    "vmdk-flat-parts": ("vmdk", "subformat=twoGbMaxExtentFlat"),
}


@pytest.mark.parametrize("format, options", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("size", [9 * MiB + 512, 2 * GiB + 8 * MiB])
def test_map_of_vhd_and_vmdk_is_the_one_of_qemu_img(
    inspect: Inspect, tmp_path: Path, format: str, options: str, size: int
) -> None:
    with open(tmp_path / "disk.raw", "wb") as disk:
        disk.write(mixed_disk(3 * MiB))
        disk.seek(6 * MiB)
        disk.write(mixed_disk(MiB))
        disk.truncate(size)
    name = QEMU_NAMES.get(format, format)
    run("qemu-img", "convert", "-f", "raw", "-O", name, "-o", options, "disk.raw", "image")
    extents = sorted(one.name for one in tmp_path.glob("image-*"))
    arguments = [word for one in extents for word in ("--extent", one)]
    assert mapped(inspect("image", "-f", format, *arguments, "--map", "--json")) == of_qemu(name, "image")


def test_map_of_vhdx_says_where_its_blocks_are(inspect: Inspect, tmp_path: Path) -> None:
    """qemu-img has no map of a VHDX: it calls everything data, and tells no place."""
    run("qemu-img", "create", "-q", "-f", "vhdx", "-o", "block_size=1M", "image.vhdx", "8M")
    run("qemu-io", "-f", "vhdx", "-c", "write -P 1 4M 1M", "image.vhdx")
    assert [(one["length"], one["data"]) for one in of_qemu("vhdx", "image.vhdx")] == [(8 * MiB, True)]
    told = mapped(inspect("image.vhdx", "--map", "--json"))
    assert [(one["start"], one["present"], one["zero"], one["data"]) for one in told] == [
        (0, False, True, False),
        (4 * MiB, True, False, True),
        (5 * MiB, False, True, False),
    ]
    data = (tmp_path / "image.vhdx").read_bytes()
    assert data[told[1]["offset"] : told[1]["offset"] + MiB] == b"\1" * MiB


def test_map_of_a_chain_is_the_one_of_qemu_img(inspect: Inspect, tmp_path: Path) -> None:
    """Three images, each longer than the one below it, with data, zeros and nothing in each."""
    (tmp_path / "base.raw").write_bytes(mixed_disk(2 * MiB))
    below, format = "base.raw", "raw"
    for number, writes in enumerate((("-P 1 64k 64k", "-z 1M 64k"), ("-P 2 2500k 64k", "-z 0 64k", "-P 3 3900k 8k"))):
        name = f"{number}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", format, name, f"{3 + number}M")
        for write in writes:
            run("qemu-io", "-c", f"write {write}", name)
        below, format = name, "qcow2"
    arguments = ("--backing", "0.qcow2", "--backing", "base.raw")
    assert mapped(inspect("1.qcow2", *arguments, "--map", "--json")) == of_qemu("qcow2", "1.qcow2")
    assert {one["depth"] for one in of_qemu("qcow2", "1.qcow2")} == {0, 1, 2}
    said = inspect("1.qcow2", *arguments, "--deep")
    assert said.code == 0
    assert "warning" not in said.out + said.err


def test_files_that_an_image_has_no_use_for_are_refused(inspect: Inspect, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(MiB))
    run("qemu-img", "create", "-q", "-f", "qcow2", "alone.qcow2", "1M")
    for arguments in (("--backing", "disk.raw"), ("--extent", "disk.raw"), ("--member", "disk.raw")):
        said = inspect("alone.qcow2", *arguments)
        assert said.code == 2, arguments
        assert "out" in said.err.splitlines()[-1]


def mapped(said: Said) -> list[dict[str, Any]]:
    """The map without what older versions of qemu-img do not tell."""
    assert said.code == 0, said.err
    entries: list[dict[str, Any]] = json.loads(said.out)
    for entry in entries:
        assert entry["compressed"] == (entry["data"] and "offset" not in entry)
        del entry["compressed"]
    return entries


def of_qemu(format: str, image: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["qemu-img", "map", "--output=json", "-f", format, image], capture_output=True, text=True, check=True
    )
    entries: list[dict[str, Any]] = json.loads(done.stdout)
    for entry in entries:
        entry.pop("compressed", None)
    return entries


@pytest.mark.slow
def test_large_image_is_looked_at_by_ranges(inspect: Inspect, tmp_path: Path) -> None:
    """100 GiB virtual, 10 GiB of data all over: only headers and tables travel. perf/cases/inspecting.py times it."""
    image = make_large_qcow2(tmp_path / "image.qcow2")
    with ranged_server(web=image) as server:
        said = inspect(f"{server.url}/web", "--json")
        assert said.code == 0, said.err
        told = said.objects[-1]
        assert told["verdict"] == "clean"
        assert told["info"]["virtual_size"] == SIZE
        assert abs(told["data_blocks"] * 64 * KiB - DATA) < 16 * MiB
        # 12.5 MiB of L2 tables and 50 refcount blocks, each once.
        assert server.sent_bytes < 20 * MiB
        assert len(server.asked) < 300
        before = server.sent_bytes
        assert len(mapped(inspect(f"{server.url}/web", "--map", "--json"))) > 200
        assert server.sent_bytes - before < 32 * MiB


def test_image_in_a_store(
    inspect: Inspect, seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch, images: dict[str, bytes]
) -> None:
    for name, value in seaweedfs.environment().items():
        if name != "AWS_ENDPOINT_URL_S3":
            monkeypatch.setenv(name, value)
    bucket = seaweedfs.new_bucket()
    seaweedfs.client().put_object(Bucket=bucket, Key="web.qcow2", Body=images["qcow2"])
    said = inspect(f"s3://{bucket}/web.qcow2", "--endpoint", seaweedfs.endpoint)
    assert said.code == 0, said.err
    assert "qcow2" in said.out
    seaweedfs.delete_bucket(bucket)


def test_extents_that_were_named_are_checked(inspect: Inspect, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(mixed_disk(2 * MiB))
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", "disk.raw", "image.vmdk")
    said = inspect("image.vmdk")
    assert said.code == 2
    assert "--extent" in said.err
    assert inspect("image.vmdk", "--extent", "image-flat.vmdk", "--map").code == 0


def test_backing_file_named_in_the_image_is_not_opened(inspect: Inspect, tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "/dev/full", "-F", "raw", "-u", "upper.qcow2", "1M")
    said = inspect("upper.qcow2")
    assert said.code == 0, said.err
    assert "'/dev/full'" in said.out
    assert "warning: the image lies on a backing file that was not named" in said.out
    said = inspect("upper.qcow2", "--map")
    assert said.code == 2
    assert "--backing FILE" in said.err


def test_what_an_image_says_never_acts_on_the_terminal(inspect: Inspect, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(MiB))
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "disk.raw", "image.vmdk")
    data = (tmp_path / "image.vmdk").read_bytes().replace(b'adapterType = "ide"', b'adapterType = "\x1b[2"')
    (tmp_path / "image.vmdk").write_bytes(data)
    assert "\x1b" not in inspect("image.vmdk").out


def test_compressed_stream_is_checked_inside(inspect: Inspect, tmp_path: Path) -> None:
    """What our own compressors make is an image in a stream with an index."""
    (tmp_path / "disk.raw").write_bytes(mixed_disk(3 * MiB))
    for codec in ("zstd", "lz4", "gzip"):
        stages = "".join(
            f'[[stage]]\nuse = "{use}"\n{more}\n'
            for use, more in (
                ("read.disk", 'path = "disk.raw"'),
                ("encode.vmdk", ""),
                (f"compress.{codec}", ""),
                ("write.file", f'path = "packed.{codec}"'),
            )
        )
        (tmp_path / "export.toml").write_text(f'[export]\nname = "x"\n{stages}')
        result = CliRunner().invoke(main, ["run", "export.toml"])
        assert result.exit_code == 0, result.stderr
        said = inspect(f"packed.{codec}", "-f", f"vmdk+{codec}", "--deep")
        assert said.code == 0, said.out + said.err
        assert "streamOptimized" in said.out
