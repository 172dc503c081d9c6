"""A Debian 12 that its own tools made (debootstrap, apt, update-initramfs, grub), mutated file by file, in both modes.

The disk is made once and kept below `.cache/` (about three minutes); `python -m tests.preflight.debian` makes it too.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.flow.items import RangeReader
from pipeline.units import MiB
from stages.disk.live import LiveView
from stages.preflight.findings import Finding
from stages.preflight.initramfs import read_contents
from stages.preflight.opening import Wanted, open_subject
from stages.preflight.rules import judge
from tests.disk.making import run
from tests.preflight import debian
from tests.preflight.disks import ROOT_UUID, findings_of, subject_of, target_of
from tests.preflight.test_modes import MODE_MATTERS, told
from tests.preflight.test_rules import CASES, Case
from tests.preflight.trees import Content, changed
from tests.stores.s3 import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

_FAMILIES = (
    *("fs.fstab", "fs.shadow", "fs.critical", "agent", "hw.diskname", "hw.nic", "hw.video", "sw."),
    "drv.virtio.blacklist",
)
# Rules of the cases that hold for a Debian with whatever kernel and files it has: those that lay files over it.
_LAID = [
    case
    for case in CASES
    if case.status == "fail"
    and case.system().get("/boot/grub/grub.cfg") is not None
    and case.files
    and not case.disk
    and case.id.startswith(_FAMILIES)
    and "6.1.0-13" not in repr((case.files, case.at))
    and "/boot/grub/grub.cfg" not in case.files
    and case.profile == "tencent"
    and "/etc/os-release" not in case.files  # a link there, and what it points to counts too
    and not case.at.startswith("/var/lib/dpkg")
]  # fmt: skip


MENU, STATUS = "boot/grub/grub.cfg", "var/lib/dpkg/status"


@pytest.fixture(scope="module")
def disk() -> Path:
    """The disk, made where it is not there yet."""
    if reason := debian.why_not():
        pytest.skip(reason)
    return debian.make()


@pytest.fixture(scope="module")
def root(disk: Path) -> Iterator[Path]:
    """Its root filesystem, mounted read-only."""
    with debian.mounted(disk) as folder:
        yield folder


async def look(wanted: Wanted) -> tuple[Finding, ...]:
    async with open_subject(wanted) as subject:
        return await judge(subject, target_of(subject))


def wrong(findings: tuple[Finding, ...]) -> list[tuple[str, str]]:
    return [(one.id, one.message) for one in findings if one.status in ("fail", "unknown") and one.severity != "info"]


async def test_a_fresh_debian_is_ready(disk: Path) -> None:
    assert wrong(await look(Wanted(place=str(disk)))) == []


async def test_live_and_offline_agree_on_a_real_system(disk: Path, root: Path) -> None:
    live = await look(Wanted(place=str(disk), root=root))
    image = await look(Wanted(place=str(disk)))
    assert told(live) == told(image)
    assert {one.id for one in image} - MODE_MATTERS


@pytest.mark.parametrize("case", _LAID, ids=lambda case: f"{case.id}-{case.said}"[:70])
async def test_a_mutation_of_a_real_debian_is_found(root: Path, case: Case) -> None:
    view = changed(LiveView(root), case.files)
    findings = await findings_of(await subject_of(view), target_of(await subject_of(view)), case.id)
    found = [one for one in findings if case.said in one.message]
    assert found, [(one.status, one.message) for one in findings]
    assert (found[0].status, found[0].severity) == ("fail", case.severity)
    assert not case.at or case.at in map(str, found[0].evidence)


@pytest.mark.parametrize(
    "id, severity, pattern, change",
    [
        ("boot.root_uuid", "block", "root=/dev/sda1", (MENU, f"root=UUID={ROOT_UUID}", "root=/dev/sda1")),
        ("boot.root_exists", "block", "not in this image", (MENU, f"root=UUID={ROOT_UUID}", "root=UUID=0-0")),
        ("agent.cloudinit.enabled", "block", "kernel line", (MENU, " ro ", " ro cloud-init=disabled ")),
        ("drv.virtio.blacklist", "block", "virtio_blk", (MENU, " ro ", " ro modprobe.blacklist=virtio_blk ")),
        ("sw.vmware", "warn", "open-vm-tools", (STATUS, "Package: sudo\n", "Package: open-vm-tools\n")),
    ],
)
async def test_a_change_in_a_real_file_is_found_with_its_line(
    root: Path, id: str, severity: str, pattern: str, change: tuple[str, str, str]
) -> None:
    path, before, after = change
    text = (root / path).read_text()
    assert before in text, "the file has changed its shape"
    view = changed(LiveView(root), {f"/{path}": text.replace(before, after)})
    subject = await subject_of(view)
    clean = await subject_of(LiveView(root))
    assert not wrong(await findings_of(clean, target_of(clean), id))
    findings = await findings_of(subject, target_of(subject), id)
    found = next(one for one in findings if one.status == "fail")
    assert found.severity == severity
    assert pattern in found.message
    number = found.evidence[0].line
    assert after.split("=")[-1].split()[0].strip() in text.replace(before, after).splitlines()[number - 1]


async def test_virtio_missing_from_a_real_kernel_and_a_real_initramfs(root: Path) -> None:
    version = next((root / "lib/modules").iterdir()).name
    gone: dict[str, Content] = {
        f"/usr/lib/modules/{version}/kernel/drivers/block/virtio_blk.ko": None,
    }
    subject = await subject_of(changed(LiveView(root), gone))
    findings = await findings_of(subject, target_of(subject), "drv.virtio.kernel")
    assert any("not there" in one.message and one.blocks for one in findings)
    lists = f"/usr/lib/modules/{version}/modules.dep"
    dep = (root / lists.lstrip("/")).read_text()
    without = "".join(
        line + "\n" for line in dep.splitlines() if not line.startswith("kernel/drivers/block/virtio_blk")
    )
    config = (root / f"boot/config-{version}").read_text()
    unset = config.replace("CONFIG_VIRTIO_BLK=m", "# CONFIG_VIRTIO_BLK is not set")
    subject = await subject_of(changed(LiveView(root), {lists: without, f"/boot/config-{version}": unset}))
    findings = await findings_of(subject, target_of(subject), "drv.virtio.kernel")
    found = next(one for one in findings if one.blocks)
    number = next(at for at, line in enumerate(unset.splitlines(), 1) if "CONFIG_VIRTIO_BLK " in line)
    assert str(found.evidence[0]) == f"/boot/config-{version}:{number}"


def test_what_real_update_initramfs_and_real_dracut_make_is_read_to_its_end(root: Path) -> None:
    version = next((root / "lib/modules").iterdir()).name
    for path in (root / f"boot/initrd.img-{version}", root / debian.DRACUT):
        data = path.read_bytes()
        found = read_contents(lambda offset, length, data=data: data[offset : offset + length], len(data))  # type: ignore[misc]
        assert found.is_complete
        assert found.has_module(version, "virtio_blk"), path
        assert found.has_module(version, "virtio_pci")
        listed = run("lsinitramfs", path).split() if path.name.startswith("initrd") and _has("lsinitramfs") else []
        assert not listed or {one for one in listed if one.endswith(".ko")} <= {one.lstrip("./") for one in found.names}


def _has(program: str) -> bool:
    import shutil

    return shutil.which(program) is not None


async def test_a_preflight_in_object_storage_reads_little_and_is_quick(
    disk: Path, tmp_path: Path, seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system of 10 GiB as a compressed qcow2 in a real store: under 100 MiB for its one kernel, under 10 s."""
    from stages.decode import named
    from stages.store.stored import open_stored

    image = tmp_path / "debian.qcow2"
    run("qemu-img", "convert", "-c", "-O", "qcow2", disk, image)
    bucket = seaweedfs.new_bucket()
    with image.open("rb") as body:
        seaweedfs.client(timeout_s=300).put_object(Bucket=bucket, Key="debian.qcow2", Body=body)
    for name, value in seaweedfs.environment().items():
        monkeypatch.setenv(name, value)
    opened = open_stored
    counted: list[Counted] = []

    @asynccontextmanager
    async def counting(url: str, endpoint: str = "", **more: Any) -> AsyncIterator[RangeReader]:
        async with opened(url, endpoint, **more) as reader:
            counted.append(Counted(reader))
            yield counted[-1]

    monkeypatch.setattr(named, "open_stored", counting)
    begun = time.monotonic()
    findings = await look(Wanted(place=f"s3://{bucket}/debian.qcow2", endpoint=seaweedfs.endpoint))
    assert wrong(findings) == []
    assert time.monotonic() - begun < 10
    assert 0 < sum(one.read_bytes for one in counted) < 100 * MiB
    seaweedfs.delete_bucket(bucket)


class Counted:
    """A reader that counts what it is asked for."""

    def __init__(self, inner: RangeReader) -> None:
        self._inner = inner
        self.size = inner.size
        self.read_bytes = 0

    async def read(self, offset: int, length: int) -> bytes:
        """As the reader behind it."""
        self.read_bytes += length
        return await self._inner.read(offset, length)


def test_the_mutations_cover_most_families() -> None:
    assert len(_LAID) > 30
