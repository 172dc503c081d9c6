"""write.sftp through whole chains, against OpenSSH and against a server that takes writes in order only."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import anyio
import anyio.to_thread
import asyncssh
import pytest

from pipeline.config.continuing import Attempt, Mode, journal_path
from pipeline.config.options import Secret
from pipeline.config.parse import load_config
from pipeline.errors import AlreadyFinished, KeptError, LeftBehindError, PlanError, StoreError, VerificationError
from pipeline.events import (
    Event,
    FallbackTaken,
    LeftoverFound,
    ProgressSampled,
    RetryScheduled,
    RunResumed,
    UploadKept,
    UploadRemoved,
)
from pipeline.flow import resume
from pipeline.flow.engine import Outcome
from pipeline.flow.orders import Order
from pipeline.flow.retry import Retry, RetryPolicy
from pipeline.flow.stage import Clock, RealClock, SinkRequest
from pipeline.units import KiB, MiB
from stages.catalog import CATALOG
from stages.store.sftp import Login, Patience, Session, SftpClient, SftpUrl, connected
from stages.write import ranges
from stages.write.sftp import Options, SftpWriter
from tests.chains import export, write_toml
from tests.disks.letters import write_disk
from tests.stores.link import Link, Network
from tests.stores.openssh import OpenSsh, SftpServer
from tests.stores.process import free_ports
from tests.write.images import Collected, Image, QuickClock, make_context, mixed

ENCODERS = ["encode.raw", "encode.qcow2", 'encode.qcow2; compression = "none"']


@pytest.fixture(autouse=True)
def _no_keys_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@dataclass
class Target:
    """A name on a server, and what a run against it needs."""

    server: SftpServer
    tmp: Path
    name: str = ""
    port: int = 0
    known_hosts: Path | None = None
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.name or f"{self.tmp.name} image.ä"
        self.known_hosts = self.known_hosts or self.server.known_hosts

    @property
    def url(self) -> str:
        """Quoted where a URL has to be."""
        return SftpUrl.parse(self.server.url("x", port=self.port)).at(f"{self.server.remote}/{self.name}")

    @property
    def path(self) -> Path:
        """The file as this machine sees it."""
        return self.server.data / self.name

    @property
    def left(self) -> list[str]:
        """Names of ours on the server, of the image and of what may be left."""
        return sorted(path.name for path in self.server.data.iterdir() if self.name in path.name)

    def toml(self, *more: str, encoder: str = "encode.raw", options: str = "") -> Path:
        """An export of the disk in `tmp`."""
        login = f'identity_files = ["{self.server.identity}"]; known_hosts = "{self.known_hosts}"'
        return write_toml(
            self.tmp / "export.toml",
            f'read.disk; path = "{self.tmp / "disk"}"',
            "checksum.guest",
            "sparse.zeros",
            encoder,
            f'write.sftp; url = "{self.url}"; {login}{"; " + options if options else ""}',
            *more,
        )

    async def export(self, *more: str, encoder: str = "encode.raw", options: str = "") -> Outcome:
        """Run it."""
        return await export(self.toml(*more, encoder=encoder, options=options), events=self.events)

    def options(self, **changes: object) -> Options:
        """Of a writer without a chain."""
        given: dict[str, object] = {
            "url": self.url,
            "identity_files": (self.server.identity,),
            "known_hosts": self.known_hosts,
        }
        return Options(**{**given, **changes})  # type: ignore[arg-type]  # the types are those of Options' fields

    @asynccontextmanager
    async def planned(
        self,
        image: Image,
        *,
        patience: Patience | None = None,
        order: Order = Order.SPARSE,
        clock: Clock | None = None,
        disk_size: int | None = None,
        **options: object,
    ) -> AsyncIterator[SftpWriter]:
        """A writer after its planning, closed at the end."""
        context = make_context(image, events=self.events, clock=QuickClock(), disk_size=disk_size)
        writer = SftpWriter(
            self.options(**options),
            replace(context, name="write.sftp", order=order, clock=clock or context.clock),
            patience=patience,
            retry_policy=RetryPolicy(),
        )
        try:
            await writer.plan(SinkRequest(layout=image.layout(), order=order, memory=64 * MiB))
            yield writer
        finally:
            await writer.close()


@pytest.fixture
def target(sftp_server: SftpServer, tmp_path: Path) -> Target:
    """A name of the test's own on the session's server."""
    return Target(sftp_server, tmp_path)


# ---- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("letters, block, tail", [("AB0-A" * 3, MiB, 0), ("A0B-" * 9, 60 * KiB, 512), ("", 1, 512)])
async def test_the_server_holds_the_disk(target: Target, encoder: str, letters: str, block: int, tail: int) -> None:
    disk = write_disk(target.tmp / "disk", letters, block, tail)
    outcome = await target.export("verify.readback", encoder=encoder)
    assert outcome.state == "identical"
    kind = "raw" if "raw" in encoder else "qcow2"
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", kind, disk, target.path], check=True, capture_output=True)
    assert target.left == [target.name, f"{target.name}.manifest.json"]
    assert outcome.uri == target.url
    last = [event for event in target.events if isinstance(event, ProgressSampled)][-1]
    assert last.acked_bytes == outcome.disk_size


async def test_zeros_are_not_sent_and_become_holes(target: Target) -> None:
    write_disk(target.tmp / "disk", "A" + "0" * 20 + "-" * 20 + "B", MiB)
    outcome = await target.export("verify.readback")
    assert outcome.stored_bytes <= 2 * MiB + 128 * KiB
    assert target.path.stat().st_size == 42 * MiB
    assert target.path.stat().st_blocks * 512 <= 2 * MiB + 128 * KiB


async def test_any_command_can_read_it_by_url(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the usual keys and known hosts, which `pipeline verify sftp://...` uses."""
    from stages.write.sftp import open_reader

    write_disk(target.tmp / "disk", "AB", MiB)
    await target.export()
    ssh = target.tmp / ".ssh"
    ssh.mkdir()
    (ssh / "id_ed25519").write_bytes(target.server.identity.read_bytes())
    (ssh / "known_hosts").write_bytes(target.server.known_hosts.read_bytes())
    async with open_reader(target.url) as reader:
        assert reader.size == 2 * MiB
        assert await reader.read(MiB - 3, 7) == target.path.read_bytes()[MiB - 3 : MiB + 4]
        assert await reader.read(0, 2 * MiB) == target.path.read_bytes()
        for offset, length in ((2 * MiB, 1), (2 * MiB - 1, 2)):
            with pytest.raises(Exception, match="ends before this range"):
                await reader.read(offset, length)


async def test_what_nobody_knows_of_is_not_read(target: Target) -> None:
    login = Login(identity_files=(target.server.identity,), known_hosts=target.known_hosts)
    async with connected(target.url, login) as client:
        assert await client.state(client.where.path) is None


async def test_no_empty_packets_are_sent_ahead_of_the_others(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what guards ciphers in CBC mode would need them (SSH_MSG_IGNORE is 2)."""
    kinds: list[int] = []
    send = asyncssh.SSHClientConnection.send_packet

    def counted(self: asyncssh.SSHClientConnection, kind: int, *args: bytes, **named: object) -> None:
        kinds.append(kind)
        send(self, kind, *args, **named)  # type: ignore[arg-type]  # as it came

    monkeypatch.setattr(asyncssh.SSHClientConnection, "send_packet", counted)
    login = Login(identity_files=(target.server.identity,), known_hosts=target.known_hosts)
    async with connected(target.url, login) as client:
        for _ in range(3):
            await client.state(".")
    opened = kinds.index(90)  # SSH_MSG_CHANNEL_OPEN: from here on it is ours
    assert len(kinds) > opened + 3
    assert 2 not in kinds[opened:]


async def test_bytes_go_out_at_the_limit(target: Target) -> None:
    image = mixed(8 * MiB, zeros=False)
    async with target.planned(image, rate_limit=MiB) as writer:
        clock = writer._context.clock
        begun = clock.now()
        await writer.run(image.pieces(), Collected())
        assert clock.now() - begun == pytest.approx(7, abs=2)


# ---- planning ------------------------------------------------------------------------------------------------------


async def test_an_existing_target_is_refused_and_kept(target: Target) -> None:
    write_disk(target.tmp / "disk", "A", MiB)
    for name in (target.name, f"{target.name}.manifest.json"):
        (target.server.data / name).write_text("precious")
        with pytest.raises(PlanError, match="target exists"):
            await target.export()
        assert (target.server.data / name).read_text() == "precious"
        (target.server.data / name).unlink()


async def test_overwrite_replaces_at_the_end_in_one_step(target: Target) -> None:
    disk = write_disk(target.tmp / "disk", "AB", MiB)
    target.path.write_text("old")
    seen: list[str] = []

    class Looking(list):  # type: ignore[type-arg]
        def append(self, event: Event) -> None:
            if type(event).__name__ == "ImageSealed":
                seen.append(target.path.read_text())

    await export(target.toml(options="overwrite = true"), events=Looking())
    assert seen == ["old"]
    assert target.path.read_bytes() == disk.read_bytes()


async def test_a_missing_folder_is_told_with_the_command_that_makes_it(target: Target) -> None:
    write_disk(target.tmp / "disk", "A", MiB)
    target.name = f"absent/{target.name}"
    with pytest.raises(PlanError, match="folder does not exist") as caught:
        await target.export()
    assert "mkdir" in caught.value.hint


async def test_the_target_must_not_be_a_folder(target: Target) -> None:
    write_disk(target.tmp / "disk", "A", MiB)
    target.path.mkdir()
    with pytest.raises(PlanError, match="is a folder"):
        await target.export()


async def test_an_unknown_server_is_refused_with_its_fingerprint_and_the_way_out(target: Target) -> None:
    write_disk(target.tmp / "disk", "A", MiB)
    target.known_hosts = target.tmp / "none yet"
    with pytest.raises(PlanError, match="host key is not known") as caught:
        await target.export()
    shown = subprocess.run(
        ["ssh-keygen", "-lf", target.server.host_key], check=True, capture_output=True, text=True
    ).stdout.split()[1]
    assert shown in str(caught.value)
    command = caught.value.hint.partition("If it is the same: ")[2]
    subprocess.run(command, shell=True, check=True)
    await target.export()


async def test_a_changed_host_key_is_refused_as_what_it_may_be(target: Target) -> None:
    write_disk(target.tmp / "disk", "A", MiB)
    wrong = (target.server.stranger.with_suffix(".pub")).read_text().split()
    target.known_hosts = target.tmp / "known"
    target.known_hosts.write_text(f"[127.0.0.1]:{target.server.port} {wrong[0]} {wrong[1]}\n")
    with pytest.raises(PlanError, match="somebody may be in between"):
        await target.export()
    assert target.left == []


async def test_without_any_known_hosts_nothing_is_trusted(target: Target) -> None:
    write_disk(target.tmp / "disk", "A", MiB)
    image = mixed(MiB)
    with pytest.raises(PlanError, match="host key is not known"):
        async with target.planned(image, known_hosts=None):
            pass


async def test_a_key_that_opens_nothing_is_told(target: Target) -> None:
    with pytest.raises(PlanError, match="refuses the login"):
        async with target.planned(mixed(MiB), identity_files=(target.server.stranger,)):
            pass
    with pytest.raises(PlanError, match="private key can't be used"):
        async with target.planned(mixed(MiB), identity_files=(target.tmp / "none",)):
            pass


@pytest.mark.parametrize("url", ["sftp://host", "sftp://host/", "sftp:///x", "sftp://host/a/", "http://host/x", "x"])
async def test_what_names_no_file_is_refused(target: Target, url: str) -> None:
    with pytest.raises(PlanError, match="does not name a file"):
        async with target.planned(mixed(MiB), url=url):
            pass


async def test_a_password_in_the_url_is_refused_and_never_shown(target: Target) -> None:
    with pytest.raises(PlanError, match="password must not be in the URL") as caught:
        async with target.planned(mixed(MiB), url="sftp://me:hunter2@host/x"):
            pass
    assert "hunter2" not in f"{caught.value} {caught.value.hint}"


async def test_where_nobody_listens_is_told_within_the_deadline(target: Target) -> None:
    (port,) = free_ports(1)
    target.port = port
    with anyio.fail_after(10), pytest.raises(StoreError, match="can't connect: Connection refused"):
        async with target.planned(mixed(MiB)):
            pass


def test_without_asyncssh_the_hint_says_what_to_install() -> None:
    code = (
        "import sys, anyio; sys.modules['asyncssh'] = None\n"
        "from stages.catalog import CATALOG\n"
        "from stages.write.sftp import open_reader\n"
        "from pipeline.errors import PlanError\n"
        "async def main():\n"
        "    async with open_reader('sftp://host/x'): pass\n"
        "try: anyio.run(main)\n"
        "except PlanError as error: print(error.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "pip install 'disk-pipeline[sftp]'\n"


# ---- a server that takes writes in order only, a password, and other oddities --------------------------------------


class InOrder(asyncssh.SFTPServer):
    """Writes at the end of the file only, like servers over object stores. Has no OpenSSH extensions of its own."""

    def write(self, file_obj: object, offset: int, data: bytes) -> int:
        """Refuse gaps and rewriting."""
        size = os.fstat(file_obj.fileno()).st_size  # type: ignore[attr-defined]
        if offset != size:
            raise asyncssh.SFTPFailure("only appending")
        return super().write(file_obj, offset, data)  # type: ignore[return-value]

    def fsetstat(self, file_obj: object, attrs: object) -> None:
        """Refuse to resize."""
        raise asyncssh.SFTPOpUnsupported("no")

    def fsync(self, file_obj: object) -> None:
        """Refuse."""
        raise asyncssh.SFTPOpUnsupported("no")


class _Login(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return password == "open sesame"


@asynccontextmanager
async def in_order_server(target: Target) -> AsyncIterator[None]:
    """Point the target at such a server, which asks for a password."""
    host_key = asyncssh.generate_private_key("ssh-ed25519")
    async with await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=_Login,
        server_host_keys=[host_key],
        sftp_factory=lambda channel: InOrder(channel),
    ) as listener:
        target.port = listener.get_port()
        target.known_hosts = target.tmp / "known-in-order"
        key = host_key.export_public_key().decode().split()
        target.known_hosts.write_text(f"[127.0.0.1]:{target.port} {key[0]} {key[1]}\n")
        yield


PASSWORD = Secret("SFTP_PASSWORD", "open sesame")


async def test_a_server_that_takes_writes_in_order_gets_every_byte_in_order(target: Target) -> None:
    image = mixed(12 * MiB)
    async with in_order_server(target):
        async with target.planned(image, identity_files=(), password=PASSWORD) as writer:
            await writer.run(image.pieces(), Collected())
            await writer.publish(b"{}")
    assert target.path.read_bytes() == image.data
    told = [event.what for event in target.events if isinstance(event, FallbackTaken)]
    assert told == ["every byte in order, zeros too", "no fsync on the server"]
    assert target.left == [target.name, f"{target.name}.manifest.json"]


async def test_gaps_are_filled_with_zeros_where_writes_come_in_order(target: Target) -> None:
    image = Image([(MiB, True), (3 * MiB, False), (MiB, True)])

    async def pieces() -> AsyncIterator[object]:
        async for piece in image.pieces():
            if piece.data is not None:
                yield piece

    async with in_order_server(target):
        async with target.planned(
            image, identity_files=(), password=PASSWORD, disk_size=image.guest_bytes - 6 * MiB
        ) as writer:
            await writer.run(pieces(), Collected())  # type: ignore[arg-type]  # it gives pieces
            await writer.publish(b"{}")
    assert target.path.read_bytes() == image.data


async def test_a_head_that_comes_last_is_refused_there_before_the_first_byte(target: Target) -> None:
    image = mixed(MiB, head_length=64 * KiB)
    async with in_order_server(target):
        async with target.planned(image, identity_files=(), password=PASSWORD, order=Order.HEAD_LAST) as writer:
            with pytest.raises(PlanError, match="takes writes in order only") as caught:
                await writer.run(image.pieces(), Collected())
    assert "encode.raw" in caught.value.hint
    assert target.left == []


async def test_a_wrong_password_is_told_and_never_shown(target: Target) -> None:
    async with in_order_server(target):
        with pytest.raises(PlanError, match="refuses the login") as caught:
            async with target.planned(mixed(MiB), identity_files=(), password=Secret("X", "hunter2")):
                pass
    assert "hunter2" not in f"{caught.value!r} {caught.value} {caught.value.hint}"


# ---- failures ------------------------------------------------------------------------------------------------------


async def interrupted(image: Image, at: int, act: Callable[[], object]) -> AsyncIterator[object]:
    """The image's pieces; something happens when `at` bytes of it are on their way."""
    done = False
    async for piece in image.pieces():
        yield piece
        if piece.end >= at and not done:
            done = True
            await anyio.to_thread.run_sync(act)


async def test_a_cut_connection_is_made_again_and_nothing_is_lost(own_openssh: OpenSsh, tmp_path: Path) -> None:
    target = Target(own_openssh.server, tmp_path)
    image = mixed(24 * MiB)
    async with target.planned(image) as writer:
        await writer.run(interrupted(image, 8 * MiB, own_openssh.cut), Collected())  # type: ignore[arg-type]
        await writer.publish(b"{}")
        assert writer._client.connections == 2
    assert target.path.read_bytes() == image.data


async def test_a_server_that_is_killed_and_comes_back_loses_nothing(own_openssh: OpenSsh, tmp_path: Path) -> None:
    target = Target(own_openssh.server, tmp_path)
    image = mixed(24 * MiB)
    async with target.planned(image, clock=RealClock()) as writer:
        await writer.run(interrupted(image, 8 * MiB, own_openssh.restart), Collected())  # type: ignore[arg-type]
        await writer.publish(b"{}")
    assert target.path.read_bytes() == image.data


async def test_a_killed_server_ends_the_run_and_says_what_may_be_left(own_openssh: OpenSsh, tmp_path: Path) -> None:
    target = Target(own_openssh.server, tmp_path)
    image = mixed(24 * MiB)
    async with target.planned(image) as writer:
        with anyio.fail_after(30), pytest.raises(LeftBehindError, match=r"can't connect|connection was lost") as caught:
            await writer.run(interrupted(image, 8 * MiB, own_openssh.kill), Collected())  # type: ignore[arg-type]
    (left,) = target.left
    assert left.endswith(".partial")
    await anyio.to_thread.run_sync(own_openssh.restart)
    assert caught.value.cause is not None
    by_hand, ours = caught.value.commands
    subprocess.run(by_hand, shell=True, check=True, capture_output=True)
    assert target.left == []
    assert ours.startswith("pipeline uploads abort ")


async def test_a_server_that_lost_what_it_acknowledged_is_found_out(own_openssh: OpenSsh, tmp_path: Path) -> None:
    """As after a power failure: the connection breaks, and the file is shorter than it was."""
    target = Target(own_openssh.server, tmp_path)
    image = mixed(24 * MiB, zeros=False)

    def crash() -> None:
        own_openssh.cut()
        (partial,) = target.server.data.glob(".*.partial")
        os.truncate(partial, 4096)

    async with target.planned(image) as writer:
        with pytest.raises(StoreError, match="lost bytes that it had acknowledged"):
            await writer.run(interrupted(image, 16 * MiB, crash), Collected())  # type: ignore[arg-type]
    assert target.left == []


async def test_a_line_that_falls_silent_is_given_up_and_the_next_one_used(
    sftp_server: SftpServer, tmp_path: Path
) -> None:
    """Nothing answers any more, nothing is closed: only a deadline of ours notices."""
    async with Link(sftp_server.port, Network()) as link:

        class Mending(list):  # type: ignore[type-arg]
            def append(self, event: Event) -> None:
                super().append(event)
                if isinstance(event, RetryScheduled):
                    link.mend()

        known = sftp_server.knows(link.port, tmp_path / "known")
        target = Target(sftp_server, tmp_path, port=link.port, known_hosts=known, events=Mending())
        image = mixed(24 * MiB, zeros=False)

        async def pieces() -> AsyncIterator[object]:
            is_cut = False
            async for piece in image.pieces():
                yield piece
                if piece.end > 8 * MiB and not is_cut:
                    is_cut = True
                    link.cut("blackhole")

        async with target.planned(image, patience=Patience(progress_s=1.0, login_s=5.0)) as writer:
            with anyio.fail_after(30):
                await writer.run(pieces(), Collected())  # type: ignore[arg-type]  # it gives pieces
                await writer.publish(b"{}")
    assert target.path.read_bytes() == image.data
    reasons = [event.reason for event in target.events if isinstance(event, RetryScheduled)]
    assert any("no answer for 1.0 s" in reason or "connection was lost" in reason for reason in reasons), reasons


@pytest.fixture
def small_server(tmp_path: Path) -> Iterator[OpenSsh]:
    """A server whose clients are locked into a 24 MiB ext4."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    # Not below /tmp, where the checkout may be too: sshd wants every folder above to be root's alone.
    image, mount = tmp_path / "small.ext4", Path(tempfile.mkdtemp(prefix="chroot-", dir="/run"))
    mount.chmod(0o755)
    with open(image, "wb") as file:
        file.truncate(24 * MiB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        with OpenSsh(chroot=mount) as store:
            yield store
    finally:
        subprocess.run(["umount", mount], check=True)
        mount.rmdir()


@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
async def test_a_full_disk_is_told_as_such_and_nothing_stays(
    small_server: OpenSsh, tmp_path: Path, encoder: str
) -> None:
    write_disk(tmp_path / "disk", "ABCDEFGH" * 5, MiB)
    target = Target(small_server.server, tmp_path)
    with pytest.raises(StoreError, match="No space left") as caught:
        await target.export(encoder=encoder)
    assert "The target is full" in caught.value.hint
    assert target.left == []


async def test_a_locked_in_login_works_like_any(small_server: OpenSsh, tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", "AB", MiB)
    target = Target(small_server.server, tmp_path)
    assert (await target.export("verify.readback")).state == "identical"


async def test_a_folder_that_may_not_be_written_is_told_before_any_byte(small_server: OpenSsh, tmp_path: Path) -> None:
    """Nobody but root's own mounts: a read-only one refuses root, too."""
    target = Target(small_server.server, tmp_path)
    subprocess.run(["mount", "-o", "remount,ro", small_server.server.data.parent], check=True)
    write_disk(tmp_path / "disk", "AB", MiB)
    with pytest.raises(PlanError, match="can't be made"):
        await target.export()
    assert target.left == []


async def test_a_target_that_appears_meanwhile_is_left_alone(target: Target) -> None:
    image = mixed(3 * MiB)
    async with target.planned(image) as writer:
        await writer.run(image.pieces(), Collected())
        target.path.write_text("somebody's")
        with pytest.raises(StoreError, match="appeared while"):
            await writer.publish(b"{}")
        await writer.withdraw()
    assert target.path.read_text() == "somebody's"
    assert target.left == [target.name]


async def test_withdrawing_never_removes_what_somebody_else_put_there(target: Target) -> None:
    image = mixed(3 * MiB)
    async with target.planned(image) as writer:
        await writer.run(image.pieces(), Collected())
        await writer.publish(b"{}")
        target.path.unlink()
        target.path.write_text("somebody's")
        await writer.withdraw()
    assert target.path.read_text() == "somebody's"
    assert target.left == [target.name]


async def test_a_flipped_byte_is_found_and_the_image_withdrawn(target: Target) -> None:
    write_disk(target.tmp / "disk", "ABCD", MiB)

    class Flipping(list):  # type: ignore[type-arg]
        def append(self, event: Event) -> None:
            if type(event).__name__ == "ImageSealed":
                (name,) = target.left
                with open(target.server.data / name, "r+b") as file:
                    file.seek(2 * MiB + 77)
                    byte = file.read(1)
                    file.seek(-1, 1)
                    file.write(bytes([byte[0] ^ 1]))

    with pytest.raises(VerificationError, match="not the disk"):
        await export(target.toml("verify.readback"), events=Flipping())
    assert target.left == []


async def test_cancelled_at_any_moment_nothing_stays(target: Target) -> None:
    """Cancel when the n-th request is answered, for every n until the run succeeds."""
    write_disk(target.tmp / "disk", "A0", MiB)
    toml = target.toml("verify.readback")
    real = SftpClient.request
    removed = 0
    for moment in range(1, 200):
        count = 0
        events: list[Event] = []

        async def counting(self: SftpClient, *args: object, **more: object) -> object:
            nonlocal count
            count += 1
            if count == moment:  # noqa: B023  # used in this turn of the loop only
                scope.cancel()
            return await real(self, *args, **more)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SftpClient, "request", counting)
            with anyio.CancelScope() as scope:
                await export(toml, events=events)
        if not scope.cancelled_caught:
            break
        removed += any(isinstance(event, UploadRemoved) for event in events)
        if any(type(event).__name__ == "ImagePublished" for event in events):
            break
        assert target.left == [], (moment, [type(event).__name__ for event in events])
    assert moment > 20
    assert removed > 10
    assert target.left == [target.name, f"{target.name}.manifest.json"]


# ---- URLs and commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, path",
    [
        ("sftp://me@host/a/b%20c", "/a/b c"),
        ("sftp://host:2222/~/x.qcow2", "x.qcow2"),
        ("sftp://[::1]/x", "/x"),
    ],
)
def test_urls_are_taken_apart_and_put_together(url: str, path: str) -> None:
    where = SftpUrl.parse(url)
    assert where.path == path
    assert str(where) == url


def test_a_command_for_a_strange_name_is_quoted_for_both_shells() -> None:
    retry = Retry(RetryPolicy(), clock=QuickClock(), emit=lambda event: None, stage="test")
    client = SftpClient(SftpUrl.parse("sftp://me@host:2222/x"), Login(identity_files=(Path("k y"),)), retry)
    command = client.command("rm", "a \"b' c")
    assert command == """echo 'rm "a \\"b'"'"' c"' | sftp -b - -P 2222 -i 'k y' me@host"""


# ---- going on in another process -----------------------------------------------------------------------------------


@pytest.fixture
def _marks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "POINT_EVERY_S", 0.0)
    monkeypatch.setattr(resume, "POINT_SHARE", 0)
    monkeypatch.setattr(ranges, "_MARK_EVERY_S", 0.001)
    monkeypatch.setattr(ranges, "_MARK_SHARE", 0)


async def stop_behind(target: Target, position: int, toml: Path) -> None:
    """Run the export and cancel it when so much of the image is durable."""
    real = resume.RunJournal.note_mark
    with anyio.CancelScope() as scope, pytest.MonkeyPatch.context() as patched:

        def mark(journal: resume.RunJournal, reached: int) -> None:
            real(journal, reached)
            if reached >= position:
                scope.cancel()

        patched.setattr(resume.RunJournal, "note_mark", mark)
        await export(toml, attempt=Attempt())
    assert scope.cancelled_caught


def fallbacks(target: Target) -> list[str]:
    return [f"{event.what}: {event.reason}" for event in target.events if isinstance(event, FallbackTaken)]


RESUME = Attempt(mode=Mode.RESUME)


@pytest.mark.usefixtures("_marks_often")
@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
async def test_a_cancelled_export_is_gone_on_with(target: Target, encoder: str) -> None:
    write_disk(target.tmp / "disk", "ABCDEFGHIJKLMNOP--Q0RST", MiB, 512)
    toml = target.toml("verify.readback", encoder=encoder)
    await stop_behind(target, 20 * MiB, toml)  # behind holes that nothing was written for
    assert [name.endswith(".partial") for name in target.left] == [True]
    outcome = await export(toml, attempt=RESUME, events=target.events)
    assert outcome.state == "identical"
    [resumed] = [event for event in target.events if isinstance(event, RunResumed)]
    assert resumed.image_bytes >= 15 * MiB
    assert target.left == [target.name, f"{target.name}.manifest.json"]


@pytest.mark.usefixtures("_marks_often")
async def test_a_file_whose_journal_is_gone_is_named_and_left_alone(target: Target) -> None:
    write_disk(target.tmp / "disk", "ABCDEFGHIJ", MiB)
    toml = target.toml("verify.readback")
    await stop_behind(target, 4 * MiB, toml)
    [partial] = target.left
    journal_path(load_config(toml, CATALOG)).unlink()
    assert (await export(toml, attempt=RESUME, events=target.events)).state == "identical"
    [found] = [event for event in target.events if isinstance(event, LeftoverFound)]
    assert found.uri.endswith(quote(partial))
    assert shlex.split(found.remove) == ["pipeline", "uploads", "abort", target.url, "--upload-id", partial]
    assert sorted(target.left) == sorted([partial, target.name, f"{target.name}.manifest.json"])
    target.path.with_name(partial).unlink()


@pytest.mark.usefixtures("_marks_often")
async def test_a_finished_export_is_not_sent_again(target: Target) -> None:
    write_disk(target.tmp / "disk", "AB", MiB)
    toml = target.toml("verify.readback")
    await export(toml, attempt=Attempt())
    with pytest.raises(AlreadyFinished):
        await export(toml, attempt=RESUME)


@pytest.mark.usefixtures("_marks_often")
async def test_a_file_that_the_server_lost_a_part_of_is_begun_anew(target: Target) -> None:
    write_disk(target.tmp / "disk", "ABCDEFGHIJKLMNOP", MiB)
    toml = target.toml("verify.readback")
    await stop_behind(target, 4 * MiB, toml)
    os.truncate(target.server.data / target.left[0], MiB)
    assert (await export(toml, attempt=RESUME, events=target.events)).state == "identical"
    assert "the server lost what it had made durable: 1048576 of " in fallbacks(target)[0]
    assert target.left == [target.name, f"{target.name}.manifest.json"]


@pytest.mark.usefixtures("_marks_often")
async def test_discard_removes_the_file_that_was_begun(target: Target) -> None:
    write_disk(target.tmp / "disk", "ABCDEFGHIJKLMNOP", MiB)
    toml = target.toml("verify.readback")
    await stop_behind(target, 4 * MiB, toml)
    await export(toml, attempt=Attempt(mode=Mode.DISCARD), events=target.events)
    assert fallbacks(target) == ["the export starts anew: what was written before has been removed"]
    assert target.left == [target.name, f"{target.name}.manifest.json"]


@pytest.mark.usefixtures("_marks_often")
async def test_the_command_that_a_kept_run_tells_removes_the_file(target: Target) -> None:
    write_disk(target.tmp / "disk", "ABCDEFGHIJKLMNOP", MiB)
    toml = target.toml("verify.readback")
    events: list[Event] = []
    with anyio.CancelScope() as scope, pytest.MonkeyPatch.context() as patched:
        real = resume.RunJournal.note_mark

        def mark(journal: resume.RunJournal, reached: int) -> None:
            real(journal, reached)
            if reached > MiB:
                scope.cancel()

        patched.setattr(resume.RunJournal, "note_mark", mark)
        await export(toml, attempt=Attempt(), events=events)
    [kept] = [event for event in events if isinstance(event, UploadKept)]
    assert len(kept.remove) == 2
    for command in kept.remove:
        subprocess.run(command, shell=True, check=True, capture_output=True)
    assert target.left == []


@pytest.mark.usefixtures("_marks_often")
async def test_an_image_that_was_renamed_and_not_published_is_taken_back(target: Target) -> None:
    """The server failed between the two renamings; nothing is sent again."""
    write_disk(target.tmp / "disk", "ABCDEFGH", MiB)
    toml = target.toml("verify.readback")
    real = SftpWriter._move

    async def fails(writer: SftpWriter, source: str, to: str) -> None:
        if to.endswith(".json"):
            raise StoreError("the line broke", operation="publish")
        await real(writer, source, to)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SftpWriter, "_move", fails)
        with pytest.raises(KeptError):
            await export(toml, attempt=Attempt())
    assert target.name in target.left
    outcome = await export(toml, attempt=RESUME, events=target.events)
    assert outcome.state == "identical"
    [resumed] = [event for event in target.events if isinstance(event, RunResumed)]
    assert resumed.image_bytes == 8 * MiB
    assert target.left == [target.name, f"{target.name}.manifest.json"]


@pytest.mark.usefixtures("_marks_often")
async def test_a_name_that_somebody_took_meanwhile_is_left_alone_by_a_resume(target: Target) -> None:
    write_disk(target.tmp / "disk", "ABCDEFGHIJKLMNOP", MiB)
    toml = target.toml("verify.readback")
    await stop_behind(target, 4 * MiB, toml)
    target.path.write_text("precious")
    with pytest.raises(PlanError, match="target exists"):
        await export(toml, attempt=RESUME)
    assert target.path.read_text() == "precious"


@pytest.mark.usefixtures("_marks_often")
async def test_where_writes_come_in_order_nothing_is_kept_and_that_is_told(target: Target) -> None:
    write_disk(target.tmp / "disk", "ABCDEFGH", MiB)
    async with in_order_server(target):
        toml = target.toml(options='identity_files = []; password = { env = "SFTP_PASSWORD" }')
        toml.write_text(toml.read_text().replace(f'identity_files = ["{target.server.identity}"]\n', ""))
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("SFTP_PASSWORD", "open sesame")
            await export(toml, attempt=Attempt(), events=target.events)
    assert "a killed run can't be resumed" in fallbacks(target)[0]
    assert target.left == [target.name, f"{target.name}.manifest.json"]


class _Connection:
    def abort(self) -> None:
        raise AssertionError("the connection was given up")


async def test_a_long_flush_does_not_make_the_writes_behind_it_look_lost(target: Target) -> None:
    """Servers answer in turn: nothing comes while the file is brought to the medium."""
    login, patience = Login(), Patience(progress_s=0.02, flush_s=60)
    retry = Retry(RetryPolicy(), clock=RealClock(), emit=target.events.append, stage="sftp")
    client = SftpClient(SftpUrl.parse(target.url), login, retry, patience)
    session, answer = Session(_Connection(), None), anyio.Event()  # type: ignore[arg-type]  # neither is asked
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.request, session, "write", answer.wait)
            tasks.start_soon(lambda: client.request(session, "flush", answer.wait, patience_s=60))
            with anyio.move_on_after(0.1):
                await anyio.Event().wait()
            tasks.start_soon(client.request, session, "write", answer.wait)
            with anyio.move_on_after(0.1):
                await anyio.Event().wait()
            answer.set()
    assert not session.lost


@pytest.mark.slow
@pytest.mark.usefixtures("_marks_often")
@pytest.mark.parametrize("how", ["killed", "blackhole", "refuse"])
async def test_a_server_that_was_away_for_long_is_no_loss(
    own_openssh: OpenSsh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Literal["killed", "blackhole", "refuse"]
) -> None:
    """Longer than any patience: the run ends, and another process goes on when the server is back."""
    real = SftpWriter.__init__

    def hasty(writer: SftpWriter, *given: object, **named: object) -> None:
        policy = RetryPolicy(attempts=2, deadline_s=3)
        real(writer, *given, patience=Patience(connect_s=1, login_s=5, progress_s=1), retry_policy=policy)  # type: ignore[arg-type]

    monkeypatch.setattr(SftpWriter, "__init__", hasty)
    async with Link(own_openssh.server.port, Network()) as link:
        known = own_openssh.server.knows(link.port, tmp_path / "known")
        target = Target(own_openssh.server, tmp_path, port=link.port, known_hosts=known)
        write_disk(tmp_path / "disk", "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 2, MiB)
        toml = target.toml("verify.readback")
        real_mark = resume.RunJournal.note_mark
        marks: list[int] = []

        def mark(journal: resume.RunJournal, reached: int) -> None:
            real_mark(journal, reached)
            marks.append(reached)
            if reached > 8 * MiB and len(marks) < 100:
                marks.extend([reached] * 100)
                own_openssh.kill() if how == "killed" else link.cut(how)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(resume.RunJournal, "note_mark", mark)
            with anyio.fail_after(60), pytest.raises(KeptError):
                await export(toml, attempt=Attempt())
        if how == "killed":
            await anyio.to_thread.run_sync(own_openssh.restart)
        link.mend()
        outcome = await export(toml, attempt=RESUME, events=target.events)
    assert outcome.state == "identical"
    [resumed] = [event for event in target.events if isinstance(event, RunResumed)]
    assert resumed.image_bytes > 8 * MiB
    assert target.left == [target.name, f"{target.name}.manifest.json"]
