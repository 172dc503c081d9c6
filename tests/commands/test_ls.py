"""`pipeline ls` and `pipeline cat`: one file out of an image, wherever it is, without fetching the rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.commands.looking import Inside, parse_place
from pipeline.units import MiB
from tests.commands.conftest import Said
from tests.disk.making import blank, run
from tests.disk.test_view import SYSTEM, disk_of, filesystem
from tests.stores.ranged import ranged_server

Ask = Callable[..., Said]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`ask("ls", image, ...)` with the real readers."""
    monkeypatch.chdir(tmp_path)

    def call_it(*arguments: object) -> Said:
        result = CliRunner().invoke(main, [*map(str, arguments)], prog_name="pipeline")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return Said(result.exit_code, result.stdout, result.stderr)

    return call_it


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qcow2 image: /boot, a root with an fstab, and a partition of nothing known."""
    folder = tmp_path_factory.mktemp("image")
    boot = filesystem(folder / "1", 4 * MiB, {"vmlinuz": "kernel"}, "-L", "boot")
    root = {**SYSTEM, "etc/fstab": "LABEL=boot /boot ext2\n", "bad\x1b[31mname": "", "kernel": "-> /boot/vmlinuz"}
    filesystem(folder / "2", 60 * MiB, root, "-t", "ext4")
    disk = disk_of(folder / "disk.raw", boot, folder / "2", blank(folder / "3", MiB))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", disk, folder / "disk.qcow2")
    return folder / "disk.qcow2"


def test_places_are_cut_where_a_person_means_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:1").touch()
    cases = {
        "disk.raw": Inside("disk.raw", "", None),
        "disk.raw:/": Inside("disk.raw", "", "/"),
        "disk.raw:2": Inside("disk.raw", "2", "/"),
        "/a/b.qcow2:2/etc/fstab": Inside("/a/b.qcow2", "2", "/etc/fstab"),
        "b.qcow2:vg--0-root/etc": Inside("b.qcow2", "vg--0-root", "/etc"),
        "b.qcow2:/dev/pci-0000:00/x": Inside("b.qcow2", "", "/dev/pci-0000:00/x"),
        "a:b.raw:2/etc": Inside("a:b.raw", "2", "/etc"),
        "odd:1": Inside("odd:1", "", None),
        "odd:1:3/x": Inside("odd:1", "3", "/x"),
        "s3://bucket/a/b.qcow2": Inside("s3://bucket/a/b.qcow2", "", None),
        "s3://bucket/a/b.qcow2:2/etc": Inside("s3://bucket/a/b.qcow2", "2", "/etc"),
        "http://host:8080/b.vhd:/etc": Inside("http://host:8080/b.vhd", "", "/etc"),
        "http://host:8080/b.vhd": Inside("http://host:8080/b.vhd", "", None),
        "https://u:p@host/b?sig=a:b/c:2/etc": Inside("https://u:p@host/b?sig=a:b/c", "2", "/etc"),
    }
    for text, meant in cases.items():
        assert parse_place(text) == meant, text


def test_an_image_alone_lists_its_volumes(ask: Ask, image: Path) -> None:
    said = ask("ls", image)
    assert said.code == 0, said.err
    lines = [line.split() for line in said.out.splitlines()]
    assert [line[0] for line in lines] == ["volume", "1", "2", "3"]
    assert lines[1][1:5] == ["4", "MiB", "ext2", "boot"]
    assert "what it holds is not known" in said.out
    told = ask("ls", image, "--json").objects
    assert [(one["type"], one["partition"], one["kind"], one["readable"]) for one in told] == [
        ("volume", 1, "ext2", True),
        ("volume", 2, "ext4", True),
        ("volume", 3, "unknown", False),
    ]


def test_files_are_listed_like_ls_does(ask: Ask, image: Path) -> None:
    said = ask("ls", f"{image}:2/etc")
    assert said.code == 0, said.err
    (table, release) = said.out.splitlines()
    assert table.startswith("-rw-r--r--     0     0           22 20")
    assert table.endswith(" fstab")
    assert release.startswith("lrwxrwxrwx")
    assert release.endswith(" os-release -> ../usr/lib/os-release")
    assert "\x1b" not in ask("ls", f"{image}:2").out
    (entry,) = ask("ls", f"{image}:2/etc/fstab", "--json").objects
    assert (entry["type"], entry["kind"], entry["mode"], entry["size"], entry["immutable"]) == (
        "entry",
        "file",
        "0644",
        22,
        False,
    )


def test_a_path_without_a_partition_is_the_systems_own(ask: Ask, image: Path) -> None:
    assert ask("ls", f"{image}:/boot").out.splitlines()[-1].endswith(" vmlinuz")
    assert "vmlinuz" not in ask("ls", f"{image}:2/boot").out
    assert ask("cat", f"{image}:/kernel").out == "kernel"
    said = ask("cat", f"{image}:2/kernel")
    assert said.code == 1
    assert "no such file" in said.err


def test_errors_say_what_there_is_instead(ask: Ask, image: Path, tmp_path: Path) -> None:
    said = ask("cat", f"{image}:7/etc/fstab")
    assert said.code == 1
    assert 'no volume "7"' in said.err
    assert "2       60 MiB  ext4" in said.err
    said = ask("ls", f"{image}:3/")
    assert said.code == 1
    assert "partition 3 can't be looked into" in said.err
    assert "/etc: it is a directory" in ask("cat", f"{image}:2/etc").err
    assert "/etc/nothing: no such file" in ask("ls", f"{image}:2/etc/nothing").err
    assert "Say which" in ask("cat", image).err
    assert ask("cat", f"{image}:2/etc/fstab", "--json").code == 2
    blank(tmp_path / "empty.raw", MiB)
    said = ask("ls", "empty.raw:/etc")
    assert said.code == 1
    assert "root of a system" in said.err


def test_one_file_of_a_remote_image_costs_little(ask: Ask, image: Path) -> None:
    with ranged_server(web=image.read_bytes()) as server:
        said = ask("cat", f"{server.url}/web:2/etc/fstab", "-f", "qcow2")
        assert said.code == 0, said.err
        assert said.out == "LABEL=boot /boot ext2\n"
        assert server.sent_bytes < 4 * MiB


def test_bytes_leave_as_they_are_and_a_closed_pipe_is_no_crash(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40000
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "large").write_bytes(data)
    disk = blank(tmp_path / "disk.raw", 30 * MiB)
    run("mke2fs", "-q", "-F", "-d", tmp_path / "tree", disk)
    command = [sys.executable, "-m", "pipeline", "cat", f"{disk}:disk/large", "-f", "raw"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == data
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
