"""Real disks that fail and real targets that are full: told with the place, and nothing is left."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pipeline.units import MiB
from tests.chains import write_toml
from tests.disks.failing import failing_disk
from tests.disks.letters import letter_bytes
from tests.disks.mounts import loop_device, mounted, needs_root, system
from tests.end_to_end.command import call
from tests.end_to_end.places import CHAIN, Place

pytestmark = needs_root

SIZE = 24 * MiB
BAD = 17 * MiB + 8192


@contextmanager
def bad_source(folder: Path, kind: str, *, shrinks_to: int | None = None) -> Iterator[Path]:
    """A disk of 24 MiB with a bad sector in the middle: a file, or a block device."""
    mount = folder / "mnt"
    mount.mkdir()
    content = b"".join(letter_bytes(letter, MiB) for letter in "ABCDEFGHIJKLMNOPQRSTUVWX")
    with ExitStack() as stack:
        disk = stack.enter_context(failing_disk(mount, content, range(BAD, BAD + 512), shrinks_to=shrinks_to))
        yield disk.path if kind == "file" else stack.enter_context(loop_device(disk.path))


def to_file(folder: Path, source: Path, target: Path, encoder: str = 'encode.qcow2; compression = "none"') -> Path:
    """Export to a file; a run that fails leaves nothing."""
    return write_toml(
        folder / "export.toml",
        f'read.disk; path = "{source}"',
        *CHAIN,
        encoder,
        f'write.file; path = "{target}"',
        "verify.readback",
        on_failure="abort",
    )


@pytest.mark.parametrize("kind", ["file", "block device"])
def test_read_error_in_mid_disk_names_the_offset_and_leaves_nothing(one_place: Place, kind: str) -> None:
    with bad_source(one_place.folder, kind) as source:
        said = call("run", one_place.toml(disk=source), env=one_place.env)
        assert said.code == 1, said.err
        assert said.has("error: read: the source could not be read: Input/output error", "ddrescue", str(source))
        offset = int(said.err.partition("offset=")[2].split(",")[0])
        assert offset <= BAD < offset + 4096
        assert one_place.nothing_is_left()


def test_read_error_leaves_no_file(tmp_path: Path) -> None:
    with bad_source(tmp_path, "file") as source:
        said = call("run", to_file(tmp_path, source, tmp_path / "disk.qcow2"))
        assert said.code == 1, said.err
        assert said.has("the source could not be read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.toml", "mnt"]


@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
def test_source_that_shrinks_is_told_and_leaves_nothing(one_place: Place, encoder: str) -> None:
    with bad_source(one_place.folder, "file", shrinks_to=18 * MiB) as source:
        said = call("run", one_place.toml(encoder, disk=source), env=one_place.env)
        assert said.code == 1, said.err
        assert said.has("error: read: the source is shorter than it said", "Export a snapshot")
        assert one_place.nothing_is_left()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
def test_full_disk_is_told_and_left_as_it_was(tmp_path: Path, letters: Path, kind: str, encoder: str) -> None:
    with ExitStack() as stack:
        if kind == "tmpfs":
            target = stack.enter_context(mounted(tmp_path / "mnt", "tmpfs", options=f"size={12 * MiB}"))
        else:
            image = tmp_path / "target.ext4"
            system("mke2fs", "-q", "-t", "ext4", "-m", "0", image, "16M")
            device = stack.enter_context(loop_device(image, read_only=False))
            target = stack.enter_context(mounted(tmp_path / "mnt", "ext4", device))
        before = {path.name for path in target.iterdir()}
        said = call("run", to_file(tmp_path, letters, target / "disk.image", encoder))
        assert said.code == 1, said.err
        assert said.has("the image file could not be written: No space left on device", "The target is full.")
        assert {path.name for path in target.iterdir()} == before
    assert not (tmp_path / "disk.image.manifest.json").exists()


def test_disk_that_is_full_in_mid_manifest_keeps_nothing(tmp_path: Path, letters: Path) -> None:
    first = call("run", to_file(tmp_path, letters, tmp_path / "disk.image"))
    assert first.code == 0, first.err
    taken = (tmp_path / "disk.image").stat().st_blocks * 512
    with mounted(tmp_path / "mnt", "tmpfs", options=f"size={-(-taken // 4096) * 4096}") as target:
        said = call("run", to_file(tmp_path, letters, target / "disk.image"))
        assert said.code == 1, said.err
        assert said.has("publish", "No space left on device")
        assert list(target.iterdir()) == []


def test_disk_that_has_no_room_for_the_manifest_keeps_nothing(tmp_path: Path, letters: Path) -> None:
    """Three inodes: the root of the file system, the image, and one that somebody has."""
    with mounted(tmp_path / "mnt", "tmpfs", options=f"size={64 * MiB},nr_inodes=3") as target:
        (target / "somebody's").touch()
        said = call("run", to_file(tmp_path, letters, target / "disk.image"))
        assert said.code == 1, said.err
        assert said.has("publish", "No space left on device")
        assert [path.name for path in target.iterdir()] == ["somebody's"]


def test_disk_that_has_no_room_for_the_manifest_keeps_what_was_written_for_a_resume(
    tmp_path: Path, letters: Path
) -> None:
    with mounted(tmp_path / "mnt", "tmpfs", options=f"size={64 * MiB},nr_inodes=3") as target:
        (target / "somebody's").touch()
        toml = to_file(tmp_path, letters, target / "disk.image")
        said = call("run", toml, "--set", "export.on_failure=keep")
        assert said.code == 4, said.err
        assert said.has("No space left on device", "Resume it with", "Remove it with")
        (target / "somebody's").unlink()
        said = call("run", toml, "--set", "export.on_failure=keep", "--resume")
        assert said.code == 0, said.err
        assert sorted(path.name for path in target.iterdir()) == ["disk.image", "disk.image.manifest.json"]


def test_disk_that_has_no_room_for_the_manifest_keeps_the_old_image(tmp_path: Path, letters: Path) -> None:
    with mounted(tmp_path / "mnt", "tmpfs", options=f"size={64 * MiB},nr_inodes=3") as target:
        (target / "disk.image").write_bytes(b"the old one")
        said = call("run", to_file(tmp_path, letters, target / "disk.image"), "--set", "write.file.overwrite=true")
        assert said.code == 1, said.err
        assert said.has("publish", "No space left on device")
        assert (target / "disk.image").read_bytes() == b"the old one"
        assert [path.name for path in target.iterdir()] == ["disk.image"]


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_target_on_the_exported_disk_is_refused(tmp_path: Path, verb: str) -> None:
    image = tmp_path / "system.ext4"
    system("mke2fs", "-q", "-t", "ext4", image, "16M")
    with loop_device(image, read_only=False) as device, mounted(tmp_path / "mnt", "ext4", device) as target:
        before = {path.name for path in target.iterdir()}
        said = call(verb, to_file(tmp_path, device, target / "disk.qcow2"))
        assert said.code == 2, said.err
        assert said.has("the target lies on the disk that is exported", str(device), "Write to another disk")
        assert {path.name for path in target.iterdir()} == before


@pytest.mark.parametrize("spelling", ["disk.raw", "../{folder}/disk.raw", "link.raw", "hard.raw"])
def test_target_that_is_the_source_is_refused_under_any_name(tmp_path: Path, letters: Path, spelling: str) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(letters.read_bytes())
    (tmp_path / "link.raw").symlink_to(disk)
    (tmp_path / "hard.raw").hardlink_to(disk)
    target = tmp_path / spelling.format(folder=tmp_path.name)
    said = call("run", to_file(tmp_path, disk, target), "--set", "write.file.overwrite=true")
    assert said.code == 2, said.err
    assert said.has("the target is the source")
    assert disk.read_bytes() == letters.read_bytes()


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path, letters: Path) -> None:
    with mounted(tmp_path / "mnt", "tmpfs", options="ro") as target:
        said = call("run", to_file(tmp_path, letters, target / "disk.qcow2"))
        assert said.code == 2, said.err
        assert said.has("can't be written", str(target))


@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_target_that_is_no_file_is_refused_and_stays_what_it_is(
    tmp_path: Path, letters: Path, kind: str, overwrite: str
) -> None:
    """Replacing a device by a file would fill the memory behind /dev, and take the device from everybody."""
    target = tmp_path / "target"
    mode = (stat.S_IFCHR if kind == "device" else stat.S_IFIFO) | 0o600
    os.mknod(target, mode, os.makedev(1, 3))
    said = call("run", to_file(tmp_path, letters, target), "--set", f"write.file.overwrite={overwrite}")
    assert said.code == 2, said.err
    assert said.has("the target is a device or pipe", str(target), "Name a file in a folder")
    assert stat.S_IFMT(target.stat().st_mode) == stat.S_IFMT(mode)
    assert {path.name for path in tmp_path.iterdir()} == {"export.toml", "target"}
