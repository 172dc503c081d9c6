"""The same system live and in an image; the command on both; images of other formats; hostile trees."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.units import GiB, MiB
from stages.preflight.findings import Finding
from stages.preflight.opening import Wanted, open_subject
from stages.preflight.rules import judge
from tests.disk.making import blank, need, needs_root, run
from tests.end_to_end.places import unused_name
from tests.preflight import systems
from tests.preflight.disks import findings_of, subject_of, target_of
from tests.preflight.images import write_disk, write_efi_disk, write_tree
from tests.preflight.systems import grub_cfg
from tests.preflight.trees import Content, Made, MadeView, changed, link
from tests.stores.azurite import AzureServer
from tests.stores.openssh import SftpServer
from tests.stores.s3 import S3Server

# What a mounted system can't be asked, and what differs because the tree lies on another filesystem.
MODE_MATTERS = {"fs.clean", "live.risk", "fs.free"}

SPOILED: dict[str, Content] = {
    "/etc/fstab": systems.FSTAB + "UUID=dead-beef /data ext4 defaults 0 2\n/dev/sdb1 /more xfs defaults 0 0\n",
    "/boot/grub/grub.cfg": grub_cfg(root="/dev/sda1", arguments="quiet modprobe.blacklist=virtio_net"),
    "/etc/shadow": Made(content=b"root:x:\n", mode=0o644),
    "/etc/cloud/cloud-init.disabled": "",
    "/etc/smartd.conf": "# all\n/dev/sda -a\n",
    "/etc/network/interfaces": "auto ens192\niface ens192 inet static\n",
    "/var/lib/dpkg/status": systems.dpkg_status("open-vm-tools"),
}


def call(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["preflight", *map(str, words)], prog_name="pipeline")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


async def look(wanted: Wanted, profile: str = "tencent") -> tuple[Finding, ...]:
    async with open_subject(wanted) as subject:
        return await judge(subject, target_of(subject, profile))


def told(findings: tuple[Finding, ...]) -> list[tuple[str, str, str, str, tuple[str, ...]]]:
    return [
        (one.id, one.status, one.severity, one.message, tuple(map(str, one.evidence)))
        for one in findings
        if one.id not in MODE_MATTERS
    ]


@pytest.fixture
def good(tmp_path: Path) -> tuple[Path, Path]:
    """A good Debian as a tree and as a disk."""
    tree = write_tree(systems.debian_files(), tmp_path / "tree")
    return tree, write_disk(tree, tmp_path / "disk.raw")


@needs_root
@pytest.mark.parametrize("changes", [{}, SPOILED], ids=["good", "spoiled"])
async def test_a_live_tree_and_an_image_of_it_give_the_same_findings(
    tmp_path: Path, changes: dict[str, Content]
) -> None:
    tree = write_tree({**systems.debian_files(), **changes}, tmp_path / "tree")
    disk = write_disk(tree, tmp_path / "disk.raw")
    live = await look(Wanted(place=str(disk), root=tree))
    image = await look(Wanted(place=str(disk)))
    assert told(live) == told(image)
    blocked = {one.id for one in image if one.blocks}
    assert bool(blocked) == bool(changes)
    if changes:
        assert {"fs.fstab.foreign", "boot.root_uuid", "drv.virtio.blacklist", "agent.cloudinit.enabled"} <= blocked


@needs_root
async def test_a_system_with_a_unified_kernel_on_its_efi_partition_is_the_same_in_both_modes(tmp_path: Path) -> None:
    """GPT, FAT and ext4 in one disk: the root's own /efi is empty in the image, what is seen is the mounted FAT."""
    tree = write_tree(systems.arch_files(), tmp_path / "tree")
    disk = write_efi_disk(tree, tmp_path / "disk.raw", esp="/efi")
    live = await look(Wanted(place=str(disk), root=tree), "generic")
    image = await look(Wanted(place=str(disk)), "generic")
    assert told(live) == told(image)
    by_id = {one.id: one for one in image}
    assert by_id["boot.firmware"].message == "it starts by UEFI, as generic does"
    assert by_id["boot.efi.fallback"].status == "pass"
    assert by_id["drv.virtio.initramfs"].status == "pass"
    assert str(by_id["drv.virtio.initramfs"].evidence[0]) == "/efi/EFI/Linux/arch-linux.efi"


@needs_root
def test_the_command_says_ready_and_exits_0(good: tuple[Path, Path]) -> None:
    _, disk = good
    code, out, err = call(disk, "--profile", "tencent")
    assert (code, err) == (0, "")
    assert "Debian GNU/Linux 12" in out
    assert out.rstrip().endswith("ready, with 1 warnings"), "a small disk has little room"
    assert "fs.free" in out
    code, out, _ = call(disk, "--profile", "tencent", "--all")
    assert "drv.virtio.initramfs" in out


@needs_root
@pytest.mark.parametrize("format", ["qcow2", "vmdk"])
def test_an_image_of_any_format_is_looked_into(good: tuple[Path, Path], tmp_path: Path, format: str) -> None:
    need("qemu-img")
    image = tmp_path / f"disk.{format}"
    run("qemu-img", "convert", "-O", format, good[1], image)
    assert call(image, "--profile", "tencent")[0] == 0


@needs_root
@pytest.mark.parametrize("scheme", ["s3", "az", "gs", "sftp"])
def test_an_image_in_any_store_gives_the_findings_of_the_file(
    request: pytest.FixtureRequest,
    good: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    need("qemu-img")
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-c", "-O", "qcow2", good[1], image)
    if scheme == "sftp":
        ssh: SftpServer = request.getfixturevalue("sftp_server")
        home = tmp_path / "home"
        (home / ".ssh").mkdir(parents=True)
        shutil.copy(ssh.identity, home / ".ssh/id_ed25519")
        shutil.copy(ssh.known_hosts, home / ".ssh/known_hosts")
        shutil.copy(image, ssh.data / f"{tmp_path.name}.qcow2")
        url, environment = ssh.url(f"{tmp_path.name}.qcow2"), {"HOME": str(home)}
    elif scheme == "az":
        azure: AzureServer = request.getfixturevalue("azure_server")
        container = azure.create_container(unused_name())
        azure.put(container, "disk.qcow2", image.read_bytes())
        url, environment = f"az://{container}/disk.qcow2", azure.environment()
    else:
        store: S3Server = request.getfixturevalue("seaweedfs")
        bucket = store.new_bucket()
        store.put(bucket, "disk.qcow2", image.read_bytes())
        url, environment = f"{scheme}://{bucket}/disk.qcow2", store.environment()
        if scheme == "gs":
            key, secret = store.credentials.access_key, store.credentials.secret_key
            environment = {"GS_ACCESS_KEY_ID": key, "GS_SECRET_ACCESS_KEY": secret}
            environment["STORAGE_EMULATOR_HOST"] = store.endpoint
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = ("--profile", "tencent", "--all")
    here, there = call(image, *words), call(url, *words)
    assert there == (0, here[1].replace(str(image), url), "")


@needs_root
def test_what_blocks_exits_5_with_place_and_remedy(tmp_path: Path) -> None:
    tree = write_tree({**systems.debian_files(), **SPOILED}, tmp_path / "tree")
    disk = write_disk(tree, tmp_path / "disk.raw")
    code, out, _ = call(disk, "--profile", "tencent")
    assert code == 5
    assert "/etc/fstab:3" in out
    assert "$ sed -i '3s#" in out
    assert "BLOCKED" in out
    code, out, _ = call(disk, "--profile", "tencent", "--json")
    assert code == 5
    objects = [json.loads(line) for line in out.splitlines()]
    finding = next(one for one in objects if one.get("id") == "fs.fstab.foreign" and one["status"] == "fail")
    assert finding["type"] == "finding"
    assert finding["severity"] == "block"
    assert finding["evidence"] == [{"file": "/etc/fstab", "line": 3}]
    assert objects[-1]["type"] == "preflight"
    assert objects[-1]["verdict"] == "blocked"
    ids = sorted({one["id"] for one in objects if one["type"] == "finding" and one["severity"] == "block"
                  and one["status"] == "fail"})  # fmt: skip
    code, out, _ = call(disk, "--profile", "tencent", *(word for id in ids for word in ("--ignore", id)))
    assert code == 0
    assert "Ignored by you" in out


def test_findings_are_coloured_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.commands.preflight import finding_lines

    finding = Finding(id="a.b", severity="block", status="fail", message="it is wrong")
    assert not [line for line in finding_lines((finding,)) if "\x1b" in line]
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert any("\x1b[31m" in line and "a.b" in line for line in finding_lines((finding,)))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not [line for line in finding_lines((finding,)) if "\x1b" in line]


@needs_root
def test_the_script_holds_every_remedy_and_is_a_shell_script(tmp_path: Path) -> None:
    tree = write_tree({**systems.debian_files(), **SPOILED}, tmp_path / "tree")
    script = tmp_path / "fix.sh"
    code, out, _ = call("--root", tree, "--profile", "tencent", "--fix-script", script)
    assert code == 5
    assert "Read it" in out
    text = script.read_text()
    assert not os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", script], check=True)
    assert "apt-get purge -y open-vm-tools" in text
    assert "rm /etc/cloud/cloud-init.disabled" in text
    assert "# block: agent.cloudinit.enabled" in text
    code, _, err = call("--root", tree, "--fix-script", script)
    assert code == 2
    assert "never replaced" in err


def test_explain_tells_what_a_rule_is_about() -> None:
    code, out, _ = call("--explain", "boot.resume")
    assert code == 0
    assert "resume" in out
    code, out, _ = call("--explain", "all")
    assert "drv.virtio.initramfs" in out
    code, _, err = call("--explain", "boot.resum")
    assert code == 2
    assert 'did you mean "boot.resume"?' in err
    assert call("--ignore", "nothing.such")[0] == 2


def test_a_disk_without_a_system_is_told_so(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(8 * MiB))
    code, out, _ = call(disk, "-f", "raw")
    assert code == 5
    assert "layout.system" in out
    assert call(disk, "-f", "raw", "--kind", "data")[0] == 0


# -- hostile trees -----------------------------------------------------------------------------------------------------


async def rules_on(view: object) -> tuple[Finding, ...]:
    subject = await subject_of(view)  # type: ignore[arg-type]  # a View
    return await findings_of(subject, target_of(subject))


def make_hostile(tree: Path, outside: Path) -> None:
    """Loops, links out of the root, files that claim gigabytes, devices, pipes, names that are no text."""
    version = systems.DEBIAN_KERNEL
    for path in (
        *("etc/fstab", "etc/shadow", "etc/issue", "etc/default/grub", "etc/machine-id", "etc/group", "sbin/init"),
        *(f"boot/config-{version}", f"boot/initrd.img-{version}", "usr/bin/growpart"),
    ):
        (tree / path).unlink()
    for path in ("etc/fstab", f"boot/config-{version}", f"boot/initrd.img-{version}", "etc/crypttab"):
        with (tree / path).open("wb") as file:
            file.truncate(GiB)
    (tree / "etc/shadow").symlink_to(outside)
    (tree / "etc/group").symlink_to("../" * 20 + str(outside).lstrip("/"))
    (tree / "etc/issue").symlink_to("issue")
    (tree / "usr/bin/growpart").symlink_to("/usr/bin/growpart/growpart")
    os.mkfifo(tree / "etc/default/grub")
    os.mkfifo(tree / "sbin/init")
    os.mknod(tree / "etc/machine-id", 0o20666, os.makedev(1, 5))  # /dev/zero
    os.mknod(tree / "etc/smartd.conf", 0o60666, os.makedev(7, 0))
    (tree / "etc/loop").symlink_to("/etc/loop/loop")
    (tree / "etc/netplan").symlink_to("../../../../../../../../etc")
    (tree / "etc/cron.d").symlink_to("/proc/self/root/etc")
    folder = os.fsencode(tree / "etc/modprobe.d")
    os.mkdir(folder)
    Path(os.fsdecode(folder + b"/\xff\xfe\x1b[31m.conf")).write_bytes(b"blacklist virtio_blk\nblacklist \xff\n")
    (tree / "etc/cloud/cloud.cfg").write_bytes(b"datasource_list: [ \xff\xfe ]\n" + b"x" * 200_000 + b"\n")


@needs_root
async def test_links_devices_and_giants_are_bounded_and_never_lead_out(tmp_path: Path) -> None:
    """Each is told, none is followed out, nothing of a giant is read: live, in an image, and alike in both."""
    tree = write_tree(systems.debian_files(), tmp_path / "tree")
    outside = tmp_path / "outside"
    outside.write_text("root:stolen:1:\n")
    make_hostile(tree, outside)
    disk = write_disk(tree, tmp_path / "disk.raw")
    live = await look(Wanted(place=str(disk), root=tree))
    image = await look(Wanted(place=str(disk)))
    assert told(live) == told(image)
    by_id = {(one.id, one.status): one for one in image}
    assert "larger than 4 MiB" in by_id["fs.fstab.foreign", "unknown"].message
    assert "larger than 4 MiB" in by_id["fs.crypttab", "unknown"].message
    assert "more than any real one" in by_id["drv.virtio.initramfs", "unknown"].message
    assert ("fs.shadow", "fail") in by_id, "a link out of the root leads nowhere"
    assert "stolen" not in repr((live, image))
    assert ("fs.critical", "unknown") in by_id
    blacklisted = by_id["drv.virtio.blacklist", "fail"]
    assert not blacklisted.is_command, "its name can't be written into a command"
    assert "?[31m" in str(blacklisted.evidence[0])


async def test_names_that_mean_something_to_a_shell_never_get_into_a_command() -> None:
    nasty = "$(reboot)'; rm -rf / #"
    view = changed(
        MadeView(systems.debian_files()),
        {
            "/etc/fstab": f"UUID={nasty.replace(' ', chr(92) + '040')} / ext4 rw 0 1\n/dev/sda1;reboot /boot xfs rw\n",
            f"/etc/modprobe.d/{nasty.replace('/', '')}.conf": "blacklist virtio_blk\n",
            "/etc/smartd.conf": "/dev/sda`reboot`\n",
            "/boot/grub/grub.cfg": grub_cfg(root="/dev/disk/by-id/`reboot`", arguments="resume=/dev/`reboot`"),
            "/var/lib/dpkg/status": systems.dpkg_status("open-vm-tools;reboot"),
        },
    )
    findings = await rules_on(view)
    commands = [one.remedy for one in findings if one.is_command]
    assert commands
    assert not [one for one in commands if "reboot" in one]


async def test_bytes_that_are_no_text_are_shown_and_harm_nothing() -> None:
    view = changed(
        MadeView(systems.debian_files()),
        {
            "/etc/fstab": b"UUID=\xff\xfe / ext4 rw 0 1\n\x1b[31m/dev/sda2 /srv ext4 rw 0 0\n",
            "/etc/os-release": b"ID=\xff\n",
        },
    )
    findings = await rules_on(view)
    assert any("\\xff\\xfe" in one.message for one in findings)


@pytest.mark.parametrize("seed", range(5))
async def test_no_content_of_any_file_breaks_a_rule(seed: int) -> None:
    """Every file that the rules read, filled with noise: answers come back, none of them an exception."""
    dice = random.Random(seed)
    files = [systems.debian_files, systems.rhel_files, systems.suse_files, systems.alpine_files, systems.arch_files][
        seed % 5
    ]()
    view = MadeView(files)
    await rules_on(view)
    read = [path for path in view.reads if path in files]
    words = [
        *("UUID=", "/dev/sda1", "linux", "menuentry", "{", "}", "'", '"', "\\", "root=", "[", "-", ":", "\n", "\n\n"),
        *("\t", " ", "datasource_list:", "Section", "Driver", "iface", "auto", "\0", "\xff", "=", "#", "set default"),
        *("${x}", "blacklist", "install", "APPEND", "Package: ", "9" * 40),
    ]
    for path in read:
        noise: Content = "".join(dice.choice(words) for _ in range(dice.randrange(60)))
        if dice.random() < 0.4:
            real = files[path]
            raw = bytearray(
                real.content if isinstance(real, Made) else real.encode() if isinstance(real, str) else real or b""
            )
            for _ in range(dice.randrange(1, 20)):
                if raw:
                    raw[dice.randrange(len(raw))] = dice.randrange(256)
            noise = bytes(raw[: dice.randrange(len(raw) + 1)])
        await rules_on(changed(MadeView(files), {path: noise}))
    for path in read:
        await rules_on(changed(MadeView(files), {path: link(path)}))


# -- real partition tables ---------------------------------------------------------------------------------------------


def partitioned(disk: Path) -> Path:
    """With a GPT of one partition."""
    need("sfdisk")
    run("sfdisk", "-q", disk, text="label: gpt\n,,L\n")
    return disk


def spoil_backup(disk: Path) -> None:
    """The last sector, where the backup header is, as after a disk has grown."""
    with disk.open("r+b") as file:
        file.truncate(disk.stat().st_size + MiB)


def spoil_both(disk: Path) -> None:
    """Both headers."""
    with disk.open("r+b") as file:
        for at in (512, disk.stat().st_size - 512):
            file.seek(at)
            file.write(bytes(512))


@pytest.mark.parametrize(
    "spoil, id, severity, said",
    [
        (None, "disk.table", "block", "uses GPT; tencent with BIOS boot accepts MBR only"),
        (spoil_backup, "disk.gpt.health", "warn", "the export writes a sound one"),
        (spoil_both, "disk.table", "block", "GPT"),
        (spoil_both, "disk.gpt.health", "block", "both GPT headers are damaged"),
    ],
)
async def test_tables_that_sfdisk_made_and_what_happens_to_them(
    tmp_path: Path, spoil: Callable[[Path], None] | None, id: str, severity: str, said: str
) -> None:
    disk = partitioned(blank(tmp_path / "disk.raw", 8 * MiB))
    findings = await look(Wanted(place=str(disk), format="raw"))
    health = [one for one in findings if one.id == "disk.gpt.health"]
    assert [one.status for one in health] == ["pass"]
    if spoil is not None:
        spoil(disk)
    findings = await look(Wanted(place=str(disk), format="raw"))
    found = [one for one in findings if one.id == id and one.status == "fail"]
    assert [(one.severity, said in one.message) for one in found[:1]] == [(severity, True)], found


@needs_root
async def test_a_disk_that_counts_in_4096_bytes_is_told(tmp_path: Path) -> None:
    """The table that sfdisk writes on a disk of such sectors, seen in an image of it."""
    need("losetup")
    disk = blank(tmp_path / "disk.raw", 16 * MiB)
    device = run("losetup", "--find", "--show", "--sector-size", "4096", disk).strip()
    try:
        partitioned(Path(device))
    finally:
        run("losetup", "-d", device)
    findings = await look(Wanted(place=str(disk), format="raw"), "generic")
    (found,) = [one for one in findings if one.id == "disk.sector"]
    assert found.blocks
    assert "sectors of 4096 bytes" in found.message


@needs_root
async def test_boot_code_that_is_gone_or_cut_off_is_told(good: tuple[Path, Path]) -> None:
    disk = good[1]
    for at, said in ((512, "second part is not where"), (0, "no boot code in the first sector")):
        with disk.open("r+b") as file:
            file.seek(at)
            file.write(bytes(440))
        found = [one for one in await look(Wanted(place=str(disk))) if one.id == "boot.loader" and one.blocks]
        assert [said in one.message for one in found] == [True], found
