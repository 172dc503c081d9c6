"""write.nbd and write.device through whole chains: nbdkit, qemu-nbd and loop devices."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from pipeline.config.continuing import Attempt, Mode
from pipeline.errors import KeptError, LeftBehindError, PipelineError, PlanError, StoreError, VerificationError
from pipeline.events import Event, ProgressSampled, RetryScheduled, RunResumed
from pipeline.flow import resume
from pipeline.flow.engine import Outcome
from pipeline.units import MiB
from stages.store import nbd as store_nbd
from stages.write import device as device_writer
from stages.write import nbd as writer
from stages.write import ranges
from tests.chains import export, write_toml
from tests.decode.images import run
from tests.disks.letters import write_disk
from tests.disks.mounts import loop_device, mounted, system
from tests.end_to_end.command import call
from tests.stores.nbd import NbdServer

LETTERS = "AB0-A" * 3 + "-" * 20 + "C"


class Case:
    """A disk, and exports of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[Event] = []
        self.disk = write_disk(folder / "disk.raw", LETTERS, MiB, 512)

    @property
    def content(self) -> bytes:
        """Of the disk."""
        return self.disk.read_bytes()

    def toml(self, target: str, *more: str) -> Path:
        """An export to a stage with its options."""
        source = f'read.disk; path = "{self.disk}"'
        stages = (source, "checksum.guest", "sparse.zeros", "encode.raw", target, *more)
        return write_toml(self.folder / "export.toml", *stages)

    async def to(self, url: str, *more: str, attempt: Attempt | None = None) -> Outcome:
        """Run it to an NBD export; `more` are options of write.nbd."""
        options = "".join(f"; {one}" for one in more)
        toml = self.toml(f'write.nbd; url = "{url}"{options}', "verify.readback")
        return await export(toml, events=self.events, attempt=attempt)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A disk of the test's own."""
    return Case(tmp_path)


def image_on(server: NbdServer, folder: Path, length: int) -> bytes:
    """The first bytes of an export, fetched with nbdcopy."""
    run("nbdcopy", server.url(), str(folder / "fetched"))
    return (folder / "fetched").read_bytes()[:length]


# ---- NBD -------------------------------------------------------------------------------------------------------------


async def test_a_fresh_export_gets_the_data_only(case: Case) -> None:
    stats = case.folder / "stats"
    with NbdServer("nbdkit", "--filter=stats", "memory", "64M", f"statsfile={stats}") as server:
        outcome = await case.to(server.url())
        assert outcome.state == "identical"
        assert image_on(server, case.folder, len(case.content)) == case.content
        server.process.stop()
    written = next(line for line in stats.read_text().splitlines() if line.startswith("write:"))
    assert written.split(",")[2].split()[0] == "10.00", written
    assert "zero:" not in stats.read_text()
    last = [event for event in case.events if isinstance(event, ProgressSampled)][-1]
    assert last.acked_bytes == len(case.content)


@pytest.mark.parametrize("filters", [(), ("--filter=nozero",), ("--filter=noextents",), ("--no-sr",)])
async def test_an_export_with_old_data_is_overwritten_when_asked(case: Case, filters: tuple[str, ...]) -> None:
    old = case.folder / "old"
    old.write_bytes(b"\xee" * len(case.content) + b"\xee" * 3 * MiB)
    with NbdServer("nbdkit", *filters, "file", old) as server:
        with pytest.raises(PlanError, match="holds data") as caught:
            await case.to(server.url())
        assert "overwrite = true" in caught.value.hint
        assert old.read_bytes().count(0xEE) == old.stat().st_size, "nothing was touched"
        outcome = await case.to(server.url(), "overwrite = true")
        assert outcome.state == "identical"
    assert old.read_bytes()[: len(case.content)] == case.content
    assert old.read_bytes()[len(case.content) :] == b"\xee" * 3 * MiB


async def test_a_qcow2_behind_qemu_nbd_stays_small(case: Case) -> None:
    image = case.folder / "target.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "64M")
    with NbdServer("qemu-nbd", "-f", "qcow2", image, on="socket") as server:
        assert (await case.to(server.url())).state == "identical"
        server.process.stop()
    assert image.stat().st_size < 12 * MiB
    run("qemu-img", "convert", "-O", "raw", str(image), str(case.folder / "back"))
    assert (case.folder / "back").read_bytes()[: len(case.content)] == case.content


async def test_tls_all_the_way(case: Case) -> None:
    with NbdServer("nbdkit", "memory", "64M", with_tls=True, with_client_certificates=True) as server:
        assert (await case.to(server.url())).state == "identical"
        no_certificate = server.url().partition("?")[0]
        with pytest.raises(PlanError, match="not trusted"):
            await case.to(no_certificate)
        with pytest.raises(PlanError, match="the CA file can't be read: no such file"):
            await case.to(no_certificate, f'ca_file = "{case.folder / "none.pem"}"')
        ca = server.certificates / "ca-cert.pem"
        with pytest.raises(PipelineError, match=r"TLS failed|can't connect"):
            await case.to(no_certificate, f'ca_file = "{ca}"', "attempts = 1")


async def test_what_does_not_fit_is_refused_before_anything_is_written(case: Case) -> None:
    with NbdServer("nbdkit", "memory", "8M") as server:
        with pytest.raises(PlanError, match="smaller than the disk"):
            await case.to(server.url())
        toml = write_toml(
            case.folder / "e.toml", f'read.disk; path = "{case.disk}"', 'encode.vhd; variant = "fixed"',
            f'write.nbd; url = "{server.url()}"',
        )  # fmt: skip
        with pytest.raises(PlanError, match=r"use encode.raw|Use encode.raw|image is a vhd file"):
            await export(toml)
    with NbdServer("nbdkit", "-r", "memory", "64M") as server:
        with pytest.raises(PlanError, match="read-only"):
            await case.to(server.url())
    with pytest.raises(StoreError, match="can't connect"):
        await case.to(server.url(), "attempts = 1")


async def test_a_failed_export_leaves_no_partition_table(case: Case) -> None:
    armed = case.folder / "armed"
    target = case.folder / "target"
    target.write_bytes(b"\xee" * len(case.content))
    arguments = ("--filter=error", "file", target, "error=ENOSPC", "error-pwrite-rate=30%", f"error-file={armed}")
    with NbdServer("nbdkit", *arguments) as server:
        armed.touch()
        with pytest.raises((StoreError, LeftBehindError), match="no space left"):
            await case.to(server.url(), "overwrite = true")
        armed.unlink()
    data = target.read_bytes()
    assert not any(data[:MiB])
    assert not any(data[-MiB:])


async def test_a_mismatch_makes_the_target_unusable(case: Case) -> None:
    """Bytes that change behind the server's back, found by reading them back."""
    target = case.folder / "target"
    target.write_bytes(bytes(len(case.content)))

    def damage(event: Event) -> None:
        if type(event).__name__ == "ImageSealed":
            with target.open("r+b") as file:
                file.seek(MiB + 100)
                file.write(b"!")

    class Damaging(list[Event]):
        def append(self, event: Event) -> None:
            damage(event)
            super().append(event)

    case.events = Damaging()
    with NbdServer("nbdkit", "file", target) as server:
        with pytest.raises(VerificationError):
            await case.to(server.url())
    assert not any(target.read_bytes()[:MiB])


async def test_a_server_that_is_restarted_goes_on_where_nothing_was_lost(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = case.folder / "target"
    target.write_bytes(b"\xee" * len(case.content))
    with NbdServer("nbdkit", "file", target) as server:
        _restart_during_the_third_write(server, monkeypatch)
        assert (await case.to(server.url(), "overwrite = true")).state == "identical"
    assert any(isinstance(event, RetryScheduled) for event in case.events)
    assert target.read_bytes() == case.content


async def test_a_server_that_forgot_what_it_had_acknowledged_is_found_out(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is gone with the process; without this, the image would have a hole where data was."""
    with NbdServer("nbdkit", "memory", "64M") as server:
        _restart_during_the_third_write(server, monkeypatch)
        with pytest.raises(StoreError, match="lost bytes that it had acknowledged"):
            await case.to(server.url())


async def test_what_was_under_way_in_a_restart_is_sent_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of it was acknowledged by the server that is gone, and noted by nobody yet."""
    with NbdServer("nbdkit", "memory", "64M") as server:
        plain = store_nbd.NbdClient.write
        calls = 0

        async def write(self: store_nbd.NbdClient, parts: Sequence[tuple[int, memoryview]]) -> None:
            nonlocal calls
            calls += 1
            await plain(self, parts)
            if calls == 1:
                await anyio.to_thread.run_sync(server.restart)
                await self.flush()  # meets the loss, as another request under way would

        monkeypatch.setattr(store_nbd.NbdClient, "write", write)
        assert (await case.to(server.url())).state == "identical"


async def test_a_server_that_is_lost_again_and_again_is_given_up(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it comes back: each time some of the batch may have gone to one that is gone."""
    plain = store_nbd.NbdClient.write
    sent: list[int] = []

    async def write(self: store_nbd.NbdClient, parts: Sequence[tuple[int, memoryview]]) -> None:
        await plain(self, parts)
        sent.extend(offset for offset, _ in parts)
        self.losses += 1  # as if a connection had been found broken

    monkeypatch.setattr(store_nbd.NbdClient, "write", write)
    with NbdServer("nbdkit", "memory", "64M") as server:
        with pytest.raises((StoreError, LeftBehindError), match="lost each of the 3 times"):
            await case.to(server.url(), "attempts = 3")
    assert max(sent.count(offset) for offset in sent) == 3


def _restart_during_the_third_write(server: NbdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = writer.NbdTarget.write
    calls = 0

    async def write(self: writer.NbdTarget, parts: list[tuple[int, memoryview]]) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            while not self._unsure:  # what is still under way is sent again: something has to be acknowledged
                await anyio.lowlevel.checkpoint()
            await anyio.to_thread.run_sync(server.restart)
        await plain(self, parts)

    monkeypatch.setattr(writer.NbdTarget, "write", write)


async def test_an_export_that_failed_half_way_is_resumed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "POINT_EVERY_S", 0.0)
    monkeypatch.setattr(ranges, "_MARK_EVERY_S", 0.001)
    monkeypatch.setattr(ranges, "_MARK_SHARE", 0)
    target, armed = case.folder / "target", case.folder / "armed"
    target.write_bytes(bytes(len(case.content)))
    arguments = ("--filter=delay", "--filter=error", "file", target, "wdelay=50ms")
    with NbdServer("nbdkit", *arguments, "error=EIO", "error-pwrite-rate=100%", f"error-file={armed}") as server:
        plain = writer.NbdTarget.write
        calls = 0

        async def write(self: writer.NbdTarget, parts: list[tuple[int, memoryview]]) -> None:
            nonlocal calls
            calls += 1
            if calls == 6:
                await anyio.sleep(0.2)  # a mark is set
                armed.touch()
            await plain(self, parts)

        monkeypatch.setattr(writer.NbdTarget, "write", write)
        with pytest.raises(KeptError):
            await case.to(server.url(), "attempts = 1", attempt=Attempt(command="pipeline run x"))
        armed.unlink()
        assert any(target.read_bytes()[:MiB]), "kept"
        # nbdkit may have ended: it does at times, where a connection is cut while its filter sleeps.
        await anyio.to_thread.run_sync(server.restart)
        attempt = Attempt(mode=Mode.RESUME, command="pipeline run x")
        assert (await case.to(server.url(), "attempts = 1", attempt=attempt)).state == "identical"
    resumed = [event for event in case.events if isinstance(event, RunResumed)]
    assert len(resumed) == 1
    assert target.read_bytes() == case.content


def test_convert_writes_to_an_export_and_verify_takes_the_local_manifest(tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk.raw", "ABC-0D", MiB)
    run("qemu-img", "convert", "-O", "qcow2", str(disk), str(tmp_path / "disk.qcow2"))
    with NbdServer("nbdkit", "memory", "6M") as server:
        said = call("convert", str(tmp_path / "disk.qcow2"), server.url(), "-O", "raw")
        assert said.code == 0, said.err
        run("nbdcopy", server.url(), str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == disk.read_bytes()
        toml = write_toml(
            tmp_path / "e.toml", f'read.disk; path = "{disk}"', "checksum.guest", "encode.raw",
            f'write.nbd; url = "{server.url()}"; overwrite = true',
        )  # fmt: skip
        manifest = tmp_path / "local.json"
        said = call("run", toml, "--set", f"export.manifest={manifest}")
        assert said.code == 0, said.err
        assert call("verify", server.url(), "--manifest", str(manifest)).code == 0
        run("qemu-io", "-f", "raw", "-c", "write -P 1 0 512", server.url())
        assert call("verify", server.url(), "--manifest", str(manifest)).code == 3


# ---- devices ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device over a file full of old data."""
    if os.geteuid() != 0:
        pytest.skip("loop devices are root's")
    old = tmp_path / "old"
    old.write_bytes(b"\xee" * 40 * MiB)
    with loop_device(old, read_only=False) as path:
        yield path


async def to_device(case: Case, device: Path, *more: str) -> Outcome:
    options = "".join(f"; {one}" for one in more)
    return await export(case.toml(f'write.device; path = "{device}"{options}', "verify.readback"), events=case.events)


async def test_a_device_holds_the_disk_and_keeps_what_is_behind_it(case: Case, device: Path) -> None:
    with pytest.raises(PlanError, match="holds data"):
        await to_device(case, device)
    assert (await to_device(case, device, "overwrite = true")).state == "identical"
    data = device.read_bytes()
    assert data[: len(case.content)] == case.content
    assert data[len(case.content) :].count(0xEE) == 40 * MiB - len(case.content)


@pytest.mark.parametrize("sector", [512, 4096])
async def test_a_blank_device_needs_no_consent(case: Case, tmp_path: Path, sector: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("loop devices are root's")
    blank = tmp_path / "blank"
    with blank.open("wb") as file:
        file.truncate(40 * MiB)
    with loop_device(blank, read_only=False, sector=sector) as path:
        assert (await to_device(case, path)).state == "identical"
    assert blank.read_bytes()[: len(case.content)] == case.content


async def test_an_export_to_a_device_that_failed_half_way_is_resumed(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without consent to overwrite: what it holds now is the export's own. What is on the medium is not sent again."""
    if os.geteuid() != 0:
        pytest.skip("loop devices are root's")
    monkeypatch.setattr(resume, "POINT_EVERY_S", 0.0)
    monkeypatch.setattr(ranges, "_MARK_EVERY_S", 0.001)
    monkeypatch.setattr(ranges, "_MARK_SHARE", 0)
    blank = tmp_path / "blank"
    with blank.open("wb") as file:
        file.truncate(40 * MiB)
    plain, note_mark = device_writer.DeviceTarget.write, resume.RunJournal.note_mark
    written: list[int] = []
    marked = anyio.Event()
    fails_at = 6

    async def write(self: device_writer.DeviceTarget, parts: Sequence[tuple[int, memoryview]]) -> None:
        if len(written) == fails_at:
            with anyio.fail_after(20):
                await marked.wait()
            raise StoreError("the cable is out", operation="write", status=errno.EIO)
        written.append(sum(view.nbytes for _, view in parts))
        await plain(self, parts)

    def note(self: resume.RunJournal, position: int) -> None:
        note_mark(self, position)
        marked.set()

    monkeypatch.setattr(device_writer.DeviceTarget, "write", write)
    monkeypatch.setattr(resume.RunJournal, "note_mark", note)
    with loop_device(blank, read_only=False) as device:
        toml = case.toml(f'write.device; path = "{device}"', "verify.readback")
        with pytest.raises(KeptError):
            await export(toml, events=case.events, attempt=Attempt(command="pipeline run x"))
        assert any(blank.read_bytes()[:MiB]), "kept"
        first, fails_at = sum(written), -1
        again = Attempt(mode=Mode.RESUME, command="pipeline run x")
        assert (await export(toml, events=case.events, attempt=again)).state == "identical"
    assert sum(written) - first < sum(map(str.isalpha, LETTERS)) * MiB, "not all of it again"
    assert len([event for event in case.events if isinstance(event, RunResumed)]) == 1
    assert blank.read_bytes()[: len(case.content)] == case.content


async def test_a_mounted_device_is_refused(case: Case, device: Path, tmp_path: Path) -> None:
    system("mkfs.ext4", "-q", "-F", device)
    (tmp_path / "mnt").mkdir()
    with mounted(tmp_path / "mnt", "ext4", device):
        with pytest.raises(PlanError, match=f"in use: mounted on {tmp_path / 'mnt'}"):
            await to_device(case, device, "overwrite = true")
    assert (await to_device(case, device, "overwrite = true")).state == "identical"


async def test_a_device_with_a_mounted_partition_is_refused(case: Case, device: Path, tmp_path: Path) -> None:
    system("sgdisk", "-o", "-n", "1:2048:0", device, check=False)
    with ExitStack() as stack:
        system("partx", "-a", device, check=False)
        stack.callback(system, "partx", "-d", device, check=False)
        part = Path(f"{device}p1")
        system("mkfs.ext4", "-q", "-F", part)
        (tmp_path / "mnt").mkdir()
        with mounted(tmp_path / "mnt", "ext4", part):
            with pytest.raises(PlanError, match="in use: mounted on"):
                await to_device(case, device, "overwrite = true")


async def test_a_file_is_no_device_and_the_source_no_target(case: Case, tmp_path: Path, device: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="no block device"):
        await to_device(case, tmp_path / "file")
    case.disk = device
    with pytest.raises(PlanError, match="the target is the source"):
        await to_device(case, device, "overwrite = true")
    case.disk = tmp_path / "old"
    with pytest.raises(PlanError, match="lies on the source"):
        await to_device(case, device, "overwrite = true")
