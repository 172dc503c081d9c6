"""Files of btrfs, held against what the kernel says about the same filesystem."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.errors import FormatError
from pipeline.units import KiB, MiB
from stages.disk.files.lzo import unpack_lzo
from stages.disk.tree import HasSubvolumes
from stages.disk.view import open_system
from tests.disk.making import blank, mounted, need, needs_root, run
from tests.disk.test_view import disk_of, volumes_of, write
from tests.disk.truth import difference, opened, populate, seen_by_kernel, seen_by_us

FORMS = {
    "plain": ("", "loop"),
    "zlib": ("", "loop,compress-force=zlib"),
    "lzo": ("", "loop,compress-force=lzo"),
    "zstd": ("", "loop,compress-force=zstd:3"),
    "everything twice": ("-m dup -d dup", "loop"),
    "everything once": ("-m single -d single", "loop"),
    "small nodes": ("-n 4096", "loop,compress-force=zstd"),
    "large nodes": ("-n 65536", "loop,max_inline=0"),
    "mixed groups and holes as items": ("-M -O ^no-holes", "loop,compress=lzo"),
    "xxhash": ("--csum xxhash", "loop,nodatacow"),
    "sha256": ("--csum sha256", "loop,nodatasum"),
}


def words(folder: Path) -> None:
    """Files that compress, of sizes that are inline, of a sector, and of many extents; some partly overwritten."""
    dice = random.Random(5)
    folder.mkdir()
    vocabulary = [dice.randbytes(dice.randrange(2, 9)) for _ in range(300)]
    for size in (10, 600, 2000, 4096, 5000, 128 * KiB, 128 * KiB + 1, 700 * KiB, 2 * MiB):
        data = b"".join(dice.choices(vocabulary, k=size // 3))[:size].ljust(size, b"\0")
        (folder / f"words{size}").write_bytes(data)
        (folder / f"run{size}").write_bytes(b"ab" * (size // 2))
        (folder / f"zeros{size}").write_bytes(bytes(size))
    run("sync", "-f", folder)
    with (folder / "words2097152").open("r+b") as file:
        for place in (5000, 300_000, 1_000_001):
            file.seek(place)
            file.write(dice.randbytes(9000))
        file.truncate(2 * MiB - 777)
    run("sync", "-f", folder)


@needs_root
@pytest.mark.parametrize("form", FORMS)
async def test_every_name_attribute_and_byte_is_what_the_kernel_says(form: str, tmp_path: Path) -> None:
    need("mkfs.btrfs", "chattr")
    options, mount = FORMS[form]
    image = blank(tmp_path / "image", 400 * MiB)
    run("mkfs.btrfs", "-q", "-f", "-L", "a label", *options.split(), image)
    with mounted(image, mount) as folder:
        populate(folder)
        words(folder / "words")
    with mounted(image, "loop,ro") as folder:
        truth = await seen_by_kernel(folder)
    async with opened(image) as tree:
        assert difference(await seen_by_us(tree), truth) == []
        assert (tree.label, tree.dirty, tree.kind) == ("a label", None, "btrfs")
        assert tree.uuid == run("blkid", "-p", "-o", "value", "-s", "UUID", image).strip()
        space = await tree.space()
    assert 0 < space.free < space.total == 400 * MiB


SYSTEM = {"etc/os-release": "ID=test\n", "sbin/init": "elf"}


@needs_root
async def test_subvolumes_are_folders_and_are_mounted_by_their_options(tmp_path: Path) -> None:
    need("mkfs.btrfs", "btrfs")
    image = blank(tmp_path / "image", 200 * MiB)
    run("mkfs.btrfs", "-q", "-f", "-U", "31111111-2222-4333-8444-555555555555", image)
    with mounted(image) as folder:
        for name in ("@", "@home", "@/var", "other"):
            run("btrfs", "subvolume", "create", folder / name)
        (folder / "other" / "in" / "side").mkdir(parents=True)
        run("btrfs", "subvolume", "create", folder / "other" / "in" / "side" / "deep")
        table = "UUID=31111111-2222-4333-8444-555555555555 / btrfs subvol=/@ 0 0\n"
        table += "UUID=31111111-2222-4333-8444-555555555555 /home btrfs subvol=@home,compress=zstd 0 0\n"
        number = run("btrfs", "inspect-internal", "rootid", folder / "other").strip()
        table += f"UUID=31111111-2222-4333-8444-555555555555 /other btrfs subvolid={number} 0 0\n"
        table += "UUID=31111111-2222-4333-8444-555555555555 /none btrfs subvol=@none 0 0\n"
        write(folder / "@", {**SYSTEM, "etc/fstab": table, "home/hidden": "", "var/log": "a log"})
        write(folder / "@home", {"alice/file": "hers"})
        write(folder / "other", {"in/side/deep/file": "deep"})
        run("btrfs", "subvolume", "snapshot", "-r", folder / "@", folder / "snapshot")
    with mounted(image, "loop,ro") as folder:
        truth = await seen_by_kernel(folder)
    async with opened(image) as tree:
        ours = await seen_by_us(tree)
        stub = "snapshot/var"
        assert (ours.pop(stub).mode, truth.pop(stub).mode) == (0o755, 0o755), "of when it was looked at"
        assert difference(ours, truth) == []
        assert isinstance(tree, HasSubvolumes)
        paths = {one.path for one in await tree.subvolumes()}
        assert paths == {"", "@", "@home", "@/var", "other", "other/in/side/deep", "snapshot"}
    async with volumes_of(disk_of(tmp_path / "disk", image)) as disk:
        view = await open_system(disk)
        assert [one.path for one in view.mounts] == ["/", "/home", "/other"]
        assert [one.reason for one in view.not_mounted] == ["it has no subvolume @none"]
        assert await view.read("/home/alice/file") == b"hers"
        assert await view.read("/other/in/side/deep/file") == b"deep"
        assert await view.read("/var/log") == b"a log"
    with mounted(image) as folder:
        run("btrfs", "subvolume", "set-default", folder / "@home")
    async with opened(image) as tree:
        assert [one.name for one in await tree.entries(tree.root)] == ["alice"]


@needs_root
async def test_a_damaged_copy_of_a_tree_block_is_replaced_by_the_other(tmp_path: Path) -> None:
    need("mkfs.btrfs", "btrfs")
    image = blank(tmp_path / "image", 300 * MiB)
    run("mkfs.btrfs", "-q", "-f", "-m", "dup", image)
    with mounted(image) as folder:
        for number in range(2000):
            (folder / f"a file with a name of some length {number}").write_text("x")
    said = run("btrfs", "inspect-internal", "dump-tree", "-t", "5", image)
    leaf = next(one for one in said.split("\nleaf ")[3:] if one.count("DIR_INDEX") > 20)
    logical = leaf.split()[0]
    copies = run("btrfs-map-logical", "-l", logical, image)
    places = [int(line.split("physical ")[1].split()[0]) for line in copies.splitlines() if "physical" in line]
    assert len(places) == 2
    for damaged in (places[:1], places):
        with image.open("r+b") as file:
            for place in damaged:
                file.seek(place + 200)
                file.write(b"\xff" * 64)
        async with opened(image) as tree:
            if len(damaged) == 1:
                assert len(await tree.entries(tree.root)) == 2000
            else:
                with pytest.raises(FormatError, match="checksum of a tree block"):
                    await tree.entries(tree.root)


def test_lzo_that_is_none_is_refused() -> None:
    dice = random.Random(9)
    for _ in range(3000):
        data = dice.randbytes(dice.randrange(0, 60))
        try:
            assert len(unpack_lzo(data, 4096)) <= 4096
        except FormatError:
            pass
    assert unpack_lzo(b"\x14abc\x11\x00\x00", 3) == b"abc"
    with pytest.raises(FormatError):
        unpack_lzo(b"\x14abc\x11\x00\x00", 2)
