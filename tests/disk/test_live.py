"""A live system, or a folder that plays one: nothing outside of it is ever reached, nothing but files is read."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from stages.disk import live
from stages.disk.live import LiveView
from stages.disk.paths import DEPTH_MAX, LINKS_MAX
from stages.disk.tree import Entry, Kind, View
from tests.disk.making import mounted, need, needs_root, run


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A root folder beside a secret."""
    (tmp_path / "secret").write_text("outside")
    root = tmp_path / "root"
    (root / "etc" / "deep").mkdir(parents=True)
    (root / "etc" / "fstab").write_text("UUID=1 / ext4\n")
    (root / "etc" / "fstab").chmod(0o640)
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "mountinfo").write_text("mine")
    return root


async def _code(answer: object) -> str:
    """The errno name that an awaited call raised."""
    with pytest.raises(OSError) as caught:
        await answer  # type: ignore[misc]  # a coroutine
    assert caught.value.errno is not None
    return errno.errorcode[caught.value.errno]


async def test_files_folders_and_attributes_are_those_of_the_kernel(system: Path) -> None:
    view: View = LiveView(system)
    assert view.is_live
    node = await view.stat("/etc/fstab")
    truth = (system / "etc/fstab").stat()
    assert (node.kind, node.number, node.mode, node.uid, node.gid) == (
        Kind.FILE,
        truth.st_ino,
        0o640,
        truth.st_uid,
        truth.st_gid,
    )
    assert (node.size, node.modified_s) == (truth.st_size, int(truth.st_mtime))
    assert (node.immutable, node.append_only) == (False, False)
    assert await view.read("/etc/fstab") == b"UUID=1 / ext4\n"
    assert await view.read_at("/etc/fstab", 7, 100) == b"/ ext4\n"
    assert await view.read_at("/etc/fstab", 700, 100) == b""
    assert await view.read("//etc/./deep/..//fstab") == b"UUID=1 / ext4\n"
    assert {(one.name, one.kind) for one in await view.list("/etc/")} == {
        ("deep", Kind.DIRECTORY),
        ("fstab", Kind.FILE),
    }
    assert await view.read("/proc/self/mountinfo") == b"mine", "not this machine's"
    space = await view.space("/etc")
    assert space.total == os.statvfs(system).f_blocks * os.statvfs(system).f_frsize


@pytest.mark.parametrize(
    "target, means",
    [
        ("/etc/fstab", "/etc/fstab"),
        ("fstab", "/etc/fstab"),
        ("../../../../etc/fstab", "/etc/fstab"),
        ("/../etc/deep/../fstab", "/etc/fstab"),
        ("/etc/deep/.././//fstab", "/etc/fstab"),
    ],
)
async def test_links_are_followed_inside_of_the_view(system: Path, target: str, means: str) -> None:
    (system / "etc" / "link").symlink_to(target)
    view = LiveView(system)
    assert await view.resolve("/etc/link") == means
    assert await view.read("/etc/link") == b"UUID=1 / ext4\n"
    assert await view.target("/etc/link") == target
    assert (await view.stat("/etc/link")).kind is Kind.FILE
    assert (await view.stat("/etc/link", follow=False)).kind is Kind.LINK


@pytest.mark.parametrize("target", ["../../secret", "/secret", "../../../../../../secret", "{outside}/secret"])
async def test_no_link_leads_out_of_the_root(system: Path, tmp_path: Path, target: str) -> None:
    (system / "etc" / "link").symlink_to(target.format(outside=tmp_path))
    (system / "folder").symlink_to(tmp_path)
    (system / "up").symlink_to("..")
    view = LiveView(system)
    for path in ("/etc/link", "/folder/secret", "/up/secret", "/../secret", "/etc/../../secret", "/up/up/../secret"):
        assert await _code(view.read(path)) == "ENOENT", path
        assert await _code(view.stat(path)) == "ENOENT", path
    assert await view.resolve("/up/etc/..") == "/"


async def test_loops_depth_and_lengths_are_bounded(system: Path) -> None:
    view = LiveView(system)
    (system / "loop").symlink_to("loop")
    assert await _code(view.read("/loop")) == "ELOOP"
    assert (await view.stat("/loop", follow=False)).kind is Kind.LINK
    (system / "link0").symlink_to("etc")
    for number in range(LINKS_MAX):
        (system / f"link{number + 1}").symlink_to(f"link{number}")
    assert await view.resolve(f"/link{LINKS_MAX - 1}") == "/etc"
    assert await _code(view.resolve(f"/link{LINKS_MAX}")) == "ELOOP"
    place = system
    for _ in range(DEPTH_MAX + 5):
        place = place / "d"
        place.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    assert await _code(view.list("/d" * (DEPTH_MAX + 5))) == "ENAMETOOLONG"
    assert await _code(view.stat("/a" * 3000)) == "ENAMETOOLONG"
    assert await _code(view.stat("/" + "a" * 300)) == "ENAMETOOLONG"
    assert await _code(view.stat("")) == "ENOENT"
    assert await _code(view.stat("/etc\0")) == "EINVAL"
    assert await _code(view.stat("/\ud800")) == "EINVAL"
    assert len(os.listdir("/proc/self/fd")) == before


async def test_errors_are_those_of_the_kernel(system: Path) -> None:
    view = LiveView(system)
    assert await _code(view.read("/etc/nothing")) == "ENOENT"
    assert await _code(view.read("/etc/fstab/x")) == "ENOTDIR"
    assert await _code(view.read("/etc/fstab/")) == "ENOTDIR"
    assert await _code(view.read("/etc/fstab/..")) == "ENOTDIR"
    assert await _code(view.read("/etc")) == "EISDIR"
    assert await _code(view.list("/etc/fstab")) == "ENOTDIR"
    assert await _code(view.target("/etc/fstab")) == "EINVAL"


async def test_only_regular_files_are_opened(system: Path) -> None:
    """A pipe would wait for a writer, a device may act when it is opened."""
    os.mkfifo(system / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(system / "socket"))
    view = LiveView(system)
    for name, kind in (("pipe", Kind.FIFO), ("socket", Kind.SOCKET)):
        assert (await view.stat(f"/{name}")).kind is kind
        assert await _code(view.read(f"/{name}")) == "EINVAL"
        assert await _code(view.read_at(f"/{name}", 0, 1)) == "EINVAL"
    assert {one.kind for one in await view.list("/") if one.name in ("pipe", "socket")} == {Kind.FIFO, Kind.SOCKET}
    server.close()


@needs_root
async def test_devices_are_seen_and_never_opened(system: Path) -> None:
    os.mknod(system / "tty", stat.S_IFCHR | 0o620, os.makedev(4, 0))
    os.mknod(system / "disk", stat.S_IFBLK | 0o660, os.makedev(7, 99))
    view = LiveView(system)
    assert (await view.stat("/tty")).kind is Kind.CHARACTER
    assert (await view.stat("/disk")).kind is Kind.BLOCK
    assert await _code(view.read("/tty")) == "EINVAL"


async def test_a_gigantic_file_is_not_read(system: Path) -> None:
    with (system / "etc" / "huge").open("wb") as file:
        file.truncate(1 << 40)
    view = LiveView(system)
    assert await _code(view.read("/etc/huge")) == "EFBIG"
    assert await view.read_at("/etc/huge", 1 << 39, 5) == bytes(5)
    (system / "etc" / "exact").write_bytes(bytes(100))
    assert len(await view.read("/etc/exact", limit=100)) == 100
    assert await _code(view.read("/etc/exact", limit=99)) == "EFBIG"


async def test_names_that_are_no_utf8_are_reached(system: Path) -> None:
    (system / os.fsdecode(b"caf\xe9")).write_text("x")
    view = LiveView(system)
    (name,) = [one.name for one in await view.list("/") if one.name.startswith("caf")]
    assert await view.read("/" + name) == b"x"


async def test_files_of_this_machine_that_claim_no_size_are_read() -> None:
    view = LiveView()
    assert b" / " in await view.read("/proc/self/mountinfo")
    assert (await view.read("/proc/version")).startswith(b"Linux")
    assert Entry("self", 1, Kind.LINK).kind in {one.kind for one in await view.list("/proc") if one.name == "self"}


@needs_root
@pytest.mark.parametrize("how", ["statx", "ioctl"])
async def test_inode_flags_are_seen(system: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("mke2fs", "chattr")
    if how == "ioctl":
        monkeypatch.setattr(live, "_statx", lambda: None)
    with (tmp_path / "image").open("wb") as file:
        file.truncate(8 << 20)
    run("mke2fs", "-q", "-t", "ext4", tmp_path / "image")
    with mounted(tmp_path / "image") as folder:
        for name in ("plain", "fixed", "grows"):
            (folder / name).write_text(name)
        run("chattr", "+i", folder / "fixed")
        run("chattr", "+a", folder / "grows")
        view = LiveView(folder)
        found = {name: await view.stat(f"/{name}") for name in ("plain", "fixed", "grows")}
        run("chattr", "-i", folder / "fixed")
        run("chattr", "-a", folder / "grows")
    assert [(found[name].immutable, found[name].append_only) for name in found] == [
        (False, False),
        (True, False),
        (False, True),
    ]
