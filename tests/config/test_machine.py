"""Which disks a machine has and runs from, told from /proc and /sys alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.machine import Machine


class Tree:
    """A machine made of files: /proc/self/mountinfo and /sys below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._number = 0
        self._mounts: list[str] = []
        for folder in ("proc/self", "sys/block", "sys/class/block", "sys/dev/block", "sys/devices"):
            (root / folder).mkdir(parents=True)
        self._write_mounts()

    def disk(self, name: str, *, gib: int = 20, model: str = "") -> str:
        """A whole disk; returns its device number."""
        node = self.root / "sys/devices" / name
        node.mkdir()
        (node / "size").write_text(f"{gib << 21}\n")
        if model:
            (node / "device").mkdir()
            (node / "device/model").write_text(f"{model:<16}\n")
        (self.root / "sys/block" / name).symlink_to(node)
        return self._register(node)

    def partition(self, name: str, of: str) -> str:
        """A partition of a disk."""
        node = self.root / "sys/devices" / of / name
        node.mkdir()
        (node / "partition").write_text("1\n")
        return self._register(node)

    def volume(self, name: str, *on: str) -> str:
        """A device-mapper or md device on others."""
        number = self.disk(name)
        (self.root / "sys/devices" / name / "slaves").mkdir()
        for one in on:
            target = (self.root / "sys/class/block" / one).resolve()
            (self.root / "sys/devices" / name / "slaves" / one).symlink_to(target)
        return number

    def mount(self, number: str, point: str, kind: str = "ext4", source: str = "/dev/x", flags: str = "rw") -> None:
        """One line of mountinfo."""
        self._mounts.append(f"36 35 {number} / {point} {flags},relatime shared:1 - {kind} {source} {flags}")
        self._write_mounts()

    @property
    def machine(self) -> Machine:
        """What it is."""
        return Machine(self.root)

    def _register(self, node: Path) -> str:
        self._number += 1
        number = f"8:{self._number}"
        (node / "dev").write_text(f"{number}\n")
        (self.root / "sys/dev/block" / number).symlink_to(node)
        (self.root / "sys/class/block" / node.name).symlink_to(node)
        return number

    def _write_mounts(self) -> None:
        (self.root / "proc/self/mountinfo").write_text("".join(f"{line}\n" for line in self._mounts))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """An empty machine."""
    return Tree(tmp_path)


def names(tree: Tree) -> list[str]:
    return [disk.name for disk in tree.machine.system_disk().disks]


def test_the_disk_of_the_root_partition_is_the_system_disk(tree: Tree) -> None:
    tree.disk("sda", gib=256, model="Fast SSD")
    tree.disk("sdb")
    tree.mount(tree.partition("sda2", "sda"), "/")
    [disk] = tree.machine.system_disk().disks
    assert (disk.path, disk.about) == ("/dev/sda", "256 GiB, Fast SSD")


def test_a_later_mount_on_the_root_covers_an_earlier_one(tree: Tree) -> None:
    tree.mount("0:1", "/", kind="rootfs", source="rootfs")
    tree.mount(tree.disk("vda"), "/")
    assert names(tree) == ["vda"]


def test_a_volume_group_over_two_disks_is_two_candidates(tree: Tree) -> None:
    tree.disk("sda")
    tree.disk("sdb")
    tree.partition("sda1", "sda")
    tree.volume("md0", "sda1", "sdb")
    tree.mount(tree.volume("dm-0", "md0"), "/")
    assert names(tree) == ["sda", "sdb"]


def test_btrfs_is_found_by_its_mount_source(tree: Tree) -> None:
    tree.disk("sda")
    tree.partition("sda3", "sda")
    tree.mount("0:27", "/", kind="btrfs", source="/dev/sda3")
    assert names(tree) == ["sda"]


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("overlay", "the root filesystem is an overlay: a container or a live system"),
        ("tmpfs", "the root filesystem is a tmpfs: a live system or a container"),
        ("nfs", "the root filesystem (nfs on /dev/x) lies on no disk here"),
    ],
)
def test_a_root_without_a_disk_says_why(tree: Tree, kind: str, reason: str) -> None:
    tree.disk("sda")
    tree.mount("0:30", "/", kind=kind)
    found = tree.machine.system_disk()
    assert (found.disks, found.reason) == ((), reason)


def test_a_root_on_a_loop_device_is_a_live_system(tree: Tree) -> None:
    tree.mount(tree.disk("loop0"), "/")
    assert tree.machine.system_disk().reason == "the root filesystem lies on loop0: a live system"


def test_disks_are_listed_without_what_is_none(tree: Tree) -> None:
    for name in ("nvme0n1", "loop0", "zram0", "sr0", "ram1", "fd0", "nbd3", "dm-0", "md127", "vda"):
        tree.disk(name)
    tree.disk("sdz", gib=0)  # a card reader without a card
    assert [disk.name for disk in tree.machine.disks()] == ["nvme0n1", "vda"]


def test_a_disk_is_alive_where_a_filesystem_on_it_can_be_written(tree: Tree) -> None:
    tree.disk("sda")
    tree.mount(tree.partition("sda1", "sda"), "/boot", flags="ro")
    assert tree.machine.written_to("sda") == []
    tree.partition("sda2", "sda")
    tree.mount(tree.volume("dm-0", "sda2"), "/srv\\040data")
    assert tree.machine.written_to("sda") == ["/srv data"]
    assert tree.machine.written_to("sdb") == []


def test_a_partition_knows_its_disk(tree: Tree) -> None:
    tree.disk("nvme0n1")
    tree.partition("nvme0n1p2", "nvme0n1")
    whole = tree.machine.whole_disk_of("/dev/nvme0n1p2")
    assert whole is not None
    assert whole.path == "/dev/nvme0n1"
    assert tree.machine.whole_disk_of("/dev/nvme0n1") is None
    assert tree.machine.disk_names("/dev/nvme0n1p2") == {"nvme0n1"}


def test_an_image_goes_to_another_disk_or_a_share_and_never_to_the_disk_itself(tree: Tree, tmp_path: Path) -> None:
    for name in ("own", "other", "share", "closed"):
        (tmp_path / name).mkdir()
    sda, sdb = tree.disk("sda"), tree.disk("sdb")
    tree.mount(sda, str(tmp_path / "own"))
    tree.mount(sdb, str(tmp_path / "other"))
    tree.mount(sdb, str(tmp_path / "closed"), flags="ro")
    tree.mount("0:44", str(tmp_path / "share"), kind="nfs4", source="nas:/images")
    tree.mount("0:45", "/dev/shm", kind="tmpfs", source="tmpfs")
    found = tree.machine.places_for_an_image({"sda"})
    assert sorted(found) == [str(tmp_path / "other"), str(tmp_path / "share")]


def test_a_machine_without_proc_and_sys_has_nothing_and_fails_nowhere(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert machine.disks() == []
    assert machine.memory == 0
    assert machine.system_disk().reason == "the root filesystem is not listed in /proc/self/mountinfo"
