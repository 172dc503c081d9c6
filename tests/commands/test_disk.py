"""`pipeline disk`: what is on disks and in images, and what an export would copy of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.units import MiB
from tests.commands.conftest import Said
from tests.disk.making import blank, need, needs_root, run
from tests.disk.test_cuts import GUIDE, GUIDE_END, mbr
from tests.disk.test_mapping import insert
from tests.disks.mounts import loop_device, mounted
from tests.stores.ranged import ranged_server

Disk = Callable[..., Said]

ESCAPE = "\x1b[31m"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """`disk(image, ...)` with the real catalog."""
    monkeypatch.chdir(tmp_path)

    def call_it(*arguments: object) -> Said:
        result = CliRunner().invoke(main, ["disk", *map(str, arguments)], prog_name="pipeline")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return Said(result.exit_code, result.stdout, result.stderr)

    return call_it


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """MBR: ext4 (a hostile label), swap, and a logical FAT."""
    need("sfdisk", "mke2fs", "mkswap", "mkfs.fat")
    path = blank(tmp_path / "disk", 100 * MiB)
    layout = "1M,40M,L,*\n41M,16M,S\n57M,,E\n58M,32M,0c\n"
    run("sfdisk", "-q", path, text=f"label: dos\nlabel-id: 0xcafe0001\n{layout}")
    part = tmp_path / "part"
    run("mke2fs", "-q", "-t", "ext4", "-L", f"a{ESCAPE}b", "-F", blank(part, 40 * MiB))
    insert(path, MiB, part)
    run("mkswap", "-L", "swapping", blank(part, 16 * MiB))
    insert(path, 41 * MiB, part)
    run("mkfs.fat", "-n", "DATA", blank(part, 32 * MiB))
    insert(path, 58 * MiB, part)
    return path


def test_the_disk_of_the_guide_is_counted_right(disk: Disk, tmp_path: Path) -> None:
    path = blank(tmp_path / "sda", 1494996746240)
    with path.open("r+b") as file:
        file.write(mbr([*GUIDE, GUIDE_END]))
    said = disk(path)
    assert said.code == 0, said.err
    assert "through partition 1: 21475885056 bytes = 20481 MiB: dd bs=1M count=20481" in said.out
    trap = disk(path, "--through", 1).out
    assert "an export reads 20.0 GiB (21475885056 bytes)" in trap
    assert "1024 times too much" in trap
    [told] = disk(path, "--json").objects
    assert told["counts"][0] == {
        "through": 1,
        "bytes": 21475885056,
        "mib": 20481,
        "dd": "bs=1M count=20481",
    }


def test_table_filesystems_and_what_is_copied_are_shown(disk: Disk, image: Path) -> None:
    said = disk(image)
    assert said.code == 0, said.err
    for word in ("MBR cafe0001", "ext4", "swapping", "swap", "fat16", "DATA", "boot", "extended", "not copied"):
        assert word in said.out, word
    assert ESCAPE not in said.out
    [told] = disk(image, "--json").objects
    assert [one["number"] for one in told["partitions"]] == [1, 2, 3, 5]
    assert [one["filesystem"] for one in told["partitions"]] == ["ext4", "swap", "", "fat16"]
    assert told["partitions"][0]["used"] + told["partitions"][0]["free"] == 40 * MiB
    assert told["copied_bytes"] < 30 * MiB
    assert told["signature"] == "cafe0001"


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vpc"])
def test_any_image_is_looked_into_also_over_the_network(disk: Disk, image: Path, tmp_path: Path, format: str) -> None:
    need("qemu-img")
    made = tmp_path / "made"
    run("qemu-img", "convert", "-O", format, image, made)
    [plain] = disk(image, "--json").objects
    with ranged_server(web=made.read_bytes()) as server:
        [told] = disk(f"{server.url}/web", "--json").objects
        assert server.sent_bytes < 16 * MiB
    assert told["partitions"] == plain["partitions"]


def test_a_cut_is_tried_and_one_that_is_not_possible_is_refused(disk: Disk, image: Path) -> None:
    said = disk(image, "--partitions", "1")
    assert "cut: the image has a disk of 41 MiB" in said.out
    assert "left out" in said.out
    refused = disk(image, "--bytes", "20 MiB")
    assert refused.code == 2
    assert "through = 1" in refused.err
    assert disk(image, "--through", 9).code == 2
    assert disk(image, "--through", 1, "--partitions", "1").code == 2
    assert disk(image, "--partitions", "one").code == 2


def test_no_table_and_nothing_known_is_said(disk: Disk, tmp_path: Path) -> None:
    path = blank(tmp_path / "disk", 8 * MiB)
    said = disk(path)
    assert said.code == 0
    assert "no partition table" in said.out
    assert "copied whole, because what it holds is not known" in said.out
    assert disk(tmp_path / "absent").code != 0


@needs_root
def test_who_uses_a_device_is_shown(disk: Disk, tmp_path: Path) -> None:
    need("mke2fs")
    path = blank(tmp_path / "disk", 40 * MiB)
    run("mke2fs", "-q", "-t", "ext4", "-F", path)
    with loop_device(path, read_only=False) as device:
        with mounted(tmp_path / "mnt", "ext4", device) as folder:
            said = disk(device)
            assert str(folder) in said.out
            assert f"because it is mounted read-write at {folder}" in said.out
            [told] = disk(path, "--json").objects
            assert [one["point"] for one in told["uses"]] == [str(folder)], "a file that a loop device shows"
        assert "mounted" not in disk(device).out
