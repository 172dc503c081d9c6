"""Disks in use: refused, frozen, or copied as they change and told so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from pipeline.errors import LeftBehindError, PlanError, SourceError
from pipeline.flow.items import Block
from pipeline.units import MiB
from stages.disk import watchdog
from stages.disk.freezing import Freeze
from stages.disk.occupancy import uses_of
from tests.chains import export, write_toml
from tests.disk.making import blank, fill, hashes, need, needs_root, run
from tests.disks.mounts import loop_device, mounted
from tests.read.test_selection import exported

pytestmark = needs_root

MAKE = {
    "ext4": (("mke2fs", "-q", "-t", "ext4", "-F"), 96 * MiB),
    "xfs": (("mkfs.xfs", "-q", "-f"), 320 * MiB),
    "btrfs": (("mkfs.btrfs", "-q", "-f"), 256 * MiB),
}

WRITER = """
import os, sys, random
os.chdir(sys.argv[1])
dice = random.Random(1)
print("begun", flush=True)
number = 0
while True:
    number += 1
    name = f"written{number % 40}"
    with open(name, "wb") as file:
        file.write(dice.randbytes(dice.choice([10, 5000, 200000])))
        if number % 5 == 0:
            os.fsync(file.fileno())
    if number % 3 == 0:
        os.unlink(name)
"""


@contextmanager
def device_of(kind: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """A loop device with a filesystem that is mounted and filled."""
    command, size = MAKE[kind]
    need(command[0])
    image = blank(folder / "disk", size)
    run(*command, image)
    with loop_device(image, read_only=False) as device, mounted(folder / "mnt", kind, device) as mount:
        fill(mount)
        try:
            yield device, mount
        finally:
            _thaw(mount)


def _thaw(mount: Path) -> None:
    """Whatever a failed test left."""
    import os

    folder = os.open(mount, os.O_RDONLY)
    watchdog.thaw(folder)
    os.close(folder)


@contextmanager
def write_load(mount: Path) -> Iterator[None]:
    """A process that writes and deletes files."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(mount)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"begun\n"
    try:
        yield
        assert writer.poll() is None, "it wrote all the time"
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()


def check(kind: str, image: Path) -> None:
    """The filesystem's own checker; xfs wants its log replayed first, by a mount."""
    if kind == "ext4":
        run("e2fsck", "-fn", image)
    elif kind == "btrfs":
        run("btrfs", "check", "--check-data-csum", image)
    else:
        run("xfs_repair", "-n", image)


@pytest.mark.parametrize("kind", MAKE)
async def test_frozen_under_write_load_the_image_is_the_frozen_moment(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[dict[str, str]] = []
    begin = Freeze.begin

    async def and_look(points: Sequence[str], *, timeout_s: float) -> Freeze:
        made = await begin(points, timeout_s=timeout_s)
        frozen.append(hashes(Path(points[0])))
        return made

    monkeypatch.setattr(Freeze, "begin", and_look)
    with device_of(kind, tmp_path) as (device, mount):
        with write_load(mount):
            outcome, image = await exported(device, 'consistency = "freeze"', folder=tmp_path)
        told = outcome.manifest.facts["consistency"]
        assert (told["achieved"], told["frozen"]) == ("frozen", [str(mount)])
        run("touch", mount / "thawed")
        taken = outcome.manifest.facts["blocks"]["taken_bytes"]
        assert taken < outcome.disk_size * 3 // 4, "free blocks were left out"
    (tmp_path / "disk").unlink()  # two filesystems with one UUID can't be mounted
    if kind != "xfs":
        check(kind, image)
    with mounted(tmp_path / "copy", kind, image, "loop,nouuid" if kind == "xfs" else "loop") as copy:
        assert hashes(copy) == frozen[0]
    check(kind, image)


async def test_a_disk_that_is_mounted_read_write_is_refused_when_it_should_be_offline(tmp_path: Path) -> None:
    with device_of("ext4", tmp_path) as (device, mount):
        with pytest.raises(PlanError, match=f"the disk is in use: {mount}"):
            await exported(device, 'consistency = "offline"', folder=tmp_path)
        run("mount", "-o", "remount,ro", mount)
        outcome, _ = await exported(device, 'consistency = "offline"', folder=tmp_path)
        assert outcome.manifest.facts["consistency"]["achieved"] == "offline"


@pytest.mark.parametrize("what", ["device", "file"])
async def test_what_is_written_to_a_live_disk_is_counted(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.read.disk import DiskReader

    real = DiskReader.conclude

    async def written(self: DiskReader) -> None:
        (tmp_path / "mnt" / "new").write_bytes(b"n" * MiB)
        run("sync", "-f", tmp_path / "mnt")
        await real(self)

    with device_of("ext4", tmp_path) as (device, mount):
        run("sync", "-f", mount)
        monkeypatch.setattr(DiskReader, "conclude", written)
        outcome, _ = await exported(device if what == "device" else tmp_path / "disk", folder=tmp_path)
        told = outcome.manifest.facts["consistency"]
        assert (told["asked"], told["achieved"], told["changing"]) == ("live", "settled", [str(mount)])
        assert (told["rereads"], told["resent_bytes"]) == (1, 0), "it was written after the last look"
        assert MiB <= told["written_bytes"] < 8 * MiB


async def test_a_filesystem_that_this_run_writes_to_is_never_frozen(tmp_path: Path) -> None:
    with device_of("ext4", tmp_path) as (device, mount):
        (mount / "out").mkdir()
        with pytest.raises(PlanError, match="this run itself writes to"):
            await exported(device, 'consistency = "freeze"', folder=mount / "out")
        with (mount / "log").open("w"), pytest.raises(PlanError, match=f"writes to {mount}/log"):
            await exported(device, 'consistency = "freeze"', folder=tmp_path)
        inner = blank(mount / "inner", 16 * MiB)
        run("mke2fs", "-q", "-t", "ext4", "-F", inner)
        with (
            loop_device(inner, read_only=False) as second,
            mounted(tmp_path / "inside", "ext4", second) as inside,
            pytest.raises(PlanError, match="this run itself writes to"),
        ):
            await exported(device, 'consistency = "freeze"', folder=inside)
        run("touch", mount / "not frozen")


async def test_a_plan_freezes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.config.parse import load_config
    from pipeline.config.planning import plan_run
    from pipeline.config.wiring import wire
    from pipeline.events import EventStream
    from stages.catalog import CATALOG

    async def never(points: Sequence[str], *, timeout_s: float) -> Freeze:
        raise AssertionError("frozen")

    monkeypatch.setattr(Freeze, "begin", never)
    with device_of("ext4", tmp_path) as (device, mount):
        toml = write_toml(
            tmp_path / "x.toml",
            f'read.disk; path = "{device}"; consistency = "freeze"',
            "encode.raw",
            f'write.file; path = "{tmp_path / "out"}"',
        )
        config = load_config(toml, CATALOG, ())
        async with plan_run(config, wire(config), EventStream(), is_rehearsal=True) as plan:
            assert plan.notes == (f"will be frozen: {mount}",)


async def test_a_freeze_that_lasts_too_long_is_thawed_and_fails_the_run(tmp_path: Path) -> None:
    with device_of("ext4", tmp_path) as (_, mount):
        freeze = await Freeze.begin([str(mount)], timeout_s=1)
        assert freeze.is_held
        with anyio.fail_after(20):
            await anyio.run_process(["touch", str(mount / "after")])
        assert not await freeze.end()
        assert not await freeze.end()


async def test_a_watchdog_that_is_killed_leaves_nothing_frozen_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with device_of("ext4", tmp_path) as (device, mount):
        begin = Freeze.begin

        async def and_kill(points: Sequence[str], *, timeout_s: float) -> Freeze:
            made = await begin(points, timeout_s=timeout_s)
            made._process.kill()
            await made._process.wait()
            return made

        monkeypatch.setattr(Freeze, "begin", and_kill)
        with pytest.raises(SourceError, match="thawed before everything was read"):
            await exported(device, 'consistency = "freeze"', folder=tmp_path)
        with anyio.fail_after(20):
            await anyio.run_process(["touch", str(mount / "after")])
    assert not (tmp_path / "image").exists()


async def test_killed_with_a_frozen_disk_it_thaws_at_once(tmp_path: Path) -> None:
    """kill -9 of the process that asked for the freeze."""
    code = (
        "import anyio, sys\n"
        "from stages.disk.freezing import Freeze\n"
        "async def hold():\n"
        "    await Freeze.begin([sys.argv[1]], timeout_s=300)\n"
        "    print('frozen', flush=True)\n"
        "    await anyio.sleep_forever()\n"
        "anyio.run(hold)\n"
    )
    with device_of("ext4", tmp_path) as (_, mount):
        holder = subprocess.Popen([sys.executable, "-c", code, str(mount)], stdout=subprocess.PIPE)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"frozen\n"
        holder.kill()
        holder.wait()
        holder.stdout.close()
        with anyio.fail_after(20):
            await anyio.run_process(["touch", str(mount / "after")])


async def test_cancelled_while_it_reads_it_thaws(tmp_path: Path) -> None:
    with device_of("ext4", tmp_path) as (device, mount):
        with anyio.move_on_after(0) as scope:
            await exported(device, 'consistency = "freeze"; rate_limit = "1 MiB"', folder=tmp_path)
        assert scope.cancelled_caught
        with anyio.fail_after(20):
            await anyio.run_process(["touch", str(mount / "after")])


async def test_somebody_elses_freeze_is_left_alone_and_told(tmp_path: Path) -> None:
    with device_of("ext4", tmp_path) as (_, mount):
        freeze = await Freeze.begin([str(mount)], timeout_s=60)
        with pytest.raises(PlanError, match="can't be frozen") as caught:
            await Freeze.begin([str(mount)], timeout_s=60)
        assert "already" in caught.value.hint
        assert freeze.is_held
        assert await freeze.end()


async def test_mounts_in_another_namespace_are_uses_too(tmp_path: Path) -> None:
    need("mke2fs", "unshare")
    image = blank(tmp_path / "disk", 32 * MiB)
    run("mke2fs", "-q", "-t", "ext4", "-F", image)
    (tmp_path / "hidden").mkdir()
    with loop_device(image, read_only=False) as device:
        script = f"mount {device} {tmp_path / 'hidden'} && echo ready && cat"
        other = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            [use] = uses_of(device)
            assert (use.kind, use.writable, use.is_reachable) == ("mount", True, False)
            with pytest.raises(PlanError, match="not mounted where"):
                await exported(device, 'consistency = "freeze"', folder=tmp_path)
        finally:
            other.communicate()


# Stand-ins: device-mapper is not there on every machine that tests. The "snapshot" is a file.
LVM = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LVM_LOG"
case "$(basename "$0") $*" in
    lvs*lv_attr*"$LVM_VOLUME") echo "  group|root|-wi-ao----" ;;
    lvs*lv_attr*) echo "  Failed to find logical volume" >&2; exit 5 ;;
    lvs*lv_path*) echo "  $LVM_SNAPSHOT" ;;
    lvcreate*) cp "$LVM_VOLUME" "$LVM_SNAPSHOT" ;;
    lvremove*) [ -z "$LVM_KEEPS" ] || { echo "  in use" >&2; exit 5; }; rm "$LVM_SNAPSHOT" ;;
esac
"""


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the stand-ins take for a logical volume."""
    need("mke2fs")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("lvs", "lvcreate", "lvremove"):
        (folder / name).write_text(LVM)
        (folder / name).chmod(0o755)
    path = blank(tmp_path / "volume", 32 * MiB)
    run("mke2fs", "-q", "-t", "ext4", "-F", path)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name, value in (("LOG", "lvm.log"), ("VOLUME", "volume"), ("SNAPSHOT", "snapshot")):
        monkeypatch.setenv(f"LVM_{name}", str(tmp_path / value))
    return path


async def test_a_volume_is_read_from_its_snapshot_which_is_removed(
    volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.read.disk import DiskReader

    real = DiskReader.load

    def written(self: DiskReader, block: Block, buffer: memoryview) -> None:
        volume.write_bytes(b"written meanwhile")
        real(self, block, buffer)

    before = volume.read_bytes()
    monkeypatch.setattr(DiskReader, "load", written)
    outcome, image = await exported(volume, 'consistency = "snapshot"; blocks = "all"', folder=tmp_path)
    assert image.read_bytes() == before
    assert outcome.manifest.facts["consistency"]["achieved"] == "snapshot"
    assert not (tmp_path / "snapshot").exists()
    steps = [line.split()[0] for line in (tmp_path / "lvm.log").read_text().splitlines()]
    assert steps == ["lvs", "lvcreate", "lvs", "lvremove"]


async def test_a_snapshot_goes_also_when_the_run_is_stopped_or_says_that_it_stays(
    volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").write_bytes(b"there already")
    toml = write_toml(
        tmp_path / "x.toml",
        f'read.disk; path = "{volume}"; consistency = "snapshot"',
        "encode.raw",
        f'write.file; path = "{tmp_path / "image"}"',
    )
    with pytest.raises(PlanError, match="exists"):
        await export(toml)
    assert not (tmp_path / "snapshot").exists()
    monkeypatch.setenv("LVM_KEEPS", "1")
    with pytest.raises(LeftBehindError, match="could not be removed: in use") as caught:
        await export(toml)
    assert caught.value.commands[0].startswith("lvremove --force group/root-export-")


async def test_what_is_no_volume_has_no_snapshot_and_is_led_to_the_freeze(volume: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="this is none") as caught:
        await exported(blank(tmp_path / "disk", MiB), 'consistency = "snapshot"', folder=tmp_path)
    assert 'consistency = "freeze"' in caught.value.hint
