"""Rules on files of unmodified Debian packages: a kernel as it is shipped, cloud-init, VMware's tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.disk.live import LiveView
from stages.preflight.kernels import with_needs
from tests.preflight import systems
from tests.preflight.disks import findings_of, subject_of, target_of
from tests.preflight.packages import unpacked
from tests.preflight.systems import initrd
from tests.preflight.trees import Content, MadeView, changed

NEEDED = ("virtio_blk", "virtio", "virtio_ring", "virtio_pci", "virtio_pci_modern_dev", "virtio_pci_legacy_dev")


@pytest.fixture(scope="module")
def tree() -> Path:
    """All packages in one folder."""
    return unpacked()


@pytest.fixture
def version(tree: Path) -> str:
    """Of the kernel that was unpacked."""
    return next((tree / "lib/modules").iterdir()).name


def system(tree: Path, files: dict[str, Content], modules: tuple[str, ...] = NEEDED) -> MadeView:
    """The packages, and what only an installation makes: fstab, boot menu, initramfs, accounts."""
    version = next((tree / "lib/modules").iterdir()).name
    made: dict[str, Content] = {
        **systems.KEY_FILES,
        "/etc/fstab": systems.FSTAB,
        "/boot/grub/grub.cfg": systems.grub_cfg(version),
        f"/boot/initrd.img-{version}": initrd(
            version, (*modules, "ext4", "jbd2", "mbcache", "crc16", "crc32c_generic")
        ),
    }
    return changed(LiveView(tree), {**made, **files})


async def test_a_shipped_kernel_has_everything_and_says_so_without_modules_dep(tree: Path, version: str) -> None:
    """depmod makes modules.dep when a kernel is installed; without it the modules themselves are asked."""
    subject = await subject_of(system(tree, {}))
    (kernel,) = subject.kernels
    assert kernel.version == version
    assert kernel.config["CONFIG_VIRTIO_BLK"] == "m"
    kernel = await with_needs(subject.view, kernel, ["virtio_blk", "virtio_pci", "virtio_net"])
    assert set(kernel.depends["virtio_blk"]) == {"virtio", "virtio_ring"}
    assert set(kernel.depends["virtio_pci"]) == {
        "virtio",
        "virtio_ring",
        "virtio_pci_modern_dev",
        "virtio_pci_legacy_dev",
    }
    assert {"net_failover", "failover", "virtio", "virtio_ring"} <= set(kernel.depends["virtio_net"])
    findings = await findings_of(subject, target_of(subject), "drv.virtio.kernel", "drv.virtio.initramfs")
    assert [one.status for one in findings] == ["pass", "pass"], findings


@pytest.mark.parametrize("module", NEEDED)
async def test_each_module_that_virtio_needs_must_be_in_the_initramfs(tree: Path, module: str) -> None:
    subject = await subject_of(system(tree, {}, tuple(one for one in NEEDED if one != module)))
    (found,) = await findings_of(subject, target_of(subject), "drv.virtio.initramfs")
    assert found.blocks
    assert f"lacks {module}:" in found.message


async def test_a_module_taken_out_of_the_package_is_missed(tree: Path, version: str) -> None:
    path = f"/lib/modules/{version}/kernel/drivers/block/virtio_blk.ko"
    subject = await subject_of(system(tree, {path: None}))
    findings = await findings_of(subject, target_of(subject), "drv.virtio.kernel")
    assert any(one.blocks and "there is no virtio_blk.ko" in one.message for one in findings), findings


async def test_cloud_init_as_it_is_shipped_is_found_and_not_yet_enabled(tree: Path) -> None:
    """Its maintainer script enables the services; only unpacked it does not run."""
    subject = await subject_of(system(tree, {}))
    findings = await findings_of(subject, target_of(subject), "agent.cloudinit.installed", "agent.cloudinit.enabled")
    assert [(one.id.rpartition(".")[2], one.status) for one in findings] == [("installed", "pass"), ("enabled", "fail")]
    without_database = await subject_of(system(tree, {"/var/lib/dpkg/status": None}))
    (found,) = await findings_of(without_database, target_of(without_database, "azure"), "agent.cloudinit.installed")
    assert "cloud-init 22." in found.message, "the version comes from what Python's packaging leaves"
    assert found.status == "pass"


async def test_vmware_tools_of_the_distribution_are_found_with_the_line_of_the_database(tree: Path) -> None:
    subject = await subject_of(system(tree, {}))
    (found,) = await findings_of(subject, target_of(subject), "sw.vmware")
    assert (found.status, found.severity) == ("fail", "warn")
    lines = (tree / "var/lib/dpkg/status").read_text().splitlines()
    assert lines[found.evidence[0].line - 1] == "Package: open-vm-tools"
    assert found.remedy == "apt-get purge -y open-vm-tools"
