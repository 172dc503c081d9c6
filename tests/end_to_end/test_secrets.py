"""Planted secrets are found nowhere: not in output, events, logs, manifests, journals, reports, tracebacks, configs."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from pipeline.units import MiB
from tests.chains import write_toml
from tests.disks.letters import write_disk
from tests.end_to_end.command import Said, run
from tests.stores.faults import FlipReply, Rule, error_reply
from tests.stores.openssh import SftpServer
from tests.stores.proxy import FaultProxy
from tests.stores.ranged import RangedServer, ranged_server
from tests.stores.s3 import S3Server

USERINFO = "planted-userinfo-61c8"
SIGNATURE = "planted-signature-9f31"
PASSWORD = "planted-password-7d02"
PASSPHRASE = "planted-passphrase-44ab"
TOKEN = "planted-token-e5e5"
PLANTED = (USERINFO, SIGNATURE, PASSWORD, PASSPHRASE, TOKEN)
# Small parts, so that a small disk fails in mid-upload.
SMALL = (sys.executable, "-m", "tests.end_to_end.killed_run", "0")


@pytest.fixture
def source(tmp_path: Path) -> Iterator[RangedServer]:
    """A web server that has the disk, behind a password and with whatever query."""
    disk = write_disk(tmp_path / "disk.raw", "ABCDEFGHIJKLMNOPQR", MiB)
    with ranged_server(disk=disk.read_bytes()) as server:
        server.password = base64.b64encode(f"reader:{USERINFO}".encode()).decode()
        yield server


def url_of(source: RangedServer, path: str = "/disk") -> str:
    place = source.url.removeprefix("http://")
    return f"http://reader:{USERINFO}@{place}{path}?X-Amz-Credential=x&X-Amz-Signature={SIGNATURE}"


def files_below(*folders: Path) -> Iterable[Path]:
    return (path for folder in folders for path in folder.rglob("*") if path.is_file())


def secrets_in(text: bytes, more: Iterable[str] = ()) -> list[str]:
    forms = [(one, form) for one in (*PLANTED, *more) for form in (one, base64.b64encode(one.encode()).decode()[:-4])]
    return [one for one, form in forms if form.encode() in text]


def check(said: Said, folders: Iterable[Path], secret_key: str, *, without: Iterable[str] = ()) -> None:
    for what, text in (("stdout", said.out), ("stderr", said.err)):
        assert secrets_in(text.encode(), [secret_key]) == [], f"{what}: {text}"
    looked = 0
    for path in files_below(*folders):
        if path.name in without:
            continue
        looked += 1
        assert secrets_in(path.read_bytes(), [secret_key]) == [], path
    assert looked


@pytest.mark.parametrize("as_json", [True, False])
async def test_failed_and_resumed_export_tells_no_secret(
    seaweedfs: S3Server, tmp_path: Path, state_folder: Path, source: RangedServer, as_json: bool
) -> None:
    bucket = seaweedfs.new_bucket()
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.image; url = "{url_of(source)}"; format = "raw"',
        "checksum.guest",
        "sparse.zeros",
        "encode.raw",
        f'write.s3; url = "s3://{bucket}/image"; parts_in_flight = 1; attempts = 2',
        "verify.readback",
    )
    made = tmp_path / "made"
    made.mkdir()
    observe = f'[observe]\nreport = "{made}/r.html"\nlog_file = "{made}/l.json"\nlog_level = "debug"\n'
    toml.write_text(toml.read_text().replace("[[stage]]", f'{observe}prometheus = "{made}/p.prom"\n[[stage]]', 1))
    options = ["--json"] if as_json else []
    folders = (made, state_folder)
    denied = Rule(error_reply(403, "AccessDenied"), method="PUT", query="partNumber=3&")
    key = seaweedfs.credentials.secret_key
    async with FaultProxy(seaweedfs.port, rules=[denied]) as proxy:
        env = {**seaweedfs.reached_at(proxy.url).environment(), "AWS_SESSION_TOKEN": ""}
        failed = await run("run", toml, *options, env=env, program=SMALL)
        assert failed.code == 4, failed.err
        assert list(state_folder.rglob("*.journal"))
        check(failed, folders, key)
        proxy.set_rules()
        resumed = await run("run", toml, "--resume", *options, env=env, program=SMALL)
        assert resumed.code == 0, resumed.err
    check(resumed, folders, key)
    assert secrets_in(seaweedfs.get(bucket, "image.manifest.json"), [key]) == []
    assert secrets_in((tmp_path / "image.manifest.json").read_bytes(), [key]) == []


async def test_every_verb_that_gets_a_url_tells_no_secret(
    seaweedfs: S3Server, tmp_path: Path, source: RangedServer
) -> None:
    (tmp_path / "out").mkdir()
    bucket, env = seaweedfs.new_bucket(), seaweedfs.environment()
    verbs: list[tuple[int | None, list[object]]] = [
        (0, ["inspect", url_of(source), "-f", "raw"]),
        (None, ["inspect", url_of(source)]),
        (None, ["inspect", url_of(source, "/absent")]),
        (None, ["verify", url_of(source, "/absent")]),
        (None, ["uploads", "list", url_of(source)]),
        (0, ["convert", url_of(source), tmp_path / "out" / "a.qcow2", "--print-config"]),
        (0, ["convert", url_of(source), tmp_path / "out" / "a.qcow2"]),
        (None, ["convert", url_of(source, "/absent"), tmp_path / "out" / "b.qcow2"]),
        (None, ["convert", url_of(source), f"s3://{bucket}/a.qcow2"]),
        (None, ["convert", url_of(source), f"sftp://u:{USERINFO}@127.0.0.1:1/a.qcow2"]),
        (None, ["run", tmp_path / "absent.toml", "--set", f"read.image.url={url_of(source)}"]),
    ]
    # What fails is told to a program by the same few lines, whatever failed: one of each verb.
    for_programs = [(code, [*words, "--json"]) for code, words in verbs if code == 0 or words[0] in ("verify", "run")]
    for code, words in verbs + for_programs:
        for made in (tmp_path / "out").iterdir():
            made.unlink()
        said = await run(*words, env=env)
        assert code in (None, said.code), (words, said.err)
        assert secrets_in((said.out + said.err).encode()) == [], (words, said.out, said.err)
        for made in (tmp_path / "out").iterdir():
            assert secrets_in(made.read_bytes()) == [], made
    assert source.asked


async def test_wrong_passwords_are_not_told(sftp_server: SftpServer, tmp_path: Path) -> None:
    write_disk(tmp_path / "disk", "AB", MiB)
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.disk; path = "{tmp_path / "disk"}"',
        "encode.raw",
        f'write.sftp; url = "{sftp_server.url("secret")}"; known_hosts = "{sftp_server.known_hosts}"; agent = false; '
        f'identity_files = ["{sftp_server.stranger}"]; password = {{ env = "PW" }}; passphrase = {{ env = "PP" }}',
    )
    for more in ([], ["--json"]):
        for verb in ("run", "plan", "check"):
            said = await run(verb, toml, *more, env={"PW": PASSWORD, "PP": PASSPHRASE})
            assert said.code in (0, 1, 2), said.err
            assert secrets_in((said.out + said.err).encode()) == [], (verb, said.err)


async def test_internal_error_shows_no_secret_in_its_traceback(
    seaweedfs: S3Server, tmp_path: Path, source: RangedServer
) -> None:
    """The program is made to fail where it holds the secrets."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys\n"
        "from stages.write.s3 import S3Writer\n"
        "async def fails(self, request):\n"
        "    raise RuntimeError(f'{self._options} {self._context}')\n"
        "S3Writer.plan = fails\n"
        "from pipeline.__main__ import main\n"
        "main(prog_name='pipeline')\n"
    )
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.image; url = "{url_of(source)}"; format = "raw"',
        "encode.raw",
        f'write.s3; url = "s3://{seaweedfs.new_bucket()}/image"',
    )
    env = {**seaweedfs.environment(), "AWS_SESSION_TOKEN": TOKEN, "PYTHONPATH": str(Path(__file__).parents[2])}
    said = await run("run", toml, env=env, program=(sys.executable, str(broken)))
    assert said.code == 1
    assert "internal error: RuntimeError" in said.err
    assert secrets_in((said.out + said.err).encode(), [seaweedfs.credentials.secret_key]) == []


async def test_manifest_and_journal_of_a_flipped_readback_tell_no_secret(
    seaweedfs: S3Server, tmp_path: Path, state_folder: Path, source: RangedServer
) -> None:
    bucket = seaweedfs.new_bucket()
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.image; url = "{url_of(source)}"; format = "raw"',
        "checksum.guest",
        "encode.raw",
        f'write.s3; url = "s3://{bucket}/image"',
        "verify.readback",
    )
    rule = Rule(FlipReply(offset=100), method="GET", path="image$")
    async with FaultProxy(seaweedfs.port, rules=[rule]) as proxy:
        env = seaweedfs.reached_at(proxy.url).environment()
        said = await run("run", toml, env=env)
    assert said.code == 3, said.err
    assert secrets_in((said.out + said.err).encode(), [seaweedfs.credentials.secret_key]) == []
    assert seaweedfs.keys(bucket) == []
