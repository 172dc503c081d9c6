"""A Debian 12 that its own tools made (debootstrap, apt, update-initramfs, grub), mutated file by file, in both modes.

The disk is made once and kept below `.cache/` (about three minutes); `python -m tests.preflight.debian` makes it too.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
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
from stages.preflight.rules import all_rules, judge
from tests.disk.making import run
from tests.preflight import debian, systems
from tests.preflight.disks import BOOT_UUID, ROOT_UUID, findings_of, subject_of, target_of, volume
from tests.preflight.test_modes import MODE_MATTERS, told
from tests.preflight.test_rules import CASES, Case
from tests.preflight.trees import Content, changed
from tests.stores.s3 import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

# What a real Debian has under another name, in a second place, or not at all: it is mutated below by other means.
_OTHERWISE = {
    ("boot.root_exists", "which this export drops"),  # its line is another one
    ("boot.cmdline", "lacks"),  # likewise, and it has "quiet" besides
    ("fs.critical", "/etc/os-release"),  # a link there: both names have to go
    ("access.dhcp", "no DHCP client"),  # several clients
    ("hw.cpu", "programs are for x86; aws-import takes x86_64"),  # /sbin is a link
    ("drv.virtio.blacklist", "built in all the same"),
    ("drv.virtio.initramfs", "virtio_blk"),
    ("hw.console", "speaks on ttyS0"),  # nobody asked for one there
    ("boot.efi.fallback", "BOOTAA64.EFI"),  # /sbin is a link
    ("sec.secrets", "no keys"),  # the SSH server made its keys when it was installed
    ("sw.virtualbox", "vboxguest.ko.xz"),
}
# The cases that hold for a Debian with whatever kernel and files it has: all but those that name the other one's.
_LAID = [
    case
    for case in CASES
    if case.status in ("fail", "pass")
    and case.system is systems.debian_files
    and "6.1.0-13" not in repr((case.files, case.at, case.said))
    and (case.id, case.said) not in _OTHERWISE
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
    subject = await subject_of(changed(LiveView(root), case.files, **case.space), **case.disk)
    findings = await findings_of(subject, target_of(subject, case.profile, **case.target), case.id)
    if case.status == "pass":
        assert {one.status for one in findings} == {"pass"}, findings
        return
    found = [one for one in findings if case.said in one.message]
    assert found, [(one.status, one.message) for one in findings]
    assert found[0].status == case.status
    assert not case.severity or found[0].severity == case.severity
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
    took_s, read = time.monotonic() - begun, sum(one.read_bytes for one in counted)
    print(f"{len(findings)} findings after {read / MiB:.1f} MiB and {took_s:.2f} s")
    assert wrong(findings) == []
    assert took_s < 10
    assert 0 < read < 100 * MiB
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


def _gone(root: Path, *paths: str) -> dict[str, Content]:
    """Files that are there, removed under every name that leads to them."""
    found: dict[str, Content] = {}
    for path in paths:
        if os.path.lexists(root / path):
            found[f"/{path}"] = None
            found["/" + str((root / path).resolve().relative_to(root))] = None
    return found


def _second_kernel(root: Path, version: str) -> dict[str, Content]:
    """Another kernel beside the real one: its own files under another version, and a menu that starts the old first."""
    menu = (root / MENU).read_text()
    real = next((root / "lib/modules").iterdir()).name
    files: dict[str, Content] = {f"/{MENU}": menu + menu.replace(real, version)}
    for name in ("vmlinuz", "initrd.img"):
        files[f"/boot/{name}-{version}"] = systems.kernel_image(version) if name == "vmlinuz" else b""
    files[f"/boot/config-{version}"] = (root / f"boot/config-{real}").read_text()
    for name in ("modules.dep", "modules.builtin"):
        files[f"/usr/lib/modules/{version}/{name}"] = (root / f"lib/modules/{real}/{name}").read_text()
    return files


# What has another shape on a real Debian: (rule, status, severity, message, files from its root filesystem).
_REAL: list[tuple[str, str, str, str, Callable[[Path, str], dict[str, Content]]]] = [
    (
        "fs.critical",
        "fail",
        "warn",
        "/etc/os-release does not say",
        lambda root, _: _gone(root, "etc/os-release", "usr/lib/os-release"),
    ),
    ("fs.critical", "pass", "", "key files", lambda root, _: {"/etc/os-release": None}),
    (
        "access.dhcp",
        "fail",
        "warn",
        "no DHCP client",
        lambda root, _: _gone(root, "usr/sbin/dhclient", "sbin/dhclient", "usr/sbin/netplan"),
    ),
    ("access.dhcp", "pass", "", "systemd-networkd", lambda root, _: _gone(root, "usr/sbin/dhclient", "sbin/dhclient")),
    (
        "hw.cpu",
        "pass",
        "",
        "for aarch64",
        lambda root, _: {"/usr/lib/systemd/systemd": systems.program(183)},
    ),
    (
        "hw.cpu",
        "fail",
        "block",
        "programs are for x86;",
        lambda root, _: {"/usr/lib/systemd/systemd": systems.program(3)},
    ),
    ("boot.cmdline", "fail", "warn", "lacks console=ttyS0 earlyprintk=ttyS0", lambda root, _: {}),
    (
        "sw.virtualbox",
        "fail",
        "block",
        "vboxguest.ko",
        lambda _, version: {f"/usr/lib/modules/{version}/misc/vboxguest.ko": b""},
    ),
    ("hw.console", "pass", "", "ttyS0", lambda root, _: _menu(root, " ro ", " ro console=ttyS0,115200 ")),
    ("hw.console", "fail", "info", "no serial console", lambda root, _: {}),
    ("sec.secrets", "fail", "info", "the SSH server's own keys", lambda root, _: {}),
    (
        "sec.secrets",
        "pass",
        "",
        "no keys",
        lambda root, _: {f"/etc/ssh/{one.name}": None for one in (root / "etc/ssh").glob("ssh_host_*_key")},
    ),
    (
        "drv.virtio.default",
        "fail",
        "info",
        "99.1.0-1-amd64 is newer",
        lambda root, _: _second_kernel(root, "99.1.0-1-amd64"),
    ),
    ("boot.root_exists", "fail", "block", "not in this image", lambda root, _: _menu(root, ROOT_UUID, BOOT_UUID)),
    (
        "fs.lvm.filter",
        "fail",
        "warn",
        "filter names devices",
        lambda *_: {"/etc/lvm/lvm.conf": 'filter = [ "a|/dev/sda|" ]\n'},
    ),
    ("fs.lvm.filter", "pass", "", "looks at every device", lambda *_: {}),
    ("boot.cmdline", "pass", "", "has what azure asks for", lambda root, _: _menu(root, " ro  quiet", _AZURE)),
]
_AZURE = " ro console=ttyS0 earlyprintk=ttyS0 rootdelay=300 net.ifnames=0"
_IN_LVM = {"volumes": [volume(1), volume(2, "lvm2", "x")]}


def _menu(root: Path, before: str, after: str) -> dict[str, Content]:
    """The real boot menu with something else in each line that has it."""
    text = (root / MENU).read_text()
    assert before in text, "the file has changed its shape"
    return {f"/{MENU}": text.replace(before, after)}


@pytest.mark.parametrize(
    "id, status, severity, said, files", _REAL, ids=lambda one: one if isinstance(one, str) else ""
)
async def test_what_has_another_shape_on_a_real_debian_is_told_too(
    root: Path, id: str, status: str, severity: str, said: str, files: Callable[[Path, str], dict[str, Content]]
) -> None:
    version = next((root / "lib/modules").iterdir()).name
    disk: dict[str, Any] = _IN_LVM if id == "fs.lvm.filter" else {}
    subject = await subject_of(changed(LiveView(root), files(root, version)), **disk)
    profile = {"boot.cmdline": "azure", "hw.cpu": "aws-import"}.get(id, "tencent")
    findings = await findings_of(subject, target_of(subject, profile), id)
    found = [one for one in findings if said in one.message]
    assert found, [(one.status, one.message) for one in findings]
    assert found[0].status == status
    assert not severity or found[0].severity == severity


async def test_an_initramfs_that_real_update_initramfs_made_without_virtio_is_missed(
    root: Path, tmp_path: Path
) -> None:
    """MODULES=list with nothing in the list: as on a machine whose administrator made it small."""
    version = next((root / "lib/modules").iterdir()).name
    layer = tmp_path / "layer"
    for name in ("upper", "work", "merged"):
        (layer / name).mkdir(parents=True)
    merged = layer / "merged"
    run("mount", "-t", "tmpfs", "layer", layer)
    try:
        for name in ("upper", "work", "merged"):
            (layer / name).mkdir(exist_ok=True)
        lower = f"lowerdir={root},upperdir={layer}/upper,workdir={layer}/work"
        run("mount", "-t", "overlay", "overlay", "-o", lower, merged)
        try:
            (merged / "etc/initramfs-tools/conf.d/small").write_text("MODULES=list\n")
            run("chroot", merged, "update-initramfs", "-u", "-k", version)
            subject = await subject_of(LiveView(merged))
            (found,) = await findings_of(subject, target_of(subject), "drv.virtio.initramfs")
            assert found.blocks
            assert "lacks " in found.message
            assert "virtio_blk" in found.message
            assert found.remedy.endswith(f"update-initramfs -u -k {version}")
            # The remedy itself, run by the system's own tools, ends it.
            run("chroot", merged, "sh", "-c", found.remedy)
            subject = await subject_of(LiveView(merged))
            (found,) = await findings_of(subject, target_of(subject), "drv.virtio.initramfs")
            assert found.status == "pass"
        finally:
            run("umount", merged)
    finally:
        run("umount", layer)


def test_every_rule_has_passed_and_failed_on_a_real_debian() -> None:
    told = {(case.id, case.status) for case in _LAID} | {(id, status) for id, status, *_ in _REAL}
    told |= {("drv.virtio.initramfs", "pass"), ("drv.virtio.initramfs", "fail")}  # in tests of their own
    assert {(rule.id, status) for rule in all_rules() for status in ("pass", "fail")} <= told
