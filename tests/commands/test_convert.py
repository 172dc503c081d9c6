"""`pipeline convert`: from and to every format, over paths and URLs, as qemu-img would, and judged by it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.config.conversion import Conversion, conversion_text
from pipeline.config.wiring import load_chain
from pipeline.errors import ConfigError
from pipeline.units import KiB, MiB
from stages.catalog import CATALOG
from tests.commands.conftest import Said
from tests.decode.images import mixed_disk, run
from tests.end_to_end.command import PROGRAM
from tests.end_to_end.places import unused_name
from tests.stores.azurite import AzureServer
from tests.stores.nbd import NbdServer
from tests.stores.nginx import WebServer
from tests.stores.openssh import SftpServer
from tests.stores.ranged import ranged_server
from tests.stores.s3 import S3Server

Convert = Callable[..., Said]

# Our format: qemu-img's name, and what makes an image of it.
FORMATS = {
    "raw": ("raw", ()),
    "qcow2": ("qcow2", ("-c",)),
    "vhd": ("vpc", ("-o", "force_size=on")),
    "vmdk": ("vmdk", ("-o", "subformat=streamOptimized")),
    "vhdx": ("vhdx", ()),
}


def ask(verb: str, *arguments: object) -> Said:
    """One call of the command line, in this process."""
    result = CliRunner().invoke(main, [verb, *map(str, arguments)], prog_name="pipeline")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Said(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """`convert(source, target, ...)` with the real catalog, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    return partial(ask, "convert")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same disk in every format, made by qemu-img."""
    folder = tmp_path_factory.mktemp("sources")
    raw = folder / "disk.raw"
    raw.write_bytes(mixed_disk(5 * MiB))
    made = {"raw": raw}
    for format, (name, arguments) in FORMATS.items():
        if format != "raw":
            made[format] = folder / f"disk.{format}"
            run("qemu-img", "convert", "-f", "raw", "-O", name, *arguments, str(raw), str(made[format]))
    return made


def same(one: Path, format: str, other: Path, other_format: str) -> None:
    """qemu-img reads the same from both."""
    names = [FORMATS[each][0] for each in (format, other_format)]
    run("qemu-img", "compare", "-f", names[0], "-F", names[1], str(one), str(other))


@pytest.mark.parametrize("source, target", list(itertools.product(FORMATS, FORMATS)))
def test_every_format_becomes_every_other(
    convert: Convert, sources: dict[str, Path], tmp_path: Path, source: str, target: str
) -> None:
    made = tmp_path / f"made.{target}"
    said = convert("-f", source, "-O", target, sources[source], made)
    assert said.code == 0, said.err
    assert "verified: identical" in said.out
    same(sources[source], source, made, target)


@pytest.mark.parametrize("target", ["ova", "gce"])
def test_archives_are_written_and_read_again(
    convert: Convert, sources: dict[str, Path], tmp_path: Path, target: str
) -> None:
    packed = tmp_path / {"ova": "made.ova", "gce": "made.tar.gz"}[target]
    assert convert(sources["qcow2"], packed).code == 0
    said = convert(packed, "again.qcow2", "-f", target)
    assert said.code == 0, said.err
    padded = tmp_path / "padded.raw"
    padded.write_bytes(sources["raw"].read_bytes())
    size = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", "again.qcow2"]))["virtual-size"]
    os.truncate(padded, size)
    same(padded, "raw", tmp_path / "again.qcow2", "qcow2")


def test_without_c_nothing_is_compressed(convert: Convert, sources: dict[str, Path], tmp_path: Path) -> None:
    assert convert(sources["raw"], "plain.qcow2").code == 0
    assert convert(sources["raw"], "packed.qcow2", "-c").code == 0
    assert convert(sources["raw"], "zstd.qcow2", "-o", "compression_type=zstd,cluster_size=128k").code == 0
    sizes = [(tmp_path / f"{name}.qcow2").stat().st_size for name in ("plain", "packed", "zstd")]
    assert sizes[0] > max(sizes[1:])
    same(sources["raw"], "raw", tmp_path / "zstd.qcow2", "qcow2")
    header = (tmp_path / "zstd.qcow2").read_bytes()[:112]
    assert header[23] == 17  # cluster_bits
    assert header[104] == 1  # zstd


def test_names_of_qemu_are_understood(convert: Convert, sources: dict[str, Path], tmp_path: Path) -> None:
    said = convert("-f", "vpc", "-O", "vpc", "-o", "subformat=fixed", sources["vhd"], "made.vhd")
    assert said.code == 0, said.err
    assert (tmp_path / "made.vhd").stat().st_size >= 5 * MiB + 512
    same(sources["vhd"], "vhd", tmp_path / "made.vhd", "vhd")
    assert convert("-O", "vmdk", "-o", "subformat=monolithicSparse", sources["raw"], "made.vmdk").code == 0
    assert b'createType="monolithicSparse"' in (tmp_path / "made.vmdk").read_bytes()[: 64 * KiB]


def test_overlay_is_flattened_with_the_backing_image_that_was_named(
    convert: Convert, sources: dict[str, Path], tmp_path: Path
) -> None:
    base = str(sources["raw"])
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", str(tmp_path / "upper.qcow2"))
    run("qemu-io", "-c", "write -P 3 1M 300k", str(tmp_path / "upper.qcow2"))
    assert convert("upper.qcow2", "flat.qcow2").code == 2
    assert not (tmp_path / "flat.qcow2").exists()
    said = convert("upper.qcow2", "flat.qcow2", "--backing", base, "--backing-format", "raw")
    assert said.code == 0, said.err
    same(tmp_path / "upper.qcow2", "qcow2", tmp_path / "flat.qcow2", "qcow2")


def test_from_and_to_a_store(
    sources: dict[str, Path], tmp_path: Path, seaweedfs: S3Server, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = seaweedfs.new_bucket()
    for name, value in seaweedfs.environment().items():
        if name != "AWS_ENDPOINT_URL_S3":
            monkeypatch.setenv(name, value)
    there = f"s3://{bucket}/web.qcow2"
    said = convert("--endpoint", seaweedfs.endpoint, sources["vmdk"], there, "-c")
    assert said.code == 0, said.err
    said = convert("--endpoint", seaweedfs.endpoint, there, f"s3://{bucket}/web.vhd", "-O", "vhd")
    assert said.code == 0, said.err
    said = convert("--endpoint", seaweedfs.endpoint, f"s3://{bucket}/web.vhd", "back.raw")
    assert said.code == 0, said.err
    same(sources["raw"], "raw", tmp_path / "back.raw", "raw")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["back.raw", "back.raw.manifest.json"]
    seaweedfs.delete_bucket(bucket)


@pytest.mark.parametrize(
    "scheme", ["file", "sftp", "http", "dav", "davs", "az", "gs", "nbd", "nbds", "nbd+unix", "nbds+unix"]
)
def test_to_and_from_every_scheme(
    request: pytest.FixtureRequest,
    convert: Convert,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    """A qcow2 goes there as a compressed image, on a disk in place as raw, and comes back the same. S3: see above."""
    with ExitStack() as stack:
        asked: tuple[str, ...] = ("-O", "vmdk")
        trusted: tuple[str, ...] = ()
        if scheme == "file":
            url = f"file://{tmp_path}/with%20space.vmdk"
        elif scheme == "sftp":
            server: SftpServer = request.getfixturevalue("sftp_server")
            ssh = tmp_path / "home" / ".ssh"
            ssh.mkdir(parents=True)
            (ssh / "id_ed25519").write_bytes(server.identity.read_bytes())
            (ssh / "known_hosts").write_bytes(server.known_hosts.read_bytes())
            monkeypatch.setenv("HOME", str(tmp_path / "home"))
            url = server.url(f"{tmp_path.name}.image")
        elif scheme in ("http", "dav", "davs"):
            web: WebServer = request.getfixturevalue("web_server")
            folder = "plain" if scheme == "http" else "open"
            url = web.url(f"{folder}/convert-{tmp_path.name}.image", scheme=scheme)
            trusted = ("--ca-file", str(web.ca_file)) if scheme == "davs" else ()
        elif scheme == "az":
            azure: AzureServer = request.getfixturevalue("azure_server")
            for name, value in azure.environment().items():
                monkeypatch.setenv(name, value)
            url = f"az://{azure.create_container(unused_name())}/convert.image"
        elif scheme == "gs":
            store: S3Server = request.getfixturevalue("seaweedfs")
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.endpoint)
            monkeypatch.setenv("GS_ACCESS_KEY_ID", store.credentials.access_key)
            monkeypatch.setenv("GS_SECRET_ACCESS_KEY", store.credentials.secret_key)
            url = f"gs://{store.new_bucket()}/convert.image"
        else:
            where: Literal["port", "socket"] = "socket" if "unix" in scheme else "port"
            with_tls = scheme.startswith("nbds")
            url = stack.enter_context(NbdServer("nbdkit", "memory", "5M", on=where, with_tls=with_tls)).url()
            asked = ("-O", "raw")
        assert url.startswith(f"{scheme}://")
        said = convert(*asked, *trusted, sources["qcow2"], url)
        assert said.code == 0, said.err
        assert "verified: identical" in said.out
        said = convert("-f", asked[1], "-O", "raw", *trusted, url, "back.raw")
        assert said.code == 0, said.err
        same(sources["raw"], "raw", tmp_path / "back.raw", "raw")
        seen = ask("inspect", "-f", asked[1], *trusted, url)
        assert seen.code == 0, seen.err
        if scheme not in ("file", "http", "dav"):  # what needs an authority, a key or an account, and disks in place
            there, here = (
                ask("preflight", "-f", format, *more, place)
                for format, more, place in ((asked[1], trusted, url), ("raw", (), sources["raw"]))
            )
            assert there.code == here.code == 5, there.err
            assert there.out.splitlines()[-2:] == here.out.splitlines()[-2:]
        left = {one.name for one in tmp_path.iterdir()} - {"home"}
        assert left - {"back.raw", "back.raw.manifest.json"} <= {"with space.vmdk", "with space.vmdk.manifest.json"}


def test_from_a_web_server(convert: Convert, sources: dict[str, Path], tmp_path: Path) -> None:
    with ranged_server(disk=sources["qcow2"].read_bytes()) as server:
        url = server.url.replace("://", "://reader:hunter2@") + "/disk?signature=deadbeef"
        said = convert(url, "made.raw")
        assert said.code == 0, said.err
        same(sources["raw"], "raw", tmp_path / "made.raw", "raw")
        shown = said.out + said.err + (tmp_path / "made.raw.manifest.json").read_text()
        assert "hunter2" not in shown
        assert "deadbeef" not in shown
        printed = convert(url, "made.raw", "--print-config").out
        assert "hunter2" not in printed
        assert "deadbeef" not in printed
        server.knows_ranges = False
        said = convert(server.url + "/disk", "other.raw")
        assert said.code == 1
        assert "does not know ranges" in said.err
        assert not (tmp_path / "other.raw").exists()


def test_printed_config_does_the_same(convert: Convert, sources: dict[str, Path], tmp_path: Path) -> None:
    asked = ("-c", "-o", "level=small", sources["vhdx"], "made.qcow2")
    printed = convert(*asked, "--print-config")
    assert not (tmp_path / "made.qcow2").exists()
    stages = tomllib.loads(printed.out)["stage"]
    assert [stage["use"] for stage in stages] == [
        "read.image",
        "checksum.guest",
        "sparse.zeros",
        "encode.qcow2",
        "write.file",
        "verify.readback",
    ]
    assert stages[0]["format"] == "vhdx"
    assert convert(*asked).code == 0
    first = (tmp_path / "made.qcow2").read_bytes()
    (tmp_path / "made.qcow2").unlink()
    (tmp_path / "export.toml").write_text(printed.out)
    result = CliRunner().invoke(main, ["run", "export.toml", "--set", "write.file.overwrite=true"])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "made.qcow2").read_bytes() == first


def test_image_on_stdout_is_the_image_alone(sources: dict[str, Path], tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out:
        command = [*PROGRAM, "convert", "-O", "raw", str(sources["vmdk"]), "-"]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, cwd=tmp_path, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stored, not verified" in done.stderr
    assert "  manifest  none is kept" in done.stderr
    assert (tmp_path / "out").read_bytes() == sources["raw"].read_bytes()
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_raw_disk_that_begins_like_qcow2_stays_raw_when_declared(convert: Convert, tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/hostname", "-F", "raw", "-u", "trap.raw", "1M")
    disk = (tmp_path / "trap.raw").read_bytes().ljust(MiB, b"\0")
    (tmp_path / "trap.raw").write_bytes(disk)
    assert convert("-f", "raw", "trap.raw", "made.raw").code == 0
    assert (tmp_path / "made.raw").read_bytes() == disk
    said = convert("trap.raw", "other.raw")
    assert said.code == 2
    assert "backing file" in said.err


@pytest.mark.parametrize(
    "make, source, arguments, hint",
    [
        ("create -q -f qcow2 -b disk.raw -F raw", "upper.qcow2", (), "--backing FILE"),
        ("create -q -f qcow2 -o extended_l2=on", "fine.qcow2", (), "qemu-img convert -O qcow2 -o extended_l2=off"),
        ("create -q -f vmdk -o subformat=monolithicFlat", "parts.vmdk", (), "--extent FILE"),
        ("create -q -f qcow2", "image.qcow2", ("-f", "vhd"), "Declare it as qcow2"),
        ("create -q -f qcow2", "image.qcow2", ("--extent", "disk.raw"), "Leave the extents out"),
        ("create -q -f qed", "image.qed", (), "declare the format"),
    ],
)
def test_source_that_is_only_named_wrongly_is_not_called_corrupt(
    convert: Convert, tmp_path: Path, make: str, source: str, arguments: tuple[str, ...], hint: str
) -> None:
    """Nothing is wrong with any of these images: 2, from looking at them as from converting them."""
    (tmp_path / "disk.raw").write_bytes(bytes(MiB))
    run("qemu-img", *make.split(), source, "1M")
    said = convert(source, "made.raw", *arguments)
    assert said.code == 2, said.err
    assert hint in said.err
    assert not (tmp_path / "made.raw").exists()
    said = ask("inspect", source, *arguments, "--map")
    assert said.code == 2, said.out + said.err
    assert hint in said.err


def test_corrupt_source_is_called_corrupt(convert: Convert, sources: dict[str, Path], tmp_path: Path) -> None:
    image = bytearray(sources["qcow2"].read_bytes())
    image[40:48] = (1 << 40).to_bytes(8, "big")  # its L1 table
    (tmp_path / "bad.qcow2").write_bytes(image)
    for arguments in ((), ("-f", "qcow2")):
        said = convert("bad.qcow2", "made.raw", *arguments)
        assert said.code == 3, said.err
        assert "behind the end" in said.err
        assert not (tmp_path / "made.raw").exists()


def test_what_was_guessed_is_told(convert: Convert, sources: dict[str, Path]) -> None:
    said = convert(sources["raw"], "made.qcow2", "--print-config")
    assert "taken for raw" in said.err
    assert 'use    = "read.disk"' in said.out
    assert "taken for" not in convert("-f", "raw", sources["raw"], "made.qcow2", "--print-config").err


def test_what_is_there_already_is_not_replaced(convert: Convert, sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "made.raw").write_bytes(b"precious")
    assert convert(sources["qcow2"], "made.raw").code == 2
    assert (tmp_path / "made.raw").read_bytes() == b"precious"
    assert convert(sources["qcow2"], "made.raw", "--overwrite").code == 0
    same(sources["raw"], "raw", tmp_path / "made.raw", "raw")


@pytest.mark.parametrize(
    "asked, reason",
    [
        (Conversion(source="a", target="b"), "says no format"),
        (Conversion(source="a", target="b.raw", format="qed"), 'no image is written as "qed"'),
        (Conversion(source="a", target="b.qcow2", options=("compresion=zlib",)), 'did you mean "compression"'),
        (Conversion(source="a", target="b.qcow2", options=("compression=lzma",)), "not one of"),
        (Conversion(source="a", target="b.qcow2", options=("subformat=x",)), 'unknown option "subformat"'),
        (Conversion(source="a", target="b.vhd", options=("subformat=x",)), "subformat: "),
        (Conversion(source="a", target="b.qcow2", options=("fast",)), "is not OPTION=VALUE"),
        (Conversion(source="a", target="b.raw", compress=True), "does not compress"),
        (Conversion(source="a", target="gopher://b/c.raw"), "nothing is stored under gopher"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_way_out(asked: Conversion, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        conversion_text(asked, CATALOG)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "options, target, writer",
    [
        (("variant=fixed",), "az://c/x.vhd", "write.azure_page"),
        (("subformat=fixed",), "az://c/x", "write.azure_page"),
        ((), "az://c/x.vhd", "write.azure_block"),
        (("variant=fixed",), "s3://c/x.vhd", "write.s3"),
    ],
)
def test_fixed_vhd_in_azure_becomes_a_page_blob(options: tuple[str, ...], target: str, writer: str) -> None:
    asked = Conversion(source="a.raw", target=target, format="vhd", options=options, overwrite=True)
    text = conversion_text(asked, CATALOG)
    load_chain(Path("convert.toml"), CATALOG, text=text)
    assert tomllib.loads(text)["stage"][4] == {"use": writer, "url": target, "overwrite": True}


def test_every_fault_is_told_at_once(convert: Convert) -> None:
    said = convert("-f", "raw", "a", "b.qcow2", "-o", "x=1,y=2", "-o", "cluster_size=7")
    assert said.code == 2
    assert all(word in said.err for word in ('"x"', '"y"'))


def test_names_with_quotes_and_line_ends_stay_names(tmp_path: Path) -> None:
    asked = Conversion(source='a"\n[[stage]]\nuse = "x', target='b"c.raw', is_disk=True)
    document = tomllib.loads(conversion_text(asked, CATALOG))
    assert document["stage"][0] == {"use": "read.disk", "path": asked.source, "blocks": "all"}
    assert document["stage"][4]["path"] == asked.target
