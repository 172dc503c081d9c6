"""write.file through whole chains, on real filesystems."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest

from pipeline.config.continuing import Attempt, Mode
from pipeline.errors import (
    KeptError,
    LeftBehindError,
    PlanError,
    SourceError,
    StageError,
    StoreError,
    VerificationError,
)
from pipeline.events import Event, FallbackTaken, ImageSealed, PartStored, ProgressSampled, UploadOpened
from pipeline.flow.items import Piece
from pipeline.flow.manifest import Manifest
from pipeline.flow.stage import Catalog
from pipeline.units import KiB, MiB
from stages.catalog import CATALOG
from stages.encode import raw
from stages.write import file
from tests.chains import export, write_toml
from tests.disks.letters import write_disk

ENCODERS = [
    "encode.raw",
    "encode.qcow2",
    'encode.qcow2; compression = "none"',
    'encode.qcow2; compression = "zstd"; cluster_size = "4 KiB"',
]


def chain(folder: Path, target: Path, *more: str, encoder: str = "encode.raw", source: Path | None = None) -> Path:
    return write_toml(
        folder / "export.toml",
        f'read.disk; path = "{source or folder / "disk"}"',
        "checksum.guest",
        "sparse.zeros",
        encoder,
        f'write.file; path = "{target}"',
        *more,
    )


def compare(disk: Path, image: Path, encoder: str) -> None:
    kind = "raw" if "raw" in encoder else "qcow2"
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", kind, disk, image], check=True, capture_output=True)
    if kind == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", image], check=True)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    "letters, block, tail", [("AB0-A" * 3, MiB, 0), ("A0B-" * 9, 60 * KiB, 512), ("-", MiB, 0), ("", 1, 512)]
)
async def test_file_holds_the_disk(tmp_path: Path, encoder: str, letters: str, block: int, tail: int) -> None:
    disk = write_disk(tmp_path / "disk", letters, block, tail)
    target = tmp_path / "image"
    outcome = await export(chain(tmp_path, target, "verify.readback", encoder=encoder))
    assert outcome.state == "identical"
    compare(disk, target, encoder)
    assert target.stat().st_size == outcome.image_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "export.toml", "image", "image.manifest.json"]


async def test_zeros_of_a_raw_image_are_holes(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", "A" + "0" * 20 + "-" * 20 + "B", MiB)
    await export(chain(tmp_path, tmp_path / "image"))
    assert (tmp_path / "image").stat().st_blocks * 512 <= 2 * MiB + 128 * KiB


async def test_manifest_beside_the_image_tells_the_disk(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", "AB-0", MiB)
    outcome = await export(chain(tmp_path, tmp_path / "image", "verify.readback"))
    text = (tmp_path / "image.manifest.json").read_bytes()
    manifest = Manifest.from_json(text, where="here")
    assert manifest == Manifest.from_json(outcome.manifest.to_json(), where="there")
    assert manifest.disk.totals == {"read": 2 * MiB, "hole": MiB, "scanned": MiB}
    assert manifest.state == "identical"
    assert manifest.digest is not None


async def test_every_guest_byte_is_acknowledged_once(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", "AB-0" * 5, MiB, 300 * 512)
    for encoder in ENCODERS:
        events: list[Event] = []
        outcome = await export(
            chain(tmp_path, tmp_path / "image", encoder=encoder), events=events, overrides=["write.file.overwrite=true"]
        )
        last = [event for event in events if isinstance(event, ProgressSampled)][-1]
        assert last.acked_bytes == outcome.disk_size


async def test_existing_target_is_refused_and_kept(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", "A", MiB)
    (tmp_path / "image").write_text("precious")
    with pytest.raises(PlanError, match="target exists"):
        await export(chain(tmp_path, tmp_path / "image"))
    assert (tmp_path / "image").read_text() == "precious"


async def test_overwrite_replaces_at_the_end_in_one_step(tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk", "AB", MiB)
    (tmp_path / "image").write_text("old")
    await export(chain(tmp_path, tmp_path / "image"), overrides=["write.file.overwrite=true"])
    assert (tmp_path / "image").read_bytes() == disk.read_bytes()


async def test_target_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", "AB", MiB)
    toml = chain(tmp_path, tmp_path / "image")
    from pipeline.config.parse import load_config
    from pipeline.config.planning import plan_run
    from pipeline.config.wiring import wire
    from pipeline.events import EventStream
    from pipeline.flow.engine import run_export

    config = load_config(toml, CATALOG)
    stream = EventStream()
    async with plan_run(config, wire(config), stream) as plan:
        (tmp_path / "image").write_text("somebody else's")
        with pytest.raises(StoreError, match="appeared while"):
            await run_export(plan, stream)
    assert (tmp_path / "image").read_text() == "somebody else's"
    assert not list(tmp_path.glob(".image*"))


@pytest.mark.parametrize("folder", ["absent/image", "disk/image", "."])
async def test_impossible_target_is_refused_in_planning(tmp_path: Path, folder: str) -> None:
    write_disk(tmp_path / "disk", "A", MiB)
    with pytest.raises(PlanError):
        await export(chain(tmp_path, tmp_path / folder))


async def test_target_that_is_the_source_is_refused(tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk", "A", MiB)
    (tmp_path / "link").symlink_to(disk)
    with pytest.raises(PlanError, match="target is the source"):
        await export(chain(tmp_path, tmp_path / "link"), overrides=["write.file.overwrite=true"])


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A 32 MiB ext4 on a loop device, mounted: (device, mount point)."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    image, mount = tmp_path / "small.ext4", tmp_path / "mnt"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(32 * MiB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    device = subprocess.run(
        ["losetup", "-f", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    subprocess.run(["mount", device, mount], check=True)
    yield Path(device), mount
    subprocess.run(["umount", mount], check=True)
    subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
async def test_full_disk_is_told_and_nothing_stays(
    tmp_path: Path, small_mount: tuple[Path, Path], encoder: str
) -> None:
    write_disk(tmp_path / "disk", "ABCDEFGH" * 6, MiB)
    _, mount = small_mount
    with pytest.raises(StoreError, match="No space left") as caught:
        await export(chain(tmp_path, mount / "image", encoder=encoder))
    assert "The target is full" in caught.value.hint
    assert [path.name for path in mount.iterdir()] == ["lost+found"]


async def test_target_on_the_exported_disk_is_refused(tmp_path: Path, small_mount: tuple[Path, Path]) -> None:
    device, mount = small_mount
    with pytest.raises(PlanError, match="lies on the disk that is exported"):
        await export(chain(tmp_path, mount / "image", source=device))


async def test_without_direct_io_the_image_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = write_disk(tmp_path / "disk", "AB0-A", MiB, 512)
    real = os.open

    def refusing(name: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real(name, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    for encoder in ENCODERS:
        events: list[Event] = []
        await export(
            chain(tmp_path, tmp_path / "image", "verify.readback", encoder=encoder),
            events=events,
            overrides=["write.file.overwrite=true"],
        )
        assert {event.stage for event in events if isinstance(event, FallbackTaken)} == {"read.disk", "write.file"}
        compare(disk, tmp_path / "image", encoder)


async def test_cancelled_at_any_moment_nothing_stays(tmp_path: Path) -> None:
    """Cancel at the n-th event for every n until the run succeeds."""
    write_disk(tmp_path / "disk", "AB0-ABCD" * 2, MiB)
    toml = chain(tmp_path, tmp_path / "image", "verify.readback", encoder="encode.qcow2")
    for moment in range(1, 100):
        seen: list[Event] = []

        class Counting(list):  # type: ignore[type-arg]
            def append(self, event: Event) -> None:
                seen.append(event)  # noqa: B023
                if len(seen) == moment:  # noqa: B023  # used in this turn of the loop only
                    scope.cancel()

        with anyio.CancelScope() as scope:
            await export(toml, events=Counting())
        left = sorted(path.name for path in tmp_path.iterdir())
        if not scope.cancelled_caught:
            break
        if any(type(event).__name__ == "ImagePublished" for event in seen):
            continue
        assert left == ["disk", "export.toml"], (moment, [type(event).__name__ for event in seen])
    assert "image" in left
    assert any(isinstance(event, UploadOpened) for event in seen)
    assert not any(isinstance(event, PartStored) for event in seen)


async def test_failing_source_leaves_no_file(tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk", "ABCD" * 8, MiB)

    class Shrinking(list):  # type: ignore[type-arg]
        def append(self, event: Event) -> None:
            if isinstance(event, UploadOpened):
                os.truncate(disk, 20 * MiB)

    with pytest.raises(SourceError, match="shorter than it said"):
        await export(chain(tmp_path, tmp_path / "image"), events=Shrinking())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "export.toml"]


async def test_flipped_byte_is_found_and_the_image_withdrawn(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", "ABCD", MiB)

    class Flipping(list):  # type: ignore[type-arg]
        def append(self, event: Event) -> None:
            if isinstance(event, ImageSealed):
                (partial,) = tmp_path.glob(".image*.partial")
                with open(partial, "r+b") as file:
                    file.seek(2 * MiB + 77)
                    byte = file.read(1)
                    file.seek(-1, 1)
                    file.write(bytes([byte[0] ^ 1]))

    with pytest.raises(VerificationError, match="not the disk") as caught:
        await export(chain(tmp_path, tmp_path / "image", "verify.readback"), events=Flipping())
    assert "2097152-3145727" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "export.toml"]


@pytest.mark.parametrize("fails", ["source", "verification"])
async def test_file_that_cannot_be_removed_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """The share became read-only: what the run says is left has to be all that is left."""
    disk = write_disk(tmp_path / "disk", "ABCD" * 8, MiB)
    remove = Path.unlink

    def refusing(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    class Failing(list):  # type: ignore[type-arg]
        def append(self, event: Event) -> None:
            if isinstance(event, UploadOpened):
                monkeypatch.setattr(Path, "unlink", refusing)
                if fails == "source":
                    os.truncate(disk, 20 * MiB)
            elif isinstance(event, ImageSealed):
                (partial,) = tmp_path.glob(".image*.partial")
                with open(partial, "r+b") as file:
                    file.write(b"other")

    with pytest.raises(LeftBehindError, match="removing what was written failed: Read-only file system") as caught:
        await export(chain(tmp_path, tmp_path / "image", "verify.readback"), events=Failing())
    monkeypatch.setattr(Path, "unlink", remove)
    assert isinstance(caught.value.cause, SourceError if fails == "source" else VerificationError)
    for command in caught.value.commands:
        subprocess.run(command, shell=True, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "export.toml"]


@pytest.mark.parametrize("name", ["x" * 225, "x" * 300, "x/" * 3000 + "x", "x" * 300 + "/x"])
async def test_name_that_no_filesystem_takes_is_refused_in_planning(tmp_path: Path, name: str) -> None:
    """Also one that fits by itself, but not with what it gets until the image is published."""
    write_disk(tmp_path / "disk", "A", MiB)
    with pytest.raises(PlanError, match=r"name is too long|File name too long") as caught:
        await export(chain(tmp_path, tmp_path / name))
    assert "horte" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "export.toml"]


async def test_longest_name_that_is_not_refused_works(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", "A", MiB)
    for length in range(240, 0, -1):
        try:
            await export(chain(tmp_path, tmp_path / ("x" * length)))
        except PlanError:
            continue
        break
    assert length > 180
    assert (tmp_path / ("x" * length)).read_bytes() == (tmp_path / "disk").read_bytes()


@pytest.mark.parametrize("overwrite", [False, True])
async def test_image_is_on_stable_storage_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """After a power loss the name stands for a whole image or for none, and the manifest for one that is there."""
    write_disk(tmp_path / "disk", "AB", MiB)
    seen: list[str] = []
    sync, link, replace = os.fsync, os.link, os.replace

    def watched_sync(fd: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{fd}"))
        seen.append(f"sync {'folder' if name == tmp_path else name.name.replace(str(os.getpid()), 'PID')}")
        sync(fd)

    def watched_link(source: Path, target: Path) -> None:
        seen.append(f"name {target.name}")
        link(source, target)

    def watched_replace(source: Path, target: Path) -> None:
        seen.append(f"name {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "link", watched_link)
    monkeypatch.setattr(os, "replace", watched_replace)
    toml = chain(tmp_path, tmp_path / "image", "verify.readback")
    await export(toml, overrides=[f"write.file.overwrite={str(overwrite).lower()}"])
    assert seen == [
        "sync .image.test.PID.partial",
        "sync .image.test.PID.partial.manifest.json",
        "name image",
        "name image.manifest.json",
        "sync folder",
    ]


async def test_file_that_lacks_guest_bytes_is_not_finished(tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", "AB", MiB)

    class Losing(raw.RawEncoder):
        def place(self, prepared: raw.Stretches) -> list[Piece]:
            return [
                dataclasses.replace(piece, guest_bytes=piece.guest_bytes - 512) for piece in super().place(prepared)
            ]

    specs = Catalog(
        [dataclasses.replace(spec, build=Losing) if spec.name == "encode.raw" else spec for spec in CATALOG]
    )
    with pytest.raises(StageError, match="guest bytes were written; nothing was committed"):
        await export(chain(tmp_path, tmp_path / "image"), catalog=specs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "export.toml"]


@pytest.mark.parametrize("fails", ["source", "verification"])
async def test_journal_stays_where_what_it_knows_of_could_not_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Or the next run would not know that there is something to remove."""
    disk = write_disk(tmp_path / "disk", "ABCD" * 8, MiB)
    remove = Path.unlink

    def refusing(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith(".partial"):
            raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        remove(path, missing_ok)

    class Spoiling(list):  # type: ignore[type-arg]
        def append(self, event: Event) -> None:
            if isinstance(event, UploadOpened):
                monkeypatch.setattr(Path, "unlink", refusing)
                if fails == "source":
                    os.truncate(disk, 20 * MiB)
            elif isinstance(event, ImageSealed):
                (partial,) = tmp_path.glob(".image*.partial")
                with open(partial, "r+b") as file:
                    file.write(b"other")

    journal = tmp_path / "journal"
    with pytest.raises(LeftBehindError):
        await export(
            chain(tmp_path, tmp_path / "image", "verify.readback"),
            events=Spoiling(),
            overrides=[f"export.journal={journal}", "export.on_failure=abort"],
            attempt=Attempt(mode=Mode.NEW),
        )
    assert journal.exists()


async def test_publishing_that_fails_half_way_names_the_image_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image has its own name by then: whoever runs the commands is rid of it, and of the manifest that waited."""
    write_disk(tmp_path / "disk", "ABCD" * 8, MiB)
    link, journal = os.link, tmp_path / "journal"

    def failing(source: Path, target: Path) -> None:
        if target.name.endswith(".json"):
            target = tmp_path / "no such folder" / "x"
        link(source, target)

    def rename(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", failing)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeptError) as kept:
        await export(
            chain(tmp_path, tmp_path / "image"),
            overrides=[f"export.journal={journal}"],
            attempt=Attempt(mode=Mode.NEW),
        )
    assert (tmp_path / "image").exists()
    assert kept.value.commands
    for command in kept.value.commands:
        subprocess.run(["sh", "-c", command], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "export.toml"]


def test_only_one_run_at_a_time_gives_image_and_manifest_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two with overwrite that end together would leave the image of one beside the manifest of the other."""
    other, waits = ExitStack(), list[float]()

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            other.close()

    monkeypatch.setattr(time, "sleep", wait)
    other.enter_context(file._alone_in(tmp_path))
    with file._alone_in(tmp_path):
        assert len(waits) == 3
    other.enter_context(file._alone_in(tmp_path))
    monkeypatch.setattr(time, "monotonic", iter((0.0, 5.0, 11.0)).__next__)
    with file._alone_in(tmp_path):  # a lock that is held for long is none of ours
        other.close()
