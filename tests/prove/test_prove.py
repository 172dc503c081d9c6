"""Whole proofs: disks that boot, from files and from an S3 server, and the same disks broken in many ways.

Four boots here, about ten seconds each; the matrix is slow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.errors import EXIT_DIFFERS, EXIT_FAILED, EXIT_OK
from pipeline.units import GiB, MiB
from tests.chains import write_toml
from tests.decode.images import run
from tests.disks.bootable import Bootable, make_bootable
from tests.disks.damage import flip_block_bitmap
from tests.disks.mounts import mounted, system
from tests.end_to_end.command import Said, call
from tests.stores.s3 import S3Server

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the disks are made with loop mounts")

Maker = Callable[[Bootable], Path]


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Makes each disk once."""
    folder = tmp_path_factory.mktemp("bootable")
    made: dict[Bootable, Path] = {}

    def make(wanted: Bootable) -> Path:
        if wanted not in made:
            made[wanted] = make_bootable(folder / f"disk{len(made)}.raw", wanted)
        return made[wanted]

    return make


def export_to(store: S3Server, bucket: str, disk: Path, folder: Path, *encoder: str) -> str:
    """An image in a bucket, with its manifest beside it; its URL."""
    url = f"s3://{bucket}/web01"
    toml = write_toml(
        folder / "s3.toml", f'read.disk; path = "{disk}"', "checksum.guest", "sparse.zeros", *encoder,
        f'write.s3; url = "{url}"; endpoint = "{store.endpoint}"',
    )  # fmt: skip
    said = call("run", toml, "--set", f"export.manifest={folder / 's3.json'}", env=store.environment())
    assert said.code == 0, said.err
    return url


def export(disk: Path, target: Path, *encoder: str) -> Path:
    """An image with its manifest beside it."""
    toml = write_toml(
        target.with_suffix(".toml"), f'read.disk; path = "{disk}"', "checksum.guest", "sparse.zeros", *encoder,
        f'write.file; path = "{target}"',
    )  # fmt: skip
    said = call("run", toml, "--set", f"export.manifest={target.with_suffix('.local.json')}")
    assert said.code == 0, said.err
    return target


def prove(image: Path | str, *more: str, env: dict[str, str] | None = None) -> tuple[Said, dict[str, str]]:
    """What the command said, and the state of each step."""
    said = call("prove", str(image), "--json", *more, env=env)
    proved = [one for one in said.objects if one["type"] == "proved"]
    return said, proved[-1]["steps"] if proved else {}


def step(said: Said, name: str) -> dict[str, object]:
    found: dict[str, object] = next(one for one in said.objects if one["type"] == "step" and one["name"] == name)
    return found


# ---- what boots ------------------------------------------------------------------------------------------------------


def test_an_image_in_a_bucket_is_proven_from_there(disks: Maker, seaweedfs: S3Server, tmp_path: Path) -> None:
    """The whole way: export, verify by receipt, boot from the store; page, JUnit and figures."""
    bucket = seaweedfs.new_bucket()
    url = export_to(seaweedfs, bucket, disks(Bootable()), tmp_path, "encode.qcow2")
    environment = seaweedfs.environment()
    html, xml = tmp_path / "proof.html", tmp_path / "proof.xml"
    more = ("--endpoint", seaweedfs.endpoint, "--report", str(html), "--junit", str(xml))
    said, steps = prove(url, *more, env=environment)
    assert said.code == EXIT_OK, said.out
    assert {name: state for name, state in steps.items() if name != "preflight"} == {
        "digest": "passed", "structure": "passed", "filesystems": "passed", "boot": "passed",
    }  # fmt: skip
    assert steps["preflight"] in ("passed", "informs")
    assert "receipt" in str(step(said, "digest")["summary"]), "not a byte was read for it"
    boot = step(said, "boot")
    assert "web01 login:" in str(boot["log"])
    evidence = boot["evidence"]
    assert isinstance(evidence, dict)
    size = len(seaweedfs.get(bucket, "web01"))
    assert 0 < int(evidence["fetched_bytes"]) < size, "each byte at most once"
    assert int(boot["screen_bytes"]) > 500  # type: ignore[call-overload]  # a number
    assert "data:image/png" in html.read_text()
    assert ElementTree.parse(xml).getroot().get("failures") == "0"
    seaweedfs.delete_bucket(bucket)


def test_a_disk_for_uefi_is_proven(disks: Maker) -> None:
    disk = disks(Bootable(firmware="uefi"))
    before = disk.stat().st_mtime_ns
    said, steps = prove(disk, "--skip", "digest,preflight")
    assert said.code == EXIT_OK, said.out
    assert steps["boot"] == "passed"
    assert disk.stat().st_mtime_ns == before
    assert "clean" in str(step(said, "filesystems")["summary"])


# ---- what does not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, reason",
    [
        (Bootable(fstab="/dev/disk/by-id/old-disk"), "/etc/fstab"),
        (Bootable(with_virtio=False), "initramfs did not find the root filesystem: a driver is missing"),
    ],
    ids=["fstab names a missing disk", "initramfs without virtio"],
)
def test_a_disk_that_does_not_boot_is_disproven_for_the_right_reason(
    disks: Maker, wanted: Bootable, reason: str
) -> None:
    said, steps = prove(disks(wanted), "--skip", "digest,preflight")
    assert said.code == EXIT_DIFFERS, said.out
    assert steps["boot"] == "failed"
    assert (steps["structure"], steps["filesystems"]) == ("passed", "passed")
    assert reason in str(step(said, "boot")["summary"])
    assert any("preflight looks for the cause" in one for one in step(said, "boot")["details"])  # type: ignore[attr-defined]


# ---- without a boot --------------------------------------------------------------------------------------------------

NO_BOOT = ("--skip", "boot,preflight")


@pytest.fixture(scope="module")
def image(disks: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported qcow2, plain, to be copied and broken."""
    folder = tmp_path_factory.mktemp("image")
    return export(disks(Bootable()), folder / "web01.qcow2", 'encode.qcow2; compression = "none"')


def broken(image: Path, folder: Path, change: Callable[[bytearray], None]) -> Path:
    """A copy with its manifest, changed."""
    data = bytearray(image.read_bytes())
    change(data)
    (folder / image.name).write_bytes(data)
    (folder / f"{image.name}.manifest.json").write_bytes(image.with_name(f"{image.name}.manifest.json").read_bytes())
    return folder / image.name


def test_an_untouched_image_is_proven_without_a_boot(image: Path) -> None:
    said, steps = prove(image, *NO_BOOT)
    assert said.code == EXIT_OK, said.out
    assert steps == {"digest": "passed", "structure": "passed", "filesystems": "passed"} | {
        "preflight": "skipped", "boot": "skipped",
    }  # fmt: skip


def test_a_flipped_byte_in_a_filesystems_metadata_is_found_by_its_checker(image: Path, tmp_path: Path) -> None:
    raw = tmp_path / "flipped.raw"
    run("qemu-img", "convert", "-O", "raw", str(image), str(raw))
    flip_block_bitmap(raw, MiB)
    said, steps = prove(raw, "--skip", "boot,preflight,digest")
    assert said.code == EXIT_DIFFERS, said.out
    assert (steps["structure"], steps["filesystems"]) == ("passed", "failed")
    assert "e2fsck" in str(step(said, "filesystems")["details"])


def test_a_truncated_image_is_disproven(image: Path, tmp_path: Path) -> None:
    def cut(data: bytearray) -> None:
        del data[len(data) // 2 :]

    said, _ = prove(broken(image, tmp_path, cut), *NO_BOOT)
    assert said.code == EXIT_DIFFERS, said.out


def test_a_hole_where_data_was_is_found_by_the_digest(image: Path, tmp_path: Path) -> None:
    """Nothing but the digest can: the format is in order, and e2fsck looks at no file's content."""

    def hole(data: bytearray) -> None:
        at = data.index(b"HdrS") // 65536 * 65536 + 2 * MiB  # inside of the kernel
        data[at : at + 65536] = bytes(65536)

    said, steps = prove(broken(image, tmp_path, hole), *NO_BOOT)
    assert said.code == EXIT_DIFFERS, said.out
    assert (steps["digest"], steps["structure"]) == ("failed", "passed")


def test_a_corrupt_table_is_found_by_the_structure(image: Path, tmp_path: Path) -> None:
    def corrupt(data: bytearray) -> None:
        l1 = int.from_bytes(data[40:48], "big")
        l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
        data[l2 : l2 + 8] = (0x8000000000000000 | (len(data) + 65536 * 100) // 65536 * 65536).to_bytes(8, "big")

    said, steps = prove(broken(image, tmp_path, corrupt), *NO_BOOT)
    assert said.code == EXIT_DIFFERS, said.out
    assert steps["structure"] == "failed"


def test_an_image_without_a_manifest_is_not_proven(image: Path, tmp_path: Path) -> None:
    (tmp_path / "x.qcow2").write_bytes(image.read_bytes())
    only_digest = ("--skip", "structure,filesystems,preflight,boot")
    said, steps = prove(tmp_path / "x.qcow2", *only_digest)
    assert said.code == EXIT_FAILED
    assert steps["digest"] == "unknown"
    assert "--skip digest" in str(step(said, "digest")["hint"])
    local = str(image.with_suffix(".local.json"))
    assert prove(tmp_path / "x.qcow2", *only_digest, "--manifest", local)[0].code == EXIT_OK


def test_missing_tools_are_never_a_pass(image: Path, tmp_path: Path) -> None:
    """What to install is said, by the command and by a run, whose image is published all the same."""
    nothing = {"PATH": str(tmp_path)}
    said, steps = prove(image, "--skip", "preflight", env=nothing)
    assert said.code == EXIT_FAILED, said.err
    assert (steps["filesystems"], steps["boot"]) == ("unknown", "unknown")
    assert "apt install libnbd-bin" in str(step(said, "filesystems")["hint"])
    assert "qemu-system-x86" in str(step(said, "boot")["hint"])
    target = tmp_path / "out.qcow2"
    toml = write_toml(
        tmp_path / "e.toml", 'read.synthetic; size = "4 MiB"', "checksum.guest", "encode.qcow2",
        f'write.file; path = "{target}"', "verify.readback", 'verify.prove; skip = ["filesystems", "preflight"]',
    )  # fmt: skip
    said = call("run", toml, env=nothing)
    assert said.code == EXIT_FAILED, said.err
    assert "verify.prove will not be able to tell: there is no qemu-system-x86_64" in said.err, "before the start"
    assert said.out.startswith("unproven: boot: could not be tried: there is no qemu-system-x86_64. Install it: apt ")
    assert "(but identical)" in said.out
    assert target.exists()


def test_what_is_no_image_is_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "x.qcow2").write_bytes(b"hello" * 1000)
    assert call("prove", str(tmp_path / "x.qcow2")).code == EXIT_FAILED
    assert call("prove", str(tmp_path / "nosuch")).code == EXIT_FAILED
    assert call("prove", str(tmp_path / "x.qcow2"), "--skip", "boots").code == 2


def test_prove_as_the_last_stage_keeps_its_findings(disks: Maker, tmp_path: Path) -> None:
    target = tmp_path / "out.qcow2"
    toml = write_toml(
        tmp_path / "e.toml", f'read.disk; path = "{disks(Bootable())}"', "checksum.guest", "sparse.zeros",
        "encode.qcow2", f'write.file; path = "{target}"', "verify.readback",
        'verify.prove; skip = ["boot", "preflight"]',
    )  # fmt: skip
    said = call("run", toml, "--set", f"export.manifest={tmp_path / 'm.json'}")
    assert said.code == 0, said.err
    manifest = json.loads((tmp_path / "m.json").read_text())
    verdicts = manifest["verdicts"]
    assert [(one["level"], one["state"]) for one in verdicts] == [("readback", "identical"), ("prove", "proven")]
    assert "clean" in str(verdicts[1]["evidence"])
    assert said.out.startswith("verified: identical; proven by structure, filesystems (not tried: boot)\n")
    assert manifest["state"] == "identical"


def test_preflight_informs_without_a_profile_and_decides_with_one(disks: Maker) -> None:
    """The initramfs has no driver for the disk of a cloud; this one is of no system that is known."""
    disk = disks(Bootable(fstab="/dev/disk/by-id/old-disk"))
    skip = ("--skip", "digest,boot,filesystems")
    said, steps = prove(disk, *skip)
    assert (said.code, steps["preflight"]) in ((EXIT_OK, "passed"), (EXIT_OK, "informs"))
    said, steps = prove(disk, *skip, "--profile", "tencent")
    assert said.code == (EXIT_DIFFERS if steps["preflight"] == "failed" else EXIT_OK)
    assert step(said, "preflight")["evidence"]["profile"] == "tencent"  # type: ignore[index]  # an object
    assert prove(disk, "--profile", "nosuch")[0].code == 2


def test_a_disproven_image_is_not_published(disks: Maker, tmp_path: Path) -> None:
    raw, target = tmp_path / "damaged.raw", tmp_path / "out.qcow2"
    raw.write_bytes(disks(Bootable()).read_bytes())
    flip_block_bitmap(raw, MiB)
    toml = write_toml(
        tmp_path / "e.toml", f'read.disk; path = "{raw}"', "checksum.guest", "encode.qcow2",
        f'write.file; path = "{target}"', 'verify.prove; skip = ["boot", "preflight"]',
    )  # fmt: skip
    said = call("run", toml)
    assert said.code == EXIT_DIFFERS, said.err
    assert not target.exists()


def _machines(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        if int(rest.split()[1]) == parent and name.startswith("qemu-system"):
            found.append(int(status.parent.name))
    return found


def test_the_machine_ends_with_us_also_on_kill_9(disks: Maker) -> None:
    words = [sys.executable, "-m", "pipeline", "prove", str(disks(Bootable())), "--skip", "digest,filesystems"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 60
    while not (machines := _machines(process.pid)):
        assert process.poll() is None
        assert time.monotonic() < ends
    watched = os.pidfd_open(machines[0])
    folder = Path(f"/proc/{machines[0]}")
    assert folder.stat().st_uid != 0, "it runs as nobody"
    # The filter is the last thing that it puts on, right before the guest's first instruction.
    while "Seccomp:\t2" not in (status := (folder / "status").read_text()):
        assert time.monotonic() < ends
    assert "NoNewPrivs:\t1" in status
    assert "CapEff:\t0000000000000000" in status
    limits = {line[:26].strip(): line[26:].split()[0] for line in (folder / "limits").read_text().splitlines()}
    assert all(limits[name] != "unlimited" for name in ("Max address space", "Max cpu time", "Max file size"))
    words = (folder / "cmdline").read_bytes().decode().split("\0")
    assert [after for word, after in pairwise(words) if word == "-netdev"] == ["hubport,id=net,hubid=0"], "no network"
    process.kill()
    process.wait()
    import select

    assert select.select([watched], [], [], 10)[0], "qemu ended"
    os.close(watched)


# ---- the matrix ------------------------------------------------------------------------------------------------------

ENCODERS = {
    "web01.qcow2": 'encode.qcow2; compression = "none"',
    "zlib.qcow2": "encode.qcow2",
    "zstd.qcow2": 'encode.qcow2; compression = "zstd"',
    "web01.vhd": "encode.vhd",
    "web01.vmdk": "encode.vmdk",
    "web01.raw": "encode.raw",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_every_format_boots_from_a_file(disks: Maker, tmp_path: Path, name: str) -> None:
    disk = disks(Bootable(firmware="uefi"))
    said, steps = prove(export(disk, tmp_path / name, ENCODERS[name]), "--skip", "preflight")
    assert said.code == EXIT_OK, said.out
    assert steps["boot"] == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_every_format_boots_from_a_bucket(disks: Maker, seaweedfs: S3Server, tmp_path: Path, name: str) -> None:
    bucket = seaweedfs.new_bucket()
    url = export_to(seaweedfs, bucket, disks(Bootable()), tmp_path, ENCODERS[name])
    more = ("--endpoint", seaweedfs.endpoint, "--skip", "preflight")
    said, steps = prove(url, *more, env=seaweedfs.environment())
    assert said.code == EXIT_OK, said.out
    assert (steps["digest"], steps["boot"]) == ("passed", "passed")
    seaweedfs.delete_bucket(bucket)


@pytest.mark.slow
def test_an_object_that_was_cut_or_changed_is_disproven(disks: Maker, seaweedfs: S3Server, tmp_path: Path) -> None:
    bucket = seaweedfs.new_bucket()
    url = export_to(seaweedfs, bucket, disks(Bootable()), tmp_path, "encode.qcow2")
    whole = seaweedfs.get(bucket, "web01")
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for data, finds in ((whole[: len(whole) // 2], "structure"), (bytes(changed), "digest")):
        seaweedfs.put(bucket, "web01", data)
        said, steps = prove(url, "--endpoint", seaweedfs.endpoint, *NO_BOOT, env=seaweedfs.environment())
        assert said.code == EXIT_DIFFERS, said.out
        assert steps[finds] == "failed"
    seaweedfs.delete_bucket(bucket)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wanted, code, reason",
    [
        (Bootable(root="/dev/sda1"), EXIT_DIFFERS, "root= names a disk that is not"),
        (Bootable(with_boot_code=False), EXIT_DIFFERS, "it was wiped, or is broken"),
        (Bootable(firmware="uefi", with_boot_code=False), EXIT_DIFFERS, "nothing to boot"),
        (Bootable(then="/bin/busybox sleep 1; /bin/busybox poweroff -f"), EXIT_OK, "came up"),
        (Bootable(then="exit 1"), EXIT_OK, "came up"),
        (Bootable(console="console=tty0"), EXIT_OK, "came up"),
        (Bootable(before="/bin/busybox poweroff -f"), EXIT_DIFFERS, "switched itself off before it came up"),
        (Bootable(before="/bin/busybox reboot -f"), EXIT_DIFFERS, "restarts again and again"),
        (Bootable(before="echo c > /proc/sysrq-trigger"), EXIT_DIFFERS, "panicked"),
    ],
    ids=[
        "root=/dev/sda1",
        "boot code wiped",
        "no loader",
        "powers off after login",
        "panics after login",
        "screen only",
        "powers off before login",
        "restarts for ever",
        "panics before login",
    ],
)
def test_other_disks_are_judged_rightly(disks: Maker, wanted: Bootable, code: int, reason: str) -> None:
    said, _ = prove(disks(wanted), "--skip", "digest,preflight,filesystems")
    assert said.code == code, said.out
    assert reason in str(step(said, "boot")["summary"])


@pytest.mark.slow
def test_a_large_system_is_proven_by_a_small_part_of_it(seaweedfs: S3Server, tmp_path: Path) -> None:
    """Without a boot, less than a twentieth of the disk is read from the store: digest by receipt, all filesystems."""
    disk = tmp_path / "large.raw"
    with disk.open("wb") as file:
        file.truncate(10 * GiB)
    system("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", disk)
    with mounted(tmp_path / "mnt", "ext4", disk, "loop"):
        for number in range(20_000):
            folder = tmp_path / "mnt" / f"usr{number // 500}"
            folder.mkdir(exist_ok=True)
            (folder / f"file{number}").write_bytes(os.urandom(12_000))
        system("sync", "--file-system", tmp_path / "mnt")
    bucket = seaweedfs.new_bucket()
    url = export_to(seaweedfs, bucket, disk, tmp_path, 'encode.qcow2; compression = "zstd"')
    said, steps = prove(url, "--endpoint", seaweedfs.endpoint, "--skip", "boot", env=seaweedfs.environment())
    assert said.code == EXIT_OK, said.out
    assert (steps["digest"], steps["filesystems"]) == ("passed", "passed")
    assert "receipt" in str(step(said, "digest")["summary"])
    assert said.last("proved")["read_bytes"] < 10 * GiB // 20
    seaweedfs.delete_bucket(bucket)


@pytest.mark.slow
def test_an_empty_disk_is_read_from_the_screen(tmp_path: Path) -> None:
    """Only the firmware's text mode says so; the serial console stays silent."""
    (tmp_path / "empty.raw").write_bytes(bytes(MiB))
    said, _ = prove(tmp_path / "empty.raw", "--skip", "digest,preflight,filesystems")
    assert said.code == EXIT_DIFFERS, said.out
    assert "nothing to boot" in str(step(said, "boot")["summary"])
    assert step(said, "boot")["log"] == ""


@pytest.mark.slow
def test_a_pattern_and_a_timeout_decide(disks: Maker) -> None:
    disk = disks(Bootable())
    skip = ("--skip", "digest,preflight,filesystems")
    assert prove(disk, *skip, "--pattern", "GNU/Linux 1[0-9]")[0].code == EXIT_OK
    said, steps = prove(disk, *skip, "--pattern", "never said", "--timeout", "15")
    assert said.code == EXIT_FAILED
    assert steps["boot"] == "unknown"
    assert "nothing decisive within" in str(step(said, "boot")["summary"])


@pytest.mark.slow
def test_a_real_debian_is_proven(tmp_path: Path) -> None:
    """A system that Debian's own tools made: GRUB, initramfs-tools, systemd, cloud-init."""
    from tests.preflight import debian

    if why := debian.why_not():
        pytest.skip(why)
    image = export(debian.make(), tmp_path / "debian12.qcow2", "encode.qcow2")
    said, steps = prove(image, "--timeout", "100")
    assert said.code == EXIT_OK, said.out
    assert steps["boot"] == "passed"
    assert "login:" in str(step(said, "boot")["summary"])
    assert said.last("proved")["read_bytes"] < 2 * said.last("proved")["file_bytes"]
