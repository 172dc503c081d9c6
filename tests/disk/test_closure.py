"""Which partitions a system needs: a running one by /proc and /sys, any other by its fstab."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import PlanError
from pipeline.units import MiB
from stages.disk.closure import (
    Closure,
    check_cut,
    live_closure,
    needed_partitions,
    offline_closure,
    signatures_of,
    view_closure,
)
from stages.disk.signatures import Signature
from stages.disk.tables import BootRecord, Partition, PartitionTable, read_table
from stages.disk.tree import READ_LIMIT, View
from stages.store.file import open_file_reader
from tests.chains import write_toml
from tests.disk.making import blank
from tests.disk.test_view import SYSTEM, disk_of, filesystem
from tests.disks.mounts import loop_device, needs_root
from tests.end_to_end.command import call

BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"


def table(*partitions: Partition, chain: tuple[int, ...] = ()) -> PartitionTable:
    return PartitionTable(
        kind="gpt",
        sector_size=512,
        disk_size=64 * MiB,
        partitions=partitions,
        boot_records=tuple(BootRecord(lba=number, data=b"", number=number) for number in chain),
    )


def part(number: int, *, type: str = "0x83", name: str = "", uuid: str = "") -> Partition:
    return Partition(number=number, start=number * 8 * MiB, length=8 * MiB, type=type, name=name, uuid=uuid)


class Etc:
    """A system that has only an fstab."""

    def __init__(self, fstab: str | None) -> None:
        self._fstab = fstab

    async def read(self, path: str, *, limit: int = READ_LIMIT) -> bytes:
        assert path == "/etc/fstab"
        if self._fstab is None:
            raise FileNotFoundError(errno.ENOENT, "absent", path)
        return self._fstab.encode()


async def closure(fstab: str | None, layout: PartitionTable, holds: dict[int, Signature] | None = None) -> Closure:
    view: View = Etc(fstab)  # type: ignore[assignment]  # nothing else is asked
    return await view_closure(view, [1], layout, holds or {})


FOUR = table(part(1, uuid="aa-01"), part(2, name="boot"), part(3), part(4))
HOLDS = {
    1: Signature(kind="ext4", uuid="1111"),
    2: Signature(kind="ext4", label="B"),
    3: Signature(kind="xfs", uuid="3333-ABCD"),
    4: Signature(kind="swap", uuid="4444"),
}


@pytest.mark.parametrize(
    "line, numbers",
    [
        ("UUID=3333-abcd /home xfs defaults 0 2", (1, 3)),
        ("LABEL=B /boot ext4 defaults", (1, 2)),
        ('PARTLABEL="boot" /boot ext4 defaults', (1, 2)),
        ("/dev/disk/by-uuid/3333-ABCD /srv xfs", (1, 3)),
        ("/dev/sda3 /srv xfs defaults", (1, 3)),
        ("/dev/sda3 /srv xfs defaults,nofail", (1,)),
        ("/dev/sda3 /srv xfs noauto", (1,)),
        ("/dev/sda3 /home xfs defaults,nofail", (1, 3)),
        ("/dev/sdb1 /home xfs defaults,nofail", (1,)),
        ("UUID=4444 none swap sw", (1,)),
        ("server:/home /home nfs defaults", (1,)),
        ("tmpfs /tmp tmpfs defaults", (1,)),
        ("# /dev/sda3 /srv xfs defaults", (1,)),
    ],
)
async def test_what_fstab_mounts_is_needed_unless_a_start_does_not_wait_for_it(
    line: str, numbers: tuple[int, ...]
) -> None:
    found = await closure(f"/dev/sda1 / ext4 defaults 0 1\n{line}\n", FOUR, HOLDS)
    assert needed_partitions(found) == numbers


@pytest.mark.parametrize("spec", ["/dev/sdb1", "UUID=9999", "/dev/mapper/vg-home", "/dev/md0"])
async def test_what_lies_elsewhere_is_told(spec: str) -> None:
    found = await closure(f"/dev/sda1 / ext4 defaults\n{spec} /home ext4 defaults", FOUR, HOLDS)
    with pytest.raises(PlanError, match=f"/home lies on {spec}"):
        needed_partitions(found)


async def test_volumes_arrays_and_btrfs_are_needed_with_all_of_their_members() -> None:
    volume = Signature(kind="lvm2", uuid="a")
    found = await closure("/dev/vg/home /home ext4 defaults", FOUR, {1: HOLDS[1], 2: volume, 4: volume})
    assert found.numbers == (1, 2, 4)
    two = Signature(kind="btrfs", uuid="b")
    found = await closure("UUID=b /data btrfs subvol=x", FOUR, {2: two, 3: two, 4: Signature(kind="btrfs", uuid="c")})
    assert found.numbers == (1, 2, 3)


async def test_what_firmware_starts_from_is_needed_and_logical_partitions_keep_their_numbers() -> None:
    found = await closure(None, table(part(1), part(2), part(3, type=BIOS_BOOT)))
    assert found.numbers == (1, 3)
    found = await closure("LABEL=x /srv ext4 defaults", table(part(1), part(5), part(6), part(7), chain=(5, 6, 7)))
    assert found.elsewhere()
    logical = table(part(1), part(5), part(6, name="x"), part(7), chain=(5, 6, 7))
    assert (await closure("PARTLABEL=x /srv ext4 defaults", logical)).numbers == (1, 5, 6)


async def test_a_cut_that_drops_something_needed_is_refused_with_the_smallest_that_works() -> None:
    found = await closure("/dev/sda1 / ext4 defaults\nLABEL=B /boot ext4 defaults", FOUR, HOLDS)
    check_cut(found, [1, 2])
    check_cut(found, [3])  # no system disk
    check_cut(None, [1])
    check_cut(await closure("/dev/sda1 / ext4 defaults\n/dev/sda3 /home xfs nofail", FOUR, HOLDS), [1])
    with pytest.raises(PlanError, match=r"drops /boot \(partition 2\)") as caught:
        check_cut(found, [1, 3])
    assert "partitions = [1, 2]" in caught.value.hint


def test_a_disk_that_no_system_starts_from_has_no_needs() -> None:
    with pytest.raises(PlanError, match="can't be told"):
        needed_partitions(None)


def running(root: Path, device: Path, mountinfo: str, fstab: str = "") -> Path:
    """A machine below `root`: the device with two partitions (259:1, 259:2), and a volume 253:0 on the second."""
    number = os.stat(device).st_rdev
    own = f"{os.major(number)}:{os.minor(number)}"
    whole = root / "sys/devices/sda"
    for name, dev, start in (("", own, 0), ("sda1", "259:1", 8), ("sda2", "259:2", 16)):
        node = whole / name
        node.mkdir(parents=True, exist_ok=True)
        (node / "dev").write_text(dev)
        (node / "size").write_text(str((8 if name else 64) * MiB // 512))
        if name:
            (node / "partition").write_text(name[-1])
            (node / "start").write_text(str(start * MiB // 512))
    volume = root / "sys/devices/dm-0"
    (volume / "slaves").mkdir(parents=True)
    (volume / "dev").write_text("253:0")
    (volume / "size").write_text("100")
    (whole / "sda2/holders").mkdir()
    (whole / "sda2/holders/dm-0").symlink_to(volume)
    (volume / "slaves/sda2").symlink_to(whole / "sda2")
    other = root / "sys/devices/sdb"
    other.mkdir()
    (other / "dev").write_text("8:16")
    (root / "sys/dev/block").mkdir(parents=True)
    for dev, node in ((own, whole), ("259:1", whole / "sda1"), ("259:2", whole / "sda2"), ("253:0", volume)):
        (root / "sys/dev/block" / dev).symlink_to(node)
    (root / "sys/dev/block/8:16").symlink_to(other)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(mountinfo)
    (root / "etc").mkdir()
    (root / "etc/fstab").write_text(fstab)
    return root


LIVE = table(part(1), part(2), part(3))


@needs_root
@pytest.mark.parametrize(
    "second, numbers",
    [
        ("253:0 / /home rw - ext4 /dev/mapper/vg-home rw", (1, 2)),
        ("0:40 / /home rw - nfs4 server:/home rw", (1,)),
        ("8:16 / /data rw - ext4 /dev/sdb rw", (1,)),
    ],
)
def test_a_running_system_is_asked_what_it_mounts(tmp_path: Path, second: str, numbers: tuple[int, ...]) -> None:
    with loop_device(blank(tmp_path / "disk", 64 * MiB)) as device:
        mounts = f"1 0 259:1 / / rw - ext4 /dev/sda1 rw\n2 1 {second}\n"
        found = live_closure(device, LIVE, {}, root=running(tmp_path / "root", device, mounts))
        assert needed_partitions(found) == numbers


@needs_root
def test_a_running_system_that_mounts_another_disk_by_fstab_is_told_of_it(tmp_path: Path) -> None:
    with loop_device(blank(tmp_path / "disk", 64 * MiB)) as device:
        mounts = "1 0 259:1 / / rw - ext4 /dev/sda1 rw\n2 1 8:16 / /data rw - ext4 /dev/sdb rw\n"
        root = running(tmp_path / "root", device, mounts, "/dev/sdb /data ext4 defaults")
        with pytest.raises(PlanError, match="/data lies on /dev/sdb"):
            needed_partitions(live_closure(device, LIVE, {}, root=root))


@needs_root
def test_a_disk_beside_the_running_system_has_no_needs(tmp_path: Path) -> None:
    with loop_device(blank(tmp_path / "disk", 64 * MiB)) as device:
        mounts = "1 0 8:16 / / rw - ext4 /dev/sdb rw\n"
        assert live_closure(device, LIVE, {}, root=running(tmp_path / "root", device, mounts)) is None


def dump_table(path: Path) -> list[dict[str, int]]:
    """The partitions as sfdisk sees them, in sectors."""
    done = subprocess.run(["sfdisk", "--json", path], stdout=subprocess.PIPE, check=True)
    return list(json.loads(done.stdout)["partitiontable"]["partitions"])


HOME_UUID = "31111111-2222-4333-8444-555555555555"


def system_disk(folder: Path) -> Path:
    """Three partitions: a root whose fstab wants /home, that, and one that nobody mounts."""
    fstab = f"/dev/sda1 / ext4 defaults 0 1\nUUID={HOME_UUID} /home ext4 defaults 0 2\n"
    root = filesystem(folder / "root", 16 * MiB, {**SYSTEM, "etc/fstab": fstab})
    home = filesystem(folder / "home", 8 * MiB, {"somebody/letter": "Dear"}, "-U", HOME_UUID)
    other = filesystem(folder / "other", 8 * MiB, {"a": "b"})
    return disk_of(folder / "disk.raw", root, home, other)


async def test_a_system_that_does_not_run_is_asked_by_its_own_fstab(tmp_path: Path) -> None:
    async with open_file_reader(system_disk(tmp_path)) as reader:
        layout = await read_table(reader, reader.size)
        found = await offline_closure(reader, layout, await signatures_of(reader, layout))
        assert found is not None
        assert found.root == (1,)
        assert needed_partitions(found) == (1, 2)


async def test_a_disk_without_a_system_has_no_closure(tmp_path: Path) -> None:
    disk = disk_of(tmp_path / "disk.raw", filesystem(tmp_path / "data", 8 * MiB, {"a": "b"}))
    async with open_file_reader(disk) as reader:
        layout = await read_table(reader, reader.size)
        assert await offline_closure(reader, layout, await signatures_of(reader, layout)) is None


def test_only_what_a_system_needs_is_exported_and_less_is_refused(tmp_path: Path) -> None:
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.disk; path = "{system_disk(tmp_path)}"; partitions = "needed"',
        "checksum.guest",
        "encode.raw",
        f'write.file; path = "{tmp_path / "image.raw"}"',
        "verify.readback",
    )
    said = call("run", toml, "--json")
    assert said.code == 0, said.err
    assert [one["size"] for one in dump_table(tmp_path / "image.raw")] == [16 * 2048, 8 * 2048]
    refused = call("plan", toml, "--set", "read.disk.partitions=[1]")
    assert refused.code == 2
    assert refused.has("the cut drops /home (partition 2)", "partitions = [1, 2]")
