"""A system on a disk: found, mounted together as its fstab says, and seen as the running system would see it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pipeline.errors import FormatError
from pipeline.units import MiB
from stages.disk.fstab import parse_fstab
from stages.disk.live import LiveView
from stages.disk.tree import View
from stages.disk.view import DiskView, open_system
from stages.disk.volumes import DiskVolumes, mapper_name, open_volumes
from stages.store.file import open_file_reader
from tests.disk.making import blank, need, needs_root, run
from tests.disk.test_lvm import attached, lvm, place
from tests.disk.truth import opened

ROOT_UUID = "11111111-2222-4333-8444-555555555555"
BOOT_UUID = "21111111-2222-4333-8444-555555555555"


@asynccontextmanager
async def volumes_of(image: Path) -> AsyncIterator[DiskVolumes]:
    async with open_file_reader(image) as reader:
        yield await open_volumes(reader)


def write(folder: Path, files: dict[str, str]) -> Path:
    """A tree of small files; "-> target" is a link."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            path.symlink_to(text[3:])
        else:
            path.write_text(text)
    return folder


def filesystem(path: Path, size: int, files: dict[str, str], *options: str) -> Path:
    """An ext filesystem with these files."""
    need("mke2fs")
    source = path.with_suffix(".tree")
    source.mkdir()
    run("mke2fs", "-q", "-F", "-d", write(source, files), *options, blank(path, size))
    shutil.rmtree(source)
    return path


def disk_of(path: Path, *parts: Path, label: str = "dos") -> Path:
    """A disk whose partitions have the contents of files."""
    need("sfdisk")
    begin, table, spans = MiB, f"label: {label}\n", []
    for part in parts:
        size = part.stat().st_size
        table += f"start={begin // 512}, size={size // 512}, type=L\n"
        spans.append((begin, part))
        begin += -(-size // MiB) * MiB
    blank(path, begin + MiB)
    run("sfdisk", "--no-reread", "--no-tell-kernel", "-q", path, text=table)
    with path.open("r+b") as file:
        for at, part in spans:
            file.seek(at)
            file.write(part.read_bytes())
    return path


UP = "-> ../etc/os-release"
SYSTEM = {"etc/os-release": "-> ../usr/lib/os-release", "usr/lib/os-release": "ID=test\n", "sbin/init": "elf"}


async def test_filesystems_are_mounted_as_fstab_says(tmp_path: Path) -> None:
    root = {
        **SYSTEM,
        "etc/fstab": f"# a comment\n"
        f"UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\n"
        f'UUID="{BOOT_UUID}"\t/boot ext2 defaults 0 2\n'
        "LABEL=homes /home ext4 defaults\n"
        "/dev/sda4 /home/da\\040ta ext4 nofail\n"
        "UUID=99999999-2222-4333-8444-555555555555 /gone ext4 defaults\n"
        "/dev/sdb1 /other ext4 defaults\n"
        "server:/share /net nfs defaults\n"
        "/dev/sda4 /not-now ext4 noauto\n"
        "tmpfs /tmp tmpfs defaults\n/dev/sda9 none swap sw\n/boot /bound none bind\n",
        "boot/hidden": "below the mount",
        "home/hidden": "below the mount",
        "to-boot": "-> /boot/grub/../vmlinuz",
        "tmp/x": "",
    }
    image = disk_of(
        tmp_path / "disk",
        filesystem(
            tmp_path / "1",
            4 * MiB,
            {"vmlinuz": "kernel", "grub/grub.cfg": "", "up": "-> ../etc/os-release"},
            "-U",
            BOOT_UUID,
        ),
        filesystem(tmp_path / "2", 8 * MiB, root, "-U", ROOT_UUID, "-t", "ext4"),
        filesystem(tmp_path / "3", 4 * MiB, {"alice/file": "hers", "da ta/x": ""}, "-L", "homes"),
        filesystem(tmp_path / "4", 4 * MiB, {"deep/file": "data"}),
    )
    async with volumes_of(image) as disk:
        view = await open_system(disk)
        assert [(one.path, one.volume.number) for one in view.mounts] == [
            ("/", 2),
            ("/boot", 1),
            ("/home", 3),
            ("/home/da ta", 4),
        ]
        assert [(one.entry.line, one.entry.path) for one in view.not_mounted] == [(6, "/gone"), (7, "/other")]
        assert view.problems == ()
        assert await view.read("/to-boot") == b"kernel"
        assert await view.resolve("/to-boot") == "/boot/vmlinuz"
        assert await view.read("/boot/up") == b"ID=test\n", "a link out of a filesystem leads into the system"
        assert await view.read("/home/alice/../../etc/../boot/vmlinuz") == b"kernel"
        assert await view.read("/home/da ta/deep/file") == b"data"
        with pytest.raises(FileNotFoundError, match="/boot/hidden"):
            await view.stat("/boot/hidden")
        assert (await view.space("/home")).total < 5 * MiB < (await view.space("/etc")).total
        assert [one.name for one in await view.list("/home/alice")] == ["file"]


async def test_the_root_that_the_boot_menu_names_is_taken(tmp_path: Path) -> None:
    for number, word in ((2, "first"), (3, "second")):
        files = {**SYSTEM, "etc/fstab": "", "etc/name": word}
        filesystem(tmp_path / str(number), 8 * MiB, files, "-U", f"{number}1111111-2222-4333-8444-555555555555")
    menu = "set root='hd0,msdos1'\nmenuentry 'x' {\n  linux /vmlinuz root=UUID=NUMBER ro\n}\n"
    menu = menu.replace("NUMBER", "31111111-2222-4333-8444-555555555555")
    filesystem(tmp_path / "1", 4 * MiB, {"grub/grub.cfg": menu})
    async with volumes_of(disk_of(tmp_path / "disk", *(tmp_path / name for name in "123"), label="gpt")) as disk:
        assert await (await open_system(disk)).read("/etc/name") == b"second"
    filesystem(
        tmp_path / "4",
        4 * MiB,
        {"grub/grub.cfg": menu.replace("UUID=31111111-2222-4333-8444-555555555555", "/dev/sda2")},
    )
    async with volumes_of(disk_of(tmp_path / "disk", *(tmp_path / name for name in "423"), label="gpt")) as disk:
        assert await (await open_system(disk)).read("/etc/name") == b"first"


async def test_a_damaged_filesystem_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    root = filesystem(tmp_path / "1", 8 * MiB, {**SYSTEM, "etc/fstab": "/dev/vda2 /data ext4\n"}, "-t", "ext4")
    data = filesystem(tmp_path / "2", 8 * MiB, {"x": "y"}, "-t", "ext4")
    with data.open("r+b") as file:
        file.seek(1024 + 200)
        file.write(b"\xff" * 20)
    async with volumes_of(disk_of(tmp_path / "disk", root, data)) as disk:
        damaged = disk.get("2")
        assert damaged is not None
        assert damaged.tree is None
        assert "checksum of the superblock" in damaged.problem
        view = await open_system(disk)
        assert await view.read("/etc/os-release") == b"ID=test\n"
        (missing,) = view.not_mounted
        assert "checksum of the superblock" in missing.reason


async def test_a_disk_without_a_system_says_what_it_has(tmp_path: Path) -> None:
    image = disk_of(tmp_path / "disk", filesystem(tmp_path / "1", 4 * MiB, {"file": "x"}), blank(tmp_path / "2", MiB))
    async with volumes_of(image) as disk:
        with pytest.raises(FormatError, match="root of a system") as caught:
            await open_system(disk)
    assert "partition 1 (ext2); partition 2 (what it holds is not known)" in caught.value.hint


async def test_a_filesystem_without_a_table_is_a_disk(tmp_path: Path) -> None:
    image = filesystem(tmp_path / "disk", 8 * MiB, {**SYSTEM, "etc/fstab": "/dev/vda / ext4\n"})
    async with volumes_of(image) as disk:
        assert [one.name for one in disk.volumes] == ["disk"]
        assert await (await open_system(disk)).read("/sbin/init") == b"elf"


@needs_root
async def test_a_system_on_logical_volumes_is_read(tmp_path: Path) -> None:
    need("lvcreate")
    pv = blank(tmp_path / "pv", 80 * MiB)
    with attached(pv) as devices:
        lvm(devices, "vgcreate", "vg-0", *devices)
        for name, count in (("root", 3), ("ho-me", 2), ("swap", 1)):
            lvm(devices, "lvcreate", "-an", "-Zn", "-Wn", "-n", name, "-l", str(count), "vg-0")
        lvm(devices, "lvextend", "-l", "+2", "vg-0/root")
    table = "/dev/mapper/vg--0-root / ext4\n/dev/vg-0/ho-me /home ext4\nUUID=" + BOOT_UUID + " /boot ext2\n"
    root = {**SYSTEM, "etc/fstab": table, "large": "x" * 9 * MiB}
    place(pv, [0, 1, 2, 6, 7], filesystem(tmp_path / "root", 20 * MiB, root, "-t", "ext4"))
    place(pv, [3, 4], filesystem(tmp_path / "home", 8 * MiB, {"bob": "here"}))
    boot = filesystem(tmp_path / "boot", 4 * MiB, {"vmlinuz": "kernel"}, "-U", BOOT_UUID)
    async with volumes_of(disk_of(tmp_path / "disk", boot, pv)) as disk:
        assert [one.name for one in disk.volumes] == ["1", "2", "vg--0-root", "vg--0-ho--me", "vg--0-swap"]
        view = await open_system(disk)
        assert [one.path for one in view.mounts] == ["/", "/home", "/boot"]
        assert await view.read("/home/bob") == b"here"
        assert await view.read("/large", limit=10 * MiB) == b"x" * 9 * MiB
        assert disk.get("vg-0/root") is disk.volumes[2]
    assert mapper_name("a-b", "c") == "a--b-c"


async def _answer(view: View, call: str, path: str) -> object:
    """What a view says, or the error's number."""
    try:
        if call == "stat" or call == "lstat":
            node = await view.stat(path, follow=call == "stat")
            return (node.kind, node.mode, node.uid, node.size if node.kind.value != "directory" else 0)
        if call == "list":
            return {(one.name, one.kind) for one in await view.list(path) if one.name != "lost+found"}
        if call == "read":
            return await view.read(path)
        return await (view.target(path) if call == "target" else view.resolve(path))
    except OSError as error:
        return error.errno


async def test_live_and_on_a_disk_every_path_means_the_same(tmp_path: Path) -> None:
    """Thousands of paths over a tree full of links, good and hostile: the same answer, or the same errno."""
    need("mke2fs")
    dice = random.Random(7)
    tree = tmp_path / "tree"
    names = ["a", "b", "c", "d", "file", "link", "up", "loop", "none"]
    plain = "/a b ../c / . .. ../../../.. /loop none file /a/b/file a/ file/ //c/./d//"
    targets = [*plain.split(), "x/" * 50, "/" + "n" * 255, "n" * 256]
    folders = [tree]
    for _ in range(40):
        folder = dice.choice(folders) / dice.choice(names[:4])
        if not folder.exists() and not folder.is_symlink():
            folder.mkdir(parents=True)
            folders.append(folder)
        file = dice.choice(folders) / dice.choice(names)
        if not file.exists() and not file.is_symlink():
            if dice.random() < 0.6:
                file.symlink_to(dice.choice(targets))
            else:
                file.write_text(str(file))
                file.chmod(dice.choice([0o600, 0o755, 0o4711]))
    os.mkfifo(tree / "pipe")
    image = blank(tmp_path / "image", 8 * MiB)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, image)
    words = [*names, "..", "..", ".", "", "pipe", "lost", "n" * 256]
    async with opened(image) as opened_tree:
        live, disk = LiveView(tree), DiskView(opened_tree)
        seen = set()
        for _ in range(3000):
            path = "/" + "/".join(dice.choices(words, k=dice.randrange(0, 7)))
            call = dice.choice(["stat", "lstat", "list", "read", "target", "resolve"])
            truth = await _answer(live, call, path)
            assert await _answer(disk, call, path) == truth, (call, path)
            seen.add(type(truth) if not isinstance(truth, int) else truth)
    assert len(seen) > 6, "many kinds of answers"


def test_fstab_is_read_as_mount_reads_it() -> None:
    text = "\n# c\nUUID=x  /a\\040b\text4 ro,subvol=/@home,,x 0 0\n/dev/sda1 /\nhalf\n   #x y\n"
    (one, two) = parse_fstab(text)
    assert (one.line, one.spec, one.path, one.kind, one.options) == (
        3,
        "UUID=x",
        "/a b",
        "ext4",
        ("ro", "subvol=/@home", "x"),
    )
    assert (one.option("subvol"), one.option("ro"), one.option("rw")) == ("/@home", "", None)
    assert (two.kind, two.options) == ("auto", ("defaults",))
