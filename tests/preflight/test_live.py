"""What only a running machine tells: firmware, mounts, other disks, network cards, by /proc, /sys and udev's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.preflight.findings import Finding
from stages.preflight.opening import Wanted, open_subject
from stages.preflight.rules import judge
from tests.config.test_machine import Tree
from tests.disk.making import needs_root
from tests.preflight import systems
from tests.preflight.disks import BOOT_UUID, ROOT_UUID, target_of
from tests.preflight.images import write_disk, write_tree


class Host(Tree):
    """A machine with a system: one disk that it runs from, another with data."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.disk("sda")
        self.disk("sdb", gib=100)
        self._first = self.partition("sda1", "sda")
        self._second = self.partition("sdb1", "sdb")
        self.mount(self._first, "/", source="/dev/sda1")

    def with_data(self) -> None:
        """The second disk is mounted at /data."""
        self.mount(self._second, "/data", kind="xfs", source="/dev/sdb1")

    def tell_udev(self, number: str, **properties: str) -> None:
        """What udev noted of a device."""
        folder = self.root / "run/udev/data"
        folder.mkdir(parents=True, exist_ok=True)
        text = "S:disk/by-x\n" + "".join(f"E:{name}={value}\n" for name, value in properties.items())
        (folder / f"b{number}").write_text(text)

    def card(self, name: str, *, is_hardware: bool = True) -> None:
        """A network interface."""
        node = self.root / "sys/class/net" / name
        node.mkdir(parents=True)
        if is_hardware:
            (node / "device").mkdir()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A good Debian that runs on sda."""
    root = tmp_path / "host"
    root.mkdir()
    made = Host(root)
    write_tree(systems.debian_files(), root)
    return made


async def look(host: Host, place: str = "") -> dict[str, list[Finding]]:
    """Findings by rule, those of a live system."""
    async with open_subject(Wanted(place=place, root=host.root)) as subject:
        assert subject.is_live
        findings = await judge(subject, target_of(subject))
    found: dict[str, list[Finding]] = {}
    for one in findings:
        found.setdefault(one.id, []).append(one)
    return found


async def test_a_disk_that_was_not_named_is_never_opened_below_another_root(host: Host) -> None:
    found = await look(host)
    assert found["disk.table"][0].status == "unknown"
    assert "none was named beside --root" in found["disk.table"][0].message
    assert found["live.risk"][0].status == "fail"
    assert "/ mounted read-write" in found["live.risk"][0].message


async def test_firmware_is_what_started_the_machine(host: Host) -> None:
    assert (await look(host))["boot.firmware"][0].status == "pass"
    (host.root / "sys/firmware/efi").mkdir(parents=True)
    assert (await look(host))["boot.firmware"][0].blocks


async def test_what_is_mounted_from_another_disk_is_told(host: Host) -> None:
    host.with_data()
    found = await look(host)
    assert [(one.severity, "/data lives on sdb" in one.message) for one in found["layout.closure"]] == [("info", True)]
    (host.root / "etc/fstab").write_text(systems.FSTAB + f"UUID={BOOT_UUID} /data xfs defaults 0 0\n")
    host.tell_udev(host._second, ID_FS_UUID=BOOT_UUID, ID_FS_TYPE="xfs")
    host.tell_udev(host._first, ID_FS_UUID=ROOT_UUID, ID_FS_TYPE="ext4")
    found = await look(host)
    (foreign,) = [one for one in found["fs.fstab.foreign"] if one.status == "fail"]
    assert foreign.blocks
    assert "it is on sdb" in foreign.message
    assert [str(place) for place in foreign.evidence] == ["/etc/fstab:3"]
    assert any(one.blocks and "/data lives on sdb" in one.message for one in found["layout.closure"])


async def test_udev_names_what_is_on_a_disk_that_cannot_be_opened(host: Host) -> None:
    host.tell_udev(host._first, ID_FS_UUID=ROOT_UUID, ID_FS_TYPE="ext4", ID_PART_ENTRY_UUID="5a5a1234-01")
    missing = str(host.root / "no-such-disk")
    found = await look(host, missing)
    assert found["disk.table"][0].status == "unknown"


async def test_more_network_cards_than_the_target_has_are_told(host: Host) -> None:
    host.card("lo", is_hardware=False)
    host.card("eth0")
    assert not [one for one in (await look(host))["hw.nic"] if one.status == "fail"]
    host.card("eth1")
    assert any("2 network cards (eth0, eth1)" in one.message for one in (await look(host))["hw.nic"])


@needs_root
async def test_a_live_system_with_its_disk_passes_all_but_the_risk_of_copying_it(host: Host, tmp_path: Path) -> None:
    tree = write_tree(systems.debian_files(), tmp_path / "tree")
    disk = write_disk(tree, tmp_path / "disk.raw")
    found = await look(host, str(disk))
    wrong = {
        id for id, ones in found.items() for one in ones if one.status in ("fail", "unknown") and one.severity != "info"
    }
    assert wrong <= {"live.risk", "fs.free"}
