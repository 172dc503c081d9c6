"""Exports of a part of a disk: used blocks, cuts, and disks that change meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.commands.run import change_lines
from pipeline.config.continuing import Attempt, Mode
from pipeline.errors import KeptError, PlanError, SourceError
from pipeline.events import Event, RunPlanned, RunResumed
from pipeline.flow import resume
from pipeline.flow.engine import Outcome
from pipeline.flow.items import Block
from pipeline.units import KiB, MiB
from stages.read.disk import DiskReader
from stages.write import ranges
from tests.chains import export, write_toml
from tests.disk.making import blank, fill, hashes, mounted, need, needs_root, partclone_blocks, run
from tests.disk.test_mapping import extract, insert
from tests.disks.mounts import loop_device

FIRST, SECOND, SWAP = MiB, 65 * MiB, 193 * MiB
SIZE = 240 * MiB


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT disk: ext4 with deleted files, xfs, swap that holds something, and an empty tail."""
    need("sgdisk", "mke2fs", "mkswap", "e2fsck")
    if os.geteuid() != 0:
        pytest.skip("mounting a filesystem needs root")
    folder = tmp_path_factory.mktemp("prepared")
    image = blank(folder / "disk", SIZE)
    run(
        "sgdisk",
        *("-n", "1:1M:+64M", "-n", "2:65M:+128M", "-n", "3:193M:+16M", "-t", "3:8200", image),
    )
    part = folder / "part"
    for offset, size, options in ((FIRST, 64 * MiB, "-L boot"), (SECOND, 128 * MiB, "-L root")):
        run("mke2fs", "-q", "-t", "ext4", *options.split(), "-F", blank(part, size))
        with mounted(part) as mount:
            fill(mount, seed=offset)
        insert(image, offset, part)
    run("mkswap", blank(part, 16 * MiB))
    insert(image, SWAP, part)
    with image.open("r+b") as file:
        file.seek(SWAP + 64 * KiB)
        file.write(b"swapped out" * 1000)
        file.write(b"\xeb\x63boot code")
    part.unlink()
    return image


@pytest.fixture
def disk(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    run("cp", "--sparse=always", prepared, tmp_path / "disk")
    return tmp_path / "disk"


async def exported(
    disk: Path,
    options: str = "",
    *,
    encoder: str = "encode.raw",
    folder: Path | None = None,
    events: list[Event] | None = None,
    attempt: Attempt | None = None,
) -> tuple[Outcome, Path]:
    """Export a disk into `folder`, by default beside it."""
    folder = folder or disk.parent
    image = folder / "image"
    toml = write_toml(
        folder / "export.toml",
        f'read.disk; path = "{disk}"; {options}',
        "checksum.guest",
        "sparse.zeros",
        encoder,
        f'write.file; path = "{image}"; overwrite = true',
        "verify.readback",
    )
    outcome = await export(toml, events=events, attempt=attempt)
    assert outcome.state == "identical"
    return outcome, image


def content(disk: Path, offset: int, length: int) -> dict[str, str]:
    """The files of a partition, after its own checker found it clean."""
    part = extract(disk, offset, length, disk.with_name("part"))
    run("e2fsck", "-fn", part)
    with mounted(part, "loop,ro") as folder:
        return hashes(folder)


async def test_used_blocks_make_the_same_filesystems_from_less(disk: Path) -> None:
    wanted = [content(disk, FIRST, 64 * MiB), content(disk, SECOND, 128 * MiB)]
    outcome, image = await exported(disk)
    assert [content(image, FIRST, 64 * MiB), content(image, SECOND, 128 * MiB)] == wanted
    assert "No problems found" in run("sgdisk", "-v", image)
    data = image.read_bytes()
    assert b"swapped out" not in data
    assert data[: 440 + 6] == disk.open("rb").read(446)
    facts = outcome.manifest.facts
    assert facts["blocks"]["map"] == outcome.manifest.disk.identity["map"]
    assert facts["blocks"]["taken_bytes"] < 40 * MiB
    told = facts["partitions"]["partitions"]
    assert [(one["number"], one["start"], one["filesystem"], one["label"]) for one in told] == [
        (1, FIRST, "ext4", "boot"),
        (2, SECOND, "ext4", "root"),
        (3, SWAP, "swap", ""),
    ]
    totals = outcome.manifest.disk.totals
    assert totals["swap"] == 16 * MiB - 4 * KiB
    assert totals["free"] > 10 * MiB


async def test_free_blocks_are_not_even_read(disk: Path) -> None:
    """Gaps too small to leave out are read with their neighbours; nothing else is."""
    with loop_device(disk) as device:
        before = _sectors_read(device)
        outcome, _ = await exported(device, folder=disk.parent)
        read = (_sectors_read(device) - before) * 512
        assert read < outcome.manifest.facts["blocks"]["taken_bytes"] * 1.1 + 4 * MiB


def _sectors_read(device: Path) -> int:
    return int(Path(f"/sys/block/{device.name}/stat").read_text().split()[2])


async def test_all_blocks_make_an_exact_copy(disk: Path) -> None:
    outcome, image = await exported(disk, 'blocks = "all"')
    run("cmp", disk, image)
    assert outcome.manifest.facts["partitions"]["partitions"][0]["number"] == 1
    assert "map" not in outcome.manifest.disk.identity


@pytest.mark.parametrize("encoder", ["encode.raw", 'encode.qcow2; compression = "none"', "encode.vhd"])
async def test_a_cut_has_a_table_that_fits(disk: Path, encoder: str) -> None:
    need("qemu-img")
    wanted = content(disk, FIRST, 64 * MiB)
    before = disk.read_bytes()[: 2 * MiB]
    outcome, image = await exported(disk, "partitions = [1]", encoder=encoder)
    assert disk.read_bytes()[: 2 * MiB] == before
    raw = disk.with_name("raw")
    run("qemu-img", "convert", "-O", "raw", image, raw)
    assert outcome.disk_size == 66 * MiB
    assert "No problems found" in run("sgdisk", "-v", raw)
    assert content(raw, FIRST, 64 * MiB) == wanted
    facts = outcome.manifest.facts["partitions"]["partitions"]
    assert [one["taken"] for one in facts] == [True, False, False]


async def test_a_partition_dropped_from_the_middle_reads_as_zero(disk: Path) -> None:
    outcome, image = await exported(disk, 'partitions = [1, 3]; blocks = "all"')
    assert outcome.disk_size == 210 * MiB
    data = image.read_bytes()
    assert not any(data[SECOND:SWAP])
    assert data[SWAP : SWAP + MiB] == disk.read_bytes()[SWAP : SWAP + MiB]
    assert "No problems found" in run("sgdisk", "-v", image)
    assert outcome.manifest.disk.totals["free"] == 128 * MiB


async def test_bytes_and_through_say_the_same(disk: Path) -> None:
    outcome, image = await exported(disk, "through = 2")
    data = image.read_bytes()
    again, other = await exported(disk, f"bytes = {193 * MiB}")
    assert other.read_bytes() == data
    assert again.disk_size == outcome.disk_size


@contextmanager
def mounted_partition(disk: Path, options: str = "rw") -> Iterator[Path]:
    folder = disk.with_name("mnt")
    folder.mkdir()
    run("mount", "-o", f"loop,offset={FIRST},{options}", disk, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


async def test_a_mounted_filesystem_is_copied_whole_and_the_others_not(disk: Path) -> None:
    events: list[Event] = []
    with mounted_partition(disk) as folder:
        outcome, image = await exported(disk, events=events)
        told = outcome.manifest.facts["partitions"]["partitions"]
        assert told[0]["why"] == f"it is mounted read-write at {folder}"
        assert told[0]["copied"] == 64 * MiB
        assert told[1]["copied"] < 64 * MiB
        [planned] = [event for event in events if isinstance(event, RunPlanned)]
        assert planned.notes[0].startswith(f"mounted read-write at {folder}: copied whole")
    assert image.exists()


async def test_a_filesystem_mounted_read_only_holds_still(disk: Path) -> None:
    with mounted_partition(disk, "ro"):
        outcome, _ = await exported(disk)
    assert outcome.manifest.facts["partitions"]["partitions"][0]["copied"] < 64 * MiB


async def test_a_filesystem_that_was_written_meanwhile_makes_no_image(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DiskReader.conclude

    async def written(self: DiskReader) -> None:
        with mounted_partition(disk) as folder:
            (folder / "new").write_bytes(b"n" * MiB)
        await real(self)

    monkeypatch.setattr(DiskReader, "conclude", written)
    with pytest.raises(SourceError, match="written to while its used blocks"):
        await exported(disk)
    assert not disk.with_name("image").exists()


async def test_a_file_that_is_written_meanwhile_is_told_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"a" * MiB)
    real = DiskReader.conclude

    async def written(self: DiskReader) -> None:
        with disk.open("r+b") as file:
            file.write(b"b")
        os.utime(disk, ns=(0, 0))  # the clock of files may stand for a few milliseconds
        await real(self)

    monkeypatch.setattr(DiskReader, "conclude", written)
    outcome, _ = await exported(disk)
    told = outcome.manifest.facts["consistency"]
    assert (told["achieved"], told["changing"]) == ("live", [str(disk)])
    assert "was written to while it was read" in change_lines(outcome.manifest.facts)[0]
    disk.with_name("image").unlink()
    os.utime(disk)
    with pytest.raises(SourceError, match="was written to while it was read"):
        await exported(disk, 'consistency = "offline"')
    assert not disk.with_name("image").exists()


async def test_a_cut_through_a_filesystem_without_a_table_is_refused(tmp_path: Path) -> None:
    need("mke2fs")
    disk = blank(tmp_path / "disk", 20 * MiB)
    run("mke2fs", "-q", "-F", "-t", "ext4", disk, "16M")
    with pytest.raises(PlanError, match="the cut at byte 10485760 goes through the ext4 that fills the disk"):
        await exported(disk, 'bytes = "10 MiB"')
    outcome, _ = await exported(disk, 'bytes = "16 MiB"')
    assert outcome.disk_size == 16 * MiB


@needs_root
async def test_large_sectors_with_a_table_are_explained(tmp_path: Path) -> None:
    need("sgdisk")
    image = blank(tmp_path / "disk", 64 * MiB)
    with loop_device(image, sector=4096, read_only=False) as device:
        run("sgdisk", "-n", "1:1M:+8M", device)
        with pytest.raises(PlanError, match="sectors of 4096 bytes") as caught:
            await exported(device, folder=tmp_path)
        assert 'blocks = "all"' in caught.value.hint
        await exported(device, 'blocks = "all"', folder=tmp_path)
        run("cmp", device, tmp_path / "image")


async def test_contradicting_choices_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    from pipeline.errors import ConfigError

    with pytest.raises(ConfigError, match="contradict"):
        await exported(tmp_path / "absent", "through = 1; partitions = [1]")


MAKERS = {
    "ext2": (("mke2fs", "-q", "-t", "ext2", "-F"), 64 * MiB, ("e2fsck", "-fn")),
    "ext4": (
        ("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-O", "bigalloc,^has_journal", "-F"),
        64 * MiB,
        ("e2fsck", "-fn"),
    ),
    "xfs": (("mkfs.xfs", "-q", "-f"), 320 * MiB, ("xfs_repair", "-n")),
    "btrfs": (("mkfs.btrfs", "-q", "-f"), 200 * MiB, ("btrfs", "check", "--check-data-csum")),
}


@needs_root
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("encoder", ["encode.raw", 'encode.qcow2; compression = "zlib"'])
async def test_an_image_of_the_used_blocks_is_clean_and_has_the_same_files(
    kind: str, encoder: str, tmp_path: Path
) -> None:
    """By the filesystem's own checker and the kernel; and as few blocks as partclone finds in use."""
    command, size, checker = MAKERS[kind]
    need(command[0], checker[0], "qemu-img", "partclone.extfs")
    disk = blank(tmp_path / "disk", size)
    run(*command, disk)
    with mounted(disk) as folder:
        fill(folder)
        wanted = hashes(folder)
    outcome, image = await exported(disk, encoder=encoder)
    facts = outcome.manifest.facts["blocks"]
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "-O", "raw", image, raw)
    run(*checker, raw)
    if kind == "ext2":
        unit = 4096 if size > 512 * MiB else 1024  # mke2fs.conf(5), "small"
        assert abs(facts["taken_bytes"] - partclone_blocks("extfs", disk) * unit) <= 4096  # and the boot block
    disk.unlink()
    with mounted(raw, "loop,ro") as folder:
        assert hashes(folder) == wanted
    assert outcome.manifest.disk.totals["free"] > size // 4


async def test_a_fat_of_the_used_blocks_is_clean_and_has_the_same_files(tmp_path: Path) -> None:
    need("mkfs.fat", "mcopy", "fsck.fat")
    disk = blank(tmp_path / "disk", 64 * MiB)
    run("mkfs.fat", "-F", "32", disk)
    for number in range(12):
        source = tmp_path / f"file{number}"
        source.write_bytes(os.urandom(300 * KiB + number))
        run("mcopy", "-i", disk, source, "::")
    for number in range(0, 12, 3):
        run("mdel", "-i", disk, f"::file{number}")
    outcome, image = await exported(disk)
    run("fsck.fat", "-n", image)
    for number in range(12):
        if number % 3:
            run("mcopy", "-o", "-i", image, f"::file{number}", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == (tmp_path / f"file{number}").read_bytes()
    assert outcome.manifest.disk.totals["free"] > 50 * MiB


@pytest.mark.parametrize("changes", [False, True])
async def test_a_resumed_run_goes_on_only_with_the_map_of_the_run_before(
    disk: Path, monkeypatch: pytest.MonkeyPatch, changes: bool
) -> None:
    """Where files were written between the two, what was sent is of another moment, and is not built on."""
    monkeypatch.setattr(resume, "POINT_EVERY_S", 0.0)
    monkeypatch.setattr(ranges, "_MARK_EVERY_S", 0.001)
    monkeypatch.setattr(ranges, "_MARK_SHARE", 0)
    real = DiskReader.load

    def failing(self: DiskReader, block: Block, buffer: memoryview) -> None:
        if block.offset >= 80 * MiB:
            raise SourceError("the cable is out", operation="read")
        real(self, block, buffer)

    async def go(mode: Mode, events: list[Event] | None = None) -> None:
        attempt = Attempt(mode=mode, command="pipeline run x.toml")
        await exported(disk, encoder="encode.qcow2", attempt=attempt, events=events)

    monkeypatch.setattr(DiskReader, "load", failing)
    with pytest.raises(KeptError):
        await go(Mode.NEW)
    monkeypatch.setattr(DiskReader, "load", real)
    if changes:
        with mounted_partition(disk) as folder:
            (folder / "new").write_bytes(b"n" * MiB)
        with pytest.raises(PlanError, match="the disk changed since it was sent"):
            await go(Mode.RESUME)
        return
    events: list[Event] = []
    await go(Mode.RESUME, events)
    [resumed] = [event for event in events if isinstance(event, RunResumed)]
    assert resumed.guest_bytes > MiB
    assert content(_raw(disk.with_name("image")), SECOND, 128 * MiB) == content(disk, SECOND, 128 * MiB)


def _raw(image: Path) -> Path:
    run("qemu-img", "convert", "-O", "raw", image, image.with_name("raw"))
    return image.with_name("raw")
