"""Disks in use that are read again after the first pass, until nothing changes any more."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from pipeline.config.continuing import Attempt, Mode
from pipeline.errors import KeptError, SourceError, StoreError
from pipeline.events import ChangesSent, Event, FallbackTaken, RunPlanned, RunResumed
from pipeline.flow.engine import Outcome
from pipeline.flow.manifest import unpack_runs
from pipeline.flow.rereading import Rereading
from pipeline.observe.record import record_of
from pipeline.units import KiB, MiB
from stages.catalog import CATALOG
from stages.disk import occupancy
from stages.disk.occupancy import Use
from stages.read.disk import DiskReader
from stages.store.sftp import SftpUrl
from stages.write import ranges
from stages.write.sftp import SftpWriter
from tests.chains import export, write_toml
from tests.disk.making import hashes, needs_root, run
from tests.disks.letters import letter_bytes, write_disk
from tests.disks.mounts import loop_device, mounted
from tests.read.test_consistency import check, device_of, write_load
from tests.stores.azurite import AzureServer
from tests.stores.nbd import NbdServer
from tests.stores.openssh import SftpServer


class Watching(list[Event]):
    """Events that are looked at as they come."""

    def __init__(self, look: Callable[[Event], None]) -> None:
        super().__init__()
        self._look = look

    def append(self, event: Event) -> None:
        super().append(event)
        self._look(event)


async def exported(
    disk: Path,
    *options: str,
    folder: Path,
    encoder: str = "encode.raw",
    behind: tuple[str, ...] = (),
    writer: str = "",
    checks: tuple[str, ...] = ("checksum.guest",),
    verify: tuple[str, ...] = ("verify.readback",),
    **more: Any,
) -> Outcome:
    toml = write_toml(
        folder / "x.toml",
        "; ".join([f'read.disk; path = "{disk}"', *options]),
        *checks,
        "sparse.zeros",
        encoder,
        *behind,
        writer or f'write.file; path = "{folder / "image"}"',
        *verify,
        on_failure="keep",
    )
    return await export(toml, **more)


def told(outcome: Outcome) -> Any:
    return outcome.manifest.facts["consistency"]


# ---- real filesystems in use -----------------------------------------------------------------------------------------


def content(device: Path) -> bytes:
    """What the disk itself holds; the cache has what a journal has not yet brought to its place."""
    return subprocess.run(
        ["dd", f"if={device}", "iflag=direct", "bs=1M", "status=none"], check=True, stdout=subprocess.PIPE
    ).stdout


@needs_root
@pytest.mark.parametrize(
    "kind, encoder",
    [
        ("ext4", "encode.raw"),
        pytest.param("ext4", 'encode.vhd; variant = "fixed"', marks=pytest.mark.slow),
        pytest.param("xfs", "encode.raw", marks=pytest.mark.slow),
        pytest.param("btrfs", "encode.raw", marks=pytest.mark.slow),
    ],
)
async def test_once_a_write_load_ends_the_image_is_the_disk_at_rest(kind: str, encoder: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with device_of(kind, tmp_path) as (device, mount):
        load = write_load(mount)
        load.__enter__()

        def stop(event: Event) -> None:
            if isinstance(event, ChangesSent) and event.number == 1:
                load.__exit__(None, None, None)
                run("sync", "-f", mount)

        outcome = await exported(device, "rereads = 10", folder=tmp_path, encoder=encoder, events=Watching(stop))
        consistency = told(outcome)
        assert consistency["achieved"] == "settled"
        first, *_, last = consistency["changed_bytes"]
        assert first > 0
        assert last == 0
        assert consistency["resent_bytes"] == sum(consistency["changed_bytes"])
        assert outcome.state == "identical"
        assert image.read_bytes()[: outcome.disk_size] == content(device)
        before = hashes(mount)
    (tmp_path / "disk").unlink()  # two filesystems with one UUID can't be mounted
    os.truncate(image, outcome.disk_size)
    with mounted(tmp_path / "copy", kind, image, "loop,nouuid" if kind == "xfs" else "loop") as copy:
        assert hashes(copy) == before
    check(kind, image)


@needs_root
async def test_a_load_that_does_not_end_is_told_after_the_last_look(tmp_path: Path) -> None:
    with device_of("ext4", tmp_path) as (device, mount), write_load(mount):
        events: list[Event] = []
        outcome = await exported(device, "rereads = 2", 'blocks = "used"', folder=tmp_path, events=events)
    assert any(isinstance(event, FallbackTaken) and "many moments" in event.what for event in events)
    consistency = told(outcome)
    assert (consistency["achieved"], consistency["rereads"]) == ("live", 2)
    assert min(consistency["changed_bytes"]) > 0
    shown = record_of(outcome.manifest, where="").source["consistency"]
    assert shown.startswith("live: written to at ")
    assert str(consistency["resent_bytes"]) in shown
    assert str(consistency["changed_bytes"][-1]) in shown
    assert outcome.state == "identical", "what was read last is what is stored"


# ---- every change, on every target -----------------------------------------------------------------------------------


@pytest.fixture
def in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read counts as mounted read-write."""

    def uses(disk: Path) -> tuple[Use, ...]:
        return (Use(offset=0, length=1 << 62, kind="mount", point="/in use", writable=True, device="7:0"),)

    monkeypatch.setattr(occupancy, "uses_of", uses)


Change = Callable[[], None]


@pytest.fixture
def before_look(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Change]], None]:
    """Have the disk changed right before the look of each number."""

    def arm(changes: dict[int, Change]) -> None:
        real = Rereading._look

        async def look(self: Rereading, number: int, outlet: Any) -> int:
            changes.get(number, lambda: None)()
            return await real(self, number, outlet)

        monkeypatch.setattr(Rereading, "_look", look)

    return arm


LETTERS = "ABCDEFGH00IJKLMN----OPQRSTUV0000W"
# Leaves that change before the first look: bytes within one, data to zeros and to a hole, zeros and holes to data, a
# whole window to zeros and one from them.
FIRST = {1: "b", 3: "0", 5: "-", 8: "i", 16: "h", **dict.fromkeys(range(20, 24), "0"), 29: "w"}
SECOND = {1: "B", 20: "o", 32: "z"}  # one goes back to what it was


def change(disk: Path, letters: dict[int, str]) -> None:
    with open(disk, "r+b") as file:
        for number, letter in letters.items():
            file.seek(number * MiB)
            file.write(letter_bytes(letter, MiB) if number != 1 else letter_bytes(letter, 4 * KiB))
    for number in [number for number, letter in letters.items() if letter == "-"]:
        run("fallocate", "--punch-hole", "--offset", str(number * MiB), "--length", str(MiB), disk)


@contextmanager
def _nbd(folder: Path, request: pytest.FixtureRequest, size: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    file = folder / "export"
    with file.open("wb") as made:
        made.truncate(size)
    with NbdServer("nbdkit", "file", file) as server:
        yield f'write.nbd; url = "{server.url()}"', file.read_bytes


@contextmanager
def _device(folder: Path, request: pytest.FixtureRequest, size: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    if os.geteuid() != 0:
        pytest.skip("loop devices are root's")
    file = folder / "medium"
    file.write_bytes(b"\xee" * size)
    with loop_device(file, read_only=False) as device:
        yield f'write.device; path = "{device}"; overwrite = true', device.read_bytes


@contextmanager
def _page(folder: Path, request: pytest.FixtureRequest, size: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    server: AzureServer = request.getfixturevalue("azure_server")
    for name, value in server.environment().items():
        request.getfixturevalue("monkeypatch").setenv(name, value)
    container = server.create_container(f"c{uuid.uuid4().hex}")
    yield f'write.azure_page; url = "az://{container}/image"', lambda: server.get(container, "image")


@contextmanager
def _file(folder: Path, request: pytest.FixtureRequest, size: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    yield f'write.file; path = "{folder / "image"}"', (folder / "image").read_bytes


@contextmanager
def _sftp(folder: Path, request: pytest.FixtureRequest, size: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    server: SftpServer = request.getfixturevalue("sftp_server")
    place = server.data / f"reread-{uuid.uuid4().hex}"
    place.mkdir()
    url = SftpUrl.parse(server.url("x")).at(f"{server.remote}/{place.name}/image")
    login = f'identity_files = ["{server.identity}"]; agent = false; known_hosts = "{server.known_hosts}"'
    yield f'write.sftp; url = "{url}"; {login}', (place / "image").read_bytes


PLACES = {
    "write.file": _file,
    "write.sftp": _sftp,
    "write.nbd": _nbd,
    "write.device": _device,
    "write.azure_page": _page,
}


def test_every_target_whose_bytes_can_be_replaced_is_tried() -> None:
    rewritable = {spec.name for spec in CATALOG if spec.sink is not None and spec.sink.rewrite == "any"}
    assert rewritable - {"write.null"} == set(PLACES)


@pytest.mark.parametrize("name", PLACES)
async def test_whatever_changes_is_replaced_on_every_target(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, in_use: None, before_look: Any
) -> None:
    disk = write_disk(tmp_path / "disk", LETTERS, MiB, 512)
    before_look({1: lambda: change(disk, FIRST), 2: lambda: change(disk, SECOND)})
    size = disk.stat().st_size
    with PLACES[name](tmp_path, request, size) as (stage, stored):
        outcome = await exported(
            disk,
            folder=tmp_path,
            writer=stage,
            encoder='encode.vhd; variant = "fixed"' if name == "write.azure_page" else "encode.raw",
        )
        assert stored()[:size] == disk.read_bytes()
    assert outcome.state == "identical"
    consistency = told(outcome)
    assert consistency["achieved"] == "settled"
    assert "found no change" in record_of(outcome.manifest, where="").source["consistency"]
    assert consistency["changed_bytes"] == [len(FIRST) * MiB, len(SECOND) * MiB, 0]
    runs = unpack_runs(outcome.manifest.disk.runs, size)
    kinds = {
        number: run.is_data for number in range(len(LETTERS)) for run in runs if run.offset <= number * MiB < run.end
    }
    final = {**dict(enumerate(LETTERS)), **FIRST, **SECOND}
    assert kinds == {number: letter not in "0-" for number, letter in final.items()}, "the map is that of the last look"


async def test_a_chain_that_can_not_replace_says_why(tmp_path: Path, in_use: None) -> None:
    disk = write_disk(tmp_path / "disk", "AB", MiB)

    async def notes(number: int, **more: Any) -> tuple[str, Any]:
        folder = tmp_path / str(number)
        folder.mkdir()
        events: list[Event] = []
        outcome = await exported(disk, folder=folder, verify=(), events=events, **more)
        [planned] = [event for event in events if isinstance(event, RunPlanned)]
        return planned.notes[1], told(outcome)

    refused: list[tuple[dict[str, Any], str]] = [
        ({"encoder": "encode.qcow2"}, "encode.qcow2 can't replace what it has placed"),
        ({"checks": ()}, "add checksum.guest"),
        ({"writer": 'write.pipe; command = ["sh", "-c", "cat > /dev/null"]'}, "write.pipe can't replace"),
        ({"behind": ("compress.lz4",)}, "compress.lz4 can't take back"),
        ({"behind": ("checksum.image",)}, "checksum.image can't take back"),
    ]
    for number, (more, reason) in enumerate(refused):
        note, consistency = await notes(number, **more)
        assert reason in note
        assert note.startswith("what changes meanwhile is not sent again")
        assert reason in consistency["not_read_again"]
        assert (consistency["achieved"], consistency["rereads"]) == ("live", 0)
    note, consistency = await notes(10)
    assert "up to 3 times" in note
    assert consistency["achieved"] == "settled"


async def test_rereads_can_be_left_out(tmp_path: Path, in_use: None, before_look: Any) -> None:
    before_look({1: lambda: pytest.fail("looked again")})
    outcome = await exported(write_disk(tmp_path / "disk", "AB", MiB), "rereads = 0", folder=tmp_path)
    assert told(outcome)["achieved"] == "live"
    assert "rereads" not in told(outcome)


async def test_a_server_that_takes_writes_in_order_only_is_not_looked_at_again(
    tmp_path: Path, request: pytest.FixtureRequest, in_use: None, before_look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def in_order(self: SftpWriter) -> None:
        self._in_order = True

    monkeypatch.setattr(SftpWriter, "_probe", in_order)
    before_look({1: lambda: pytest.fail("looked again")})
    events: list[Event] = []
    disk = write_disk(tmp_path / "disk", "AB", MiB)
    with _sftp(tmp_path, request, 0) as (stage, stored):
        outcome = await exported(disk, folder=tmp_path, writer=stage, events=events)
        assert stored() == disk.read_bytes()
    assert told(outcome)["achieved"] == "live"
    assert any(isinstance(event, FallbackTaken) and "not read again" in event.what for event in events)


async def test_a_hole_that_is_filled_while_the_image_is_verified_is_no_fault_of_the_image(
    tmp_path: Path, in_use: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = write_disk(tmp_path / "disk", "AB-----C", MiB)
    real = DiskReader.conclude

    async def filled(self: DiskReader) -> None:
        await real(self)
        change(disk, dict.fromkeys(range(2, 7), "x"))

    monkeypatch.setattr(DiskReader, "conclude", filled)
    outcome = await exported(disk, folder=tmp_path)
    assert (outcome.state, told(outcome)["achieved"]) == ("identical", "settled")


async def test_a_hole_that_the_first_pass_found_last_is_looked_up_again(
    tmp_path: Path, in_use: None, before_look: Any
) -> None:
    disk = write_disk(tmp_path / "disk", "--AB", MiB)
    before_look({1: lambda: change(disk, {0: "c"})})
    assert told(await exported(disk, folder=tmp_path))["changed_bytes"] == [MiB, 0]
    assert (tmp_path / "image").read_bytes() == disk.read_bytes()


# ---- failures --------------------------------------------------------------------------------------------------------


async def test_a_run_that_ended_while_it_replaced_goes_on_before_the_first_replaced_byte(
    tmp_path: Path, in_use: None, before_look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal's digests are those of the bytes before; what was replaced must not count as known."""
    letters = "".join(chr(ord("a") + number % 26) for number in range(48))
    disk = write_disk(tmp_path / "disk", letters, MiB)
    monkeypatch.setattr("pipeline.flow.resume.POINT_EVERY_S", 0.0)
    monkeypatch.setattr("pipeline.flow.resume.POINT_SHARE", 0)
    monkeypatch.setattr(ranges, "_MARK_EVERY_S", 0.0)
    monkeypatch.setattr(ranges, "_MARK_SHARE", 0)
    changes = {24: "B", 40: "C"}
    before_look({1: lambda: change(disk, changes)})
    real = ranges.RangeDriver._write_batch

    async def fail(self: ranges.RangeDriver, batch: Any) -> None:
        if self._generation and batch.parts[0][0] >= 40 * MiB:
            with anyio.fail_after(10):  # the earlier one is there for sure
                while len(self._writing) > 1:
                    await anyio.lowlevel.checkpoint()
            raise StoreError("no route to host", operation="write", temporary=True)
        await real(self, batch)

    monkeypatch.setattr(ranges.RangeDriver, "_write_batch", fail)
    attempt = Attempt(mode=Mode.NEW, command="x")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(KeptError):
        await exported(disk, folder=tmp_path, attempt=attempt)
    monkeypatch.setattr(ranges.RangeDriver, "_write_batch", real)
    # Back to what the first pass saw: who believes its digests finds nothing to send.
    change(disk, {number: letters[number] for number in changes})
    events: list[Event] = []
    outcome = await exported(disk, folder=tmp_path, attempt=Attempt(mode=Mode.RESUME, command="x"), events=events)
    [resumed] = [event for event in events if isinstance(event, RunResumed)]
    assert 0 < resumed.guest_bytes <= 24 * MiB
    assert outcome.state == "identical"
    assert (tmp_path / "image").read_bytes() == disk.read_bytes()


async def test_a_disk_that_fails_in_a_later_look_fails_the_run(
    tmp_path: Path, in_use: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = write_disk(tmp_path / "disk", "ABCDEFGH", MiB)
    real = Rereading._look

    async def look(self: Rereading, number: int, outlet: Any) -> int:
        os.truncate(disk, 3 * MiB)
        return await real(self, number, outlet)

    monkeypatch.setattr(Rereading, "_look", look)
    with pytest.raises(SourceError, match="shorter"):
        await exported(disk, folder=tmp_path)
    assert not (tmp_path / "image").exists()
