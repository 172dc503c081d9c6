"""`pipeline init`: a file that passes `check`, a next step, and no question."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.__main__ import main
from pipeline.config.machine import Disk, Machine, SystemDisk
from pipeline.config.parse import load_config
from pipeline.config.proposal import Proposal, Target, proposal_text, target_of
from pipeline.config.wiring import WiredChain, load_chain
from pipeline.units import GiB, MiB
from stages.catalog import CATALOG
from stages.preflight.profile import names
from tests.commands.conftest import Said
from tests.disks.letters import write_disk

SDA = Disk(name="sda", size=256 * GiB, model="Fast SSD")
SDB = Disk(name="sdb", size=20 * GiB)


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """`init("disk.raw")` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Said:
        result = CliRunner().invoke(main, ["init", *arguments], prog_name="pipeline")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return Said(result.exit_code, result.stdout, result.stderr)

    return run


def chain_of(path: Path) -> WiredChain:
    _, chain = load_chain(path, CATALOG)
    return chain


def proposal(target: Target | None = None, **more: object) -> str:
    made = Proposal(
        name="web01",
        disk="/dev/sda",
        disk_title="256 GiB, Fast SSD",
        target=target or target_of("s3://images/web01.qcow2", CATALOG),
        **more,  # type: ignore[arg-type]  # passed on
    )
    return proposal_text(made, CATALOG)


def test_a_raw_file_and_a_path_make_a_file_that_plans_and_runs(init: Callable[..., Said], tmp_path: Path) -> None:
    write_disk(tmp_path / "disk.raw", "AB0-")
    said = init("disk.raw", str(tmp_path / "out.qcow2"))
    assert (said.code, said.err) == (0, "")
    assert said.out.endswith("The next step: pipeline plan export.toml\n")
    ran = CliRunner().invoke(main, ["run", "export.toml", "--quiet"], prog_name="pipeline")
    assert ran.exit_code == 0, ran.stderr
    assert (tmp_path / "disk.html").exists()


@pytest.mark.parametrize(
    "url, writer, encoder, verifiers",
    [
        ("s3://images/web01.qcow2", "write.s3", "encode.qcow2", ["verify.receipt", "verify.readback"]),
        ("s3://images/web01.raw", "write.s3", "encode.raw", ["verify.receipt", "verify.readback"]),
        ("/mnt/share/web01.img", "write.file", "encode.raw", ["verify.readback"]),
        ("file:///mnt/share/web01", "write.file", "encode.qcow2", ["verify.readback"]),
        ("web01.qcow2", "write.file", "encode.qcow2", ["verify.readback"]),
    ],
)
def test_the_target_decides_on_writer_format_and_verification(
    tmp_path: Path, url: str, writer: str, encoder: str, verifiers: list[str]
) -> None:
    (tmp_path / "x.toml").write_text(proposal(target_of(url, CATALOG)))
    chain = chain_of(tmp_path / "x.toml")
    assert (chain.writer.name, chain.encoder.name) == (writer, encoder)
    assert [stage.name for stage in chain.verifiers] == verifiers


SCHEMES = [scheme for spec in CATALOG if spec.role == "write" for scheme in spec.schemes]


def url_of(scheme: str, name: str) -> str:
    """A URL as this scheme has it, for an image of this name."""
    if scheme.endswith("+unix"):
        return f"{scheme}:///{name}?socket=/run/nbd.sock"
    return f"{scheme}:///srv/{name}" if scheme == "file" else f"{scheme}://place/{name}"


@pytest.mark.parametrize("suffix", ["", ".qcow2", ".raw", ".vhd", ".vhdx", ".vmdk", ".ova"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_file_for_a_url_of_any_scheme_passes_check(
    init: Callable[..., Said], tmp_path: Path, scheme: str, suffix: str
) -> None:
    write_disk(tmp_path / "disk.raw", "A")
    assert init("disk.raw", url_of(scheme, f"web01{suffix}")).code == 0
    checked = CliRunner().invoke(main, ["check", "export.toml"], prog_name="pipeline")
    assert checked.exit_code == 0, checked.stderr


@pytest.mark.parametrize("profile", names())
@pytest.mark.parametrize("scheme", SCHEMES)
def test_file_for_any_profile_passes_check_or_is_refused_with_a_way_out(
    init: Callable[..., Said], tmp_path: Path, scheme: str, profile: str
) -> None:
    write_disk(tmp_path / "disk.raw", "A")
    said = init("disk.raw", url_of(scheme, "web01"), "--profile", profile)
    if said.code:
        assert said.code == 2
        assert "can't write what" in said.err
        assert "import it from there" in " ".join(said.err.split())
        # Only a disk that is written in place, for clouds that take no raw image.
        assert scheme.startswith("nbd")
        assert profile in ("azure", "gcp", "oci")
        return
    checked = CliRunner().invoke(main, ["check", "export.toml"], prog_name="pipeline")
    assert checked.exit_code == 0, checked.stderr


@pytest.mark.parametrize(
    "url, encoder, option, reason",
    [
        ("https://h/x", "encode.qcow2", ("compression", "none"), "from its first byte to its last"),
        ("davs://h/x.vhd", "encode.vhd", ("variant", "fixed"), "from its first byte to its last"),
        ("davs://h/x.vhdx", "encode.qcow2", ("compression", "none"), "from its first byte to its last"),
        ("nbd://h/x", "encode.raw", None, "the target is a disk"),
        ("nbd://h/x.vhd", "encode.raw", None, "the target is a disk"),
    ],
)
def test_target_that_cannot_take_the_usual_format_gets_one_that_it_can(
    tmp_path: Path, url: str, encoder: str, option: tuple[str, str] | None, reason: str
) -> None:
    text = proposal(target_of(url, CATALOG))
    (tmp_path / "x.toml").write_text(text)
    chosen = chain_of(tmp_path / "x.toml").encoder
    assert chosen.name == encoder
    assert option is None or getattr(chosen.options, option[0]) == option[1]
    assert reason in text


@pytest.mark.parametrize(
    "url, profile, encoder, writer",
    [
        ("az://disks/x.vhd", "azure", "encode.vhd", "write.azure_page"),
        ("az://disks/x", "azure", "encode.vhd", "write.azure_page"),
        ("az://disks/x.VHD", "", "encode.vhd", "write.azure_page"),
        ("az://disks/x.qcow2", "", "encode.qcow2", "write.azure_block"),
        ("az://disks/x.raw", "", "encode.raw", "write.azure_block"),
        ("az://disks/x.vhd", "openstack", "encode.qcow2", "write.azure_block"),
        ("s3://disks/x.vhd", "azure", "encode.vhd", "write.s3"),
    ],
)
def test_fixed_vhd_in_azure_becomes_a_page_blob_and_nothing_else_does(
    init: Callable[..., Said], tmp_path: Path, url: str, profile: str, encoder: str, writer: str
) -> None:
    write_disk(tmp_path / "disk.raw", "A")
    assert init("disk.raw", url, *(["--profile", profile] if profile else [])).code == 0
    chain = chain_of(tmp_path / "export.toml")
    assert (chain.encoder.name, chain.writer.name, chain.writer.options.url) == (encoder, writer, url)
    if encoder == "encode.vhd":
        assert chain.encoder.options.variant == "fixed"


def test_export_that_cannot_be_resumed_gets_no_journal() -> None:
    assert "journal" not in proposal(target_of("az://disks/x.vhd", CATALOG), journal="/run/web01.journal")
    assert "journal" in proposal(target_of("az://disks/x.qcow2", CATALOG), journal="/run/web01.journal")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_help_names_every_kind_of_url(init: Callable[..., Said], scheme: str) -> None:
    assert f" {scheme}://" in " ".join(init("--help").out.split())


def test_an_endpoint_goes_into_the_file(tmp_path: Path) -> None:
    target = target_of("s3://images/web01.qcow2", CATALOG, "https://s3.example.com")
    (tmp_path / "x.toml").write_text(proposal(target))
    assert chain_of(tmp_path / "x.toml").writer.options.endpoint == "https://s3.example.com"


def test_a_disk_in_use_is_told_in_the_file_where_it_is_read(tmp_path: Path) -> None:
    text = proposal(mounted=("/", "/srv"))
    before = text[: text.index('use  = "read.disk"')]
    assert "THIS DISK IS IN USE: /, /srv can be written while it is read." in before
    assert "export a snapshot" in before
    assert "IN USE" not in proposal()


def test_little_memory_gets_the_least_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(proposal(memory=200 * MiB))
    assert load_config(tmp_path / "x.toml", CATALOG).export.memory == 32 * MiB
    (tmp_path / "x.toml").write_text(proposal(memory=8 * GiB))
    assert load_config(tmp_path / "x.toml", CATALOG).export.memory == 96 * MiB


@pytest.mark.parametrize("odd", ['a"b', "back\\slash", "new\nline", "tab\t", "\x7f", "ü #", "'''"])
def test_names_of_any_kind_stay_names(tmp_path: Path, odd: str) -> None:
    made = Proposal(name="web01", disk=odd, disk_title=odd, target=target_of(f"/mnt/{odd}", CATALOG), mounted=(odd,))
    (tmp_path / "x.toml").write_text(proposal_text(made, CATALOG))
    chain = chain_of(tmp_path / "x.toml")
    assert str(chain.source.options.path) == odd
    assert str(chain.writer.options.path) == f"/mnt/{odd}"


def test_a_file_that_is_there_stays_as_it_is(init: Callable[..., Said], tmp_path: Path) -> None:
    write_disk(tmp_path / "disk.raw", "A")
    (tmp_path / "export.toml").write_text("mine")
    said = init("disk.raw", "out.qcow2")
    assert said.code == 2
    assert "the file is there already" in said.err
    assert (tmp_path / "export.toml").read_text() == "mine"
    assert init("disk.raw", "out.qcow2", "-o", "other.toml").code == 0
    assert (tmp_path / "other.toml").exists()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["/dev/nope"], "can't look at the disk: no such file or directory"),
        (["."], "this is neither a block device nor a file"),
        (["disk.raw", "ftp://x/y"], "nothing is stored under ftp:// here"),
        (["disk.raw", "s3://images/"], "names a folder"),
        (["disk.raw", "x.raw", "--endpoint", "https://a"], "write.file has no endpoint"),
        (["disk.raw", "x.raw", "-o", "no/such/folder.toml"], "the file can't be written"),
    ],
)
def test_what_makes_no_sense_is_refused_with_2_and_writes_nothing(
    init: Callable[..., Said], tmp_path: Path, arguments: list[str], reason: str
) -> None:
    write_disk(tmp_path / "disk.raw", "A")
    said = init(*arguments)
    assert said.code == 2
    assert reason in " ".join(said.err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.raw"]


def test_several_system_disks_are_listed_and_none_is_taken(
    init: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "system_disk", lambda self: SystemDisk(disks=(SDA, SDB)))
    said = init()
    assert said.code == 2
    assert "runs from 2 disks: /dev/sda (256 GiB, Fast SSD); /dev/sdb (20 GiB)" in said.err
    assert "pipeline init /dev/sda" in said.err


def test_a_container_says_so_and_lists_the_disks(init: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the root filesystem is an overlay: a container or a live system"
    monkeypatch.setattr(Machine, "system_disk", lambda self: SystemDisk(disks=(), reason=reason))
    monkeypatch.setattr(Machine, "disks", lambda self: [SDA])
    said = init("s3://images/web01.qcow2")
    assert said.code == 2
    assert f"can't tell which disk to export: {reason}" in said.err
    assert "Disks here: /dev/sda (256 GiB, Fast SSD). Name the disk" in said.err


def test_json_tells_what_was_written(init: Callable[..., Said], tmp_path: Path) -> None:
    write_disk(tmp_path / "disk.raw", "A")
    [told] = init("disk.raw", "--json").objects
    assert told["type"] == "initialised"
    assert told["file"] == "export.toml"
    assert told["disk"] == "disk.raw"
    assert told["target_is_guess"] is True


def test_without_arguments_on_this_machine_it_writes_a_good_file_or_says_why_not(tmp_path: Path) -> None:
    """The real /proc and /sys; as a program of its own, with nobody to answer a question."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "init", "-o", str(tmp_path / "x.toml"), "--json"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=60,
    )
    if done.returncode == 0:
        chain = chain_of(tmp_path / "x.toml")
        assert str(chain.source.options.path) == json.loads(done.stdout)["disk"]
    else:
        assert done.returncode == 2
        assert "can't tell which disk to export" in done.stderr or "disks: " in done.stderr


def test_journal_is_put_elsewhere_when_its_usual_place_lies_on_the_disk(tmp_path: Path) -> None:
    target = target_of("s3://images/web01.qcow2", CATALOG)
    proposal = Proposal(name="web01", disk="/dev/sda", disk_title="a disk", target=target, journal="/run/web01.journal")
    text = proposal_text(proposal, CATALOG)
    (tmp_path / "export.toml").write_text(text)
    config = load_config(tmp_path / "export.toml", CATALOG)
    assert config.export.journal == Path("/run/web01.journal")
    assert "until the machine starts anew" in text
    assert "journal" not in proposal_text(replace(proposal, journal=""), CATALOG).partition("[observe]")[0]


def test_usual_place_of_a_journal_is_told_to_lie_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.config import continuing

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    asked: list[tuple[Path, Path]] = []
    answer = True

    def lies(folder: Path, disk: Path) -> bool:
        asked.append((folder, disk))
        return answer

    monkeypatch.setattr(continuing, "lies_on_disk", lies)
    assert continuing.journal_beside("web01", Path("/dev/sda")) == Path("/run/web01.journal")
    assert asked == [(tmp_path, Path("/dev/sda"))]
    answer = False
    assert continuing.journal_beside("web01", Path("/dev/sda")) is None
