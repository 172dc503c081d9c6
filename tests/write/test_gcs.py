"""write.gcs: its parts against an S3 store (HMAC), its sessions against an emulator of the JSON interface."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qs

import anyio
import anyio.to_thread
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from pipeline.__main__ import main
from pipeline.config.continuing import Attempt, Mode
from pipeline.errors import ConfigError, KeptError, PlanError, StoreError, VerificationError
from pipeline.events import Event, RetryScheduled
from pipeline.flow import resume
from pipeline.flow.engine import Outcome
from pipeline.flow.orders import Order
from pipeline.flow.stage import SinkRequest
from pipeline.units import MiB
from stages.store.gcs import GcsClient
from stages.store.gcs_access import BearerSigner, GcsAccess, ServiceAccount, find_access
from stages.store.http import BytesBody
from stages.write import parts
from stages.write.gcs import GcsPartsWriter, Options
from tests.chains import export, write_toml
from tests.disks.letters import write_disk
from tests.end_to_end.places import unused_name
from tests.stores.faults import FlipRequest, LoseReply, Nth, Reply, ResetRequest, Rule, StallRequest
from tests.stores.gcs import GcsServer
from tests.stores.process import free_ports
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import S3Server
from tests.stores.seaweedfs import SeaweedFs
from tests.stores.tls import make_certificate
from tests.write.images import Collected, PatientClock, make_context, mixed

NAME = "images/web 01+ä.img"
LETTERS = "AB0-A" + "-" * 9 + "C0" + "DEF" * 6


@pytest.fixture(autouse=True)
def _no_google_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *("GS_ACCESS_KEY_ID", "GS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    ):
        monkeypatch.delenv(name, raising=False)


@dataclass
class Bench:
    """A bucket of the emulator, and what a run against it needs."""

    server: GcsServer
    tmp: Path
    monkeypatch: pytest.MonkeyPatch
    bucket: str = ""
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bucket = self.bucket or self.server.create_bucket(unused_name())
        self.reach(self.server.endpoint)

    def reach(self, endpoint: str) -> None:
        """Lead the program here."""
        self.monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)

    @property
    def url(self) -> str:
        """Of the image."""
        return f"gs://{self.bucket}/{NAME}"

    def toml(self, *more: str, encoder: str = "encode.raw", options: str = 'upload = "resumable"') -> Path:
        """An export of the disk in `tmp`."""
        return write_toml(
            self.tmp / "export.toml",
            f'read.disk; path = "{self.tmp / "disk"}"',
            "checksum.guest",
            "sparse.zeros",
            encoder,
            f'write.gcs; url = "{self.url}"; {options}',
            *more,
        )

    async def export(self, *more: str, **given: str) -> Outcome:
        """Run it."""
        return await export(self.toml(*more, **given), events=self.events)


@pytest.fixture
def bench(gcs_server: GcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bucket of the test's own."""
    write_disk(tmp_path / "disk", LETTERS)
    return Bench(gcs_server, tmp_path, monkeypatch)


# ---- one session, in order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("letters, tail", [(LETTERS, 0), ("ABCDEFGHI" * 3, 512), ("A", 512), ("ABCDEFGH", 0)])
async def test_session_stores_the_disk_whatever_its_length(bench: Bench, letters: str, tail: int) -> None:
    disk = write_disk(bench.tmp / "disk", letters, tail=tail)
    outcome = await bench.export("verify.receipt", "verify.readback")
    assert outcome.state == "identical"
    assert [verdict.state for verdict in outcome.verdicts] == ["identical", "identical"]
    assert bench.server.get(bench.bucket, NAME) == disk.read_bytes()
    assert bench.server.names(bench.bucket) == [NAME, f"{NAME}.manifest.json"]
    assert outcome.uri == bench.url


@pytest.mark.parametrize(
    "encoder", ["encode.gce", 'encode.qcow2; compression = "none"', 'encode.vhd; variant = "fixed"']
)
async def test_session_takes_every_format_in_sequence(bench: Bench, encoder: str) -> None:
    assert (await bench.export("verify.readback", encoder=encoder)).state == "identical"


async def test_session_refuses_a_head_that_comes_last(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"write.gcs takes pieces"):
        await bench.export(encoder="encode.qcow2")


@pytest.mark.parametrize(
    "rule",
    [
        Rule(ResetRequest(after_bytes=5 << 20), method="PUT", query="upload_id=", when=Nth(2)),
        Rule(LoseReply(), method="PUT", query="upload_id=", when=Nth(2)),
        Rule(Reply(status=503, when="body"), method="PUT", query="upload_id=", when=Nth(1)),
        Rule(LoseReply(), method="POST", query="resumable", when=Nth(1)),
        Rule(LoseReply(), method="PUT", query="upload_id=", when=Nth(4)),
    ],
    ids=["reset", "lost chunk", "busy", "lost open", "lost end"],
)
async def test_faults_on_the_way_cost_only_what_the_store_did_not_get(bench: Bench, rule: Rule) -> None:
    disk = write_disk(bench.tmp / "disk", "ABCDEFGHI" * 3, tail=512)
    async with FaultProxy(bench.server.port, rules=[rule]) as proxy:
        bench.reach(proxy.url)
        outcome = await bench.export("verify.readback")
    assert outcome.state == "identical"
    assert bench.server.get(bench.bucket, NAME) == disk.read_bytes()
    assert [event for event in bench.events if isinstance(event, RetryScheduled)]


async def test_bytes_that_changed_on_the_way_are_found_and_withdrawn(bench: Bench) -> None:
    rules = [Rule(FlipRequest(offset=1000), method="PUT", query="upload_id=", when=Nth(1))]
    async with FaultProxy(bench.server.port, rules=rules) as proxy:
        bench.reach(proxy.url)
        with pytest.raises((StoreError, VerificationError), match="other bytes than were sent"):
            await bench.export()
    assert bench.server.names(bench.bucket) == []


async def test_cancelled_session_leaves_no_object(bench: Bench) -> None:
    rules = [Rule(StallRequest(after_bytes=4 << 20), method="PUT", query="upload_id=", when=Nth(1))]
    async with FaultProxy(bench.server.port, rules=rules) as proxy:
        bench.reach(proxy.url)
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(bench.export)
                await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
                tasks.cancel_scope.cancel()
                proxy.release()  # the emulator serves one connection after the other
    assert bench.server.names(bench.bucket) == []
    (ended,) = proxy.requests("DELETE", query="upload_id=")
    assert ended.query == proxy.requests("PUT", query="upload_id=")[0].query


async def test_an_existing_target_a_missing_bucket_and_missing_credentials_are_told(bench: Bench) -> None:
    await bench.export()
    with pytest.raises(PlanError, match="target exists"):
        await bench.export()
    assert (await bench.export(options='upload = "resumable"; overwrite = true')).state == "stored"
    bench.bucket = "absent"
    with pytest.raises(PlanError, match="answered 404") as caught:
        await bench.export()
    assert "Create the bucket" in caught.value.hint
    bench.monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    for upload in ("resumable", "multipart"):
        with pytest.raises(PlanError, match="no credentials"):
            await bench.export(options=f'upload = "{upload}"')


@pytest.mark.parametrize(
    "given, missing", [("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"), ("SECRET_ACCESS_KEY", "ACCESS_KEY_ID")]
)
def test_half_of_a_key_is_told_by_its_other_half(given: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"GS_{given}", "hunter2")
    with pytest.raises(PlanError, match=f"GS_{given} is set, and GS_{missing} is not") as caught:
        find_access()
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 1 MiB, and a point to go on from behind each."""
    monkeypatch.setattr(parts, "BASE_PART", MiB)
    monkeypatch.setattr(resume, "POINT_EVERY_S", 0.0)


async def broken_off(bench: Bench, rule: Rule, options: str = 'upload = "resumable"') -> None:
    """An export that fails for good, and is kept."""
    async with FaultProxy(bench.server.port, rules=[rule]) as proxy:
        bench.reach(proxy.url)
        with pytest.raises(KeptError):
            await export(bench.toml("verify.readback", options=options), attempt=Attempt(command="pipeline run x"))


async def gone_on(bench: Bench, *rules: Rule, options: str = 'upload = "resumable"') -> tuple[Outcome, int]:
    """The same in a later process, and how many bytes of the image it sent."""
    async with FaultProxy(bench.server.port, rules=rules) as proxy:
        bench.reach(proxy.url)
        attempt = Attempt(mode=Mode.RESUME, command="pipeline run x")
        outcome = await export(bench.toml("verify.readback", options=options), events=bench.events, attempt=attempt)
        manifest = len(bench.server.get(bench.bucket, f"{NAME}.manifest.json"))
        return outcome, sum(seen.body_bytes for seen in proxy.requests("PUT", query="upload_id=")) - manifest


@pytest.mark.parametrize("with_account", [False, True])
async def test_session_of_an_earlier_process_is_gone_on_with(
    bench: Bench, small_parts: None, state_folder: Path, with_account: bool
) -> None:
    disk = write_disk(bench.tmp / "disk", "ABCDEFGHI" * 2, MiB, tail=512)
    with token_server([(200, b'{"access_token": "t0ken"}')], []) as uri:
        path, _ = key_file(bench.tmp, uri)
        options = 'upload = "resumable"' + (f'; key_file = "{path}"' if with_account else "")
        seventh = Rule(Reply(status=400, when="body"), method="PUT", query="upload_id=", when=Nth(7))
        await broken_off(bench, seventh, options)
        journal = b"".join(path.read_bytes() for path in state_folder.rglob("*.journal*"))
        assert (b"upload_id" in journal) != with_account, "a session's URL needs no login"
        outcome, sent = await gone_on(bench, options=options)
    assert outcome.state == "identical"
    assert sent == disk.stat().st_size - 6 * MiB
    assert bench.server.get(bench.bucket, NAME) == disk.read_bytes()


async def test_part_of_a_chunk_that_the_store_has_is_not_sent_again(bench: Bench, small_parts: None) -> None:
    """The line broke in the middle of a chunk, and the store kept what it had of it."""
    disk = write_disk(bench.tmp / "disk", "ABCDEFGHI", MiB, tail=512)
    fifth = Rule(Reply(status=400, when="body"), method="PUT", query="upload_id=", when=Nth(5))
    async with FaultProxy(bench.server.port, rules=[fifth]) as proxy:
        bench.reach(proxy.url)
        with pytest.raises(KeptError):
            await export(bench.toml(), attempt=Attempt(command="pipeline run x"))
        (session, *_) = proxy.requests("PUT", query="upload_id=")
    client = GcsClient(bench.bucket, GcsAccess(endpoint=bench.server.endpoint))
    half = disk.read_bytes()[4 * MiB : 4 * MiB + MiB // 2]
    span = f"bytes {4 * MiB}-{4 * MiB + len(half) - 1}/*"
    reached, _ = await client.send_chunk(f"{session.path}?{session.query}", BytesBody(half), span, "put_part")
    await client.close()
    assert reached == 4 * MiB + len(half)
    outcome, sent = await gone_on(bench)
    assert outcome.state == "identical"
    assert sent == disk.stat().st_size - reached


async def test_object_that_was_complete_and_not_published_is_not_sent_again(bench: Bench, small_parts: None) -> None:
    write_disk(bench.tmp / "disk", "ABCDEFGHI", MiB, tail=512)
    await broken_off(bench, Rule(Reply(status=400), method="POST", query="manifest"))
    outcome, sent = await gone_on(bench)
    assert outcome.state == "identical"
    assert sent == 0


async def test_session_that_the_store_forgot_is_begun_anew(bench: Bench, small_parts: None) -> None:
    disk = write_disk(bench.tmp / "disk", "ABCDEFGHI", MiB, tail=512)
    fifth = Rule(Reply(status=400, when="body"), method="PUT", query="upload_id=", when=Nth(5))
    async with FaultProxy(bench.server.port, rules=[fifth]) as proxy:
        bench.reach(proxy.url)
        with pytest.raises(KeptError):
            await export(bench.toml(), attempt=Attempt(command="pipeline run x"))
        proxy.set_rules(Rule(Reply(status=410, when="body"), method="PUT", when=Nth(1)))
        attempt = Attempt(mode=Mode.RESUME, command="pipeline run x")
        await export(bench.toml(), events=bench.events, attempt=attempt)
    assert bench.server.get(bench.bucket, NAME) == disk.read_bytes()
    assert "keeps it for a week" in str(bench.events)


async def test_session_of_another_store_is_not_looked_for_here(bench: Bench, small_parts: None) -> None:
    write_disk(bench.tmp / "disk", "ABCDEFGHI", MiB, tail=512)
    await broken_off(bench, Rule(Reply(status=400, when="body"), method="PUT", query="upload_id=", when=Nth(5)))
    gone = Rule(Reply(status=404, when="body"), method="PUT", when=Nth(1))
    async with FaultProxy(bench.server.port, rules=[gone]) as proxy:
        bench.reach(proxy.url)
        with pytest.raises(PlanError, match="not in this store") as caught:
            await export(bench.toml(), attempt=Attempt(mode=Mode.RESUME, command="pipeline run x"))
    assert "--discard" in caught.value.hint


async def test_disk_that_changed_is_not_mixed_into_a_session(bench: Bench, small_parts: None) -> None:
    disk = write_disk(bench.tmp / "disk", "ABCDEFGHI", MiB, tail=512)
    await broken_off(bench, Rule(Reply(status=400, when="body"), method="PUT", query="upload_id=", when=Nth(5)))
    with disk.open("r+b") as file:
        file.seek(2 * MiB + 5)
        file.write(b"changed")
    bench.reach(bench.server.endpoint)
    attempt = Attempt(mode=Mode.RESUME, command="pipeline run x")
    with pytest.raises(KeptError) as caught:
        await export(bench.toml(), attempt=attempt)
    assert "other bytes than an earlier process" in str(caught.value.cause)
    assert bench.server.names(bench.bucket) == []


def test_conversion_goes_to_and_comes_from_a_bucket(bench: Bench, seaweedfs: S3Server) -> None:
    """Writing takes the default, parts; what the emulator does not know is read from the S3 store here."""
    back, bucket = bench.tmp / "back.raw", seaweedfs.new_bucket()
    bench.monkeypatch.setenv("STORAGE_EMULATOR_HOST", seaweedfs.endpoint)
    bench.monkeypatch.setenv("GS_ACCESS_KEY_ID", seaweedfs.credentials.access_key)
    bench.monkeypatch.setenv("GS_SECRET_ACCESS_KEY", seaweedfs.credentials.secret_key)
    url = f"gs://{bucket}/x.qcow2"
    for arguments in (
        ["convert", str(bench.tmp / "disk"), url, "-f", "raw", "-q"],
        ["verify", url],
        ["inspect", url],
        ["convert", url, str(back), "-q"],
        ["uploads", "list", f"gs://{bucket}"],
    ):
        done = CliRunner().invoke(main, arguments, prog_name="pipeline")
        assert done.exit_code == 0, (arguments, done.output)
    assert back.read_bytes() == (bench.tmp / "disk").read_bytes()


# ---- parts ---------------------------------------------------------------------------------------------------------


async def test_parts_go_up_with_an_hmac_key_in_the_dialect_of_gcs(
    seaweedfs: S3Server, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = write_disk(bench.tmp / "disk", "ABCDEFGHI" * 4)
    monkeypatch.setenv("HMAC_SECRET", seaweedfs.credentials.secret_key)
    bench.bucket = seaweedfs.new_bucket()
    key = f'hmac_key = "{seaweedfs.credentials.access_key}"; hmac_secret = {{ env = "HMAC_SECRET" }}'
    async with FaultProxy(seaweedfs.port) as proxy:
        outcome = await bench.export(
            "verify.readback", encoder="encode.qcow2", options=f'{key}; endpoint = "{proxy.url}"'
        )
        sent = proxy.requests("PUT", query="partNumber=")
    assert outcome.state == "identical"
    assert outcome.uri == bench.url
    assert seaweedfs.keys(bench.bucket) == [NAME, f"{NAME}.manifest.json"]
    assert disk.stat().st_size == outcome.disk_size
    assert sent
    assert all("content-md5" in seen.headers for seen in sent)
    assert not any(name.startswith(("x-amz-checksum", "x-goog")) for seen in proxy.seen for name in seen.headers)


def with_key(server: S3Server, bench: Bench, secret: str | None = None) -> str:
    """The options that lead to an S3 store with its key, or with a wrong secret."""
    bench.bucket = server.new_bucket()
    bench.monkeypatch.setenv("HMAC_SECRET", server.credentials.secret_key if secret is None else secret)
    key = f'hmac_key = "{server.credentials.access_key}"; hmac_secret = {{ env = "HMAC_SECRET" }}'
    return f'{key}; endpoint = "{server.endpoint}"'


async def test_parts_go_over_tls_to_a_store_of_the_given_authority_alone(
    seaweedfs_tls: S3Server, bench: Bench, tmp_path: Path
) -> None:
    disk = write_disk(bench.tmp / "disk", "ABCDEFGHI" * 4)
    options = with_key(seaweedfs_tls, bench)
    stranger = make_certificate(tmp_path / "stranger").ca
    for wrong in (options, f'{options}; ca_file = "{stranger}"'):
        with pytest.raises(StoreError, match="certificate of the store is not trusted") as caught:
            await bench.export(options=wrong)
        assert "ca_file" in caught.value.hint
    assert seaweedfs_tls.keys(bench.bucket) == []
    outcome = await bench.export("verify.readback", options=f'{options}; ca_file = "{seaweedfs_tls.ca_file}"')
    assert outcome.state == "identical"
    assert seaweedfs_tls.get(bench.bucket, NAME) == disk.read_bytes()


async def test_wrong_hmac_key_is_refused_in_planning_with_its_source(seaweedfs: S3Server, bench: Bench) -> None:
    options = with_key(seaweedfs, bench, "not-the-secret")
    with pytest.raises(PlanError, match=r"SignatureDoesNotMatch|AccessDenied") as caught:
        await bench.export(options=options)
    assert f"HMAC key {seaweedfs.credentials.access_key}" in caught.value.hint
    assert "not-the-secret" not in str(caught.value) + caught.value.hint
    with pytest.raises(PlanError, match="InvalidAccessKeyId"):
        await bench.export(options=options.replace(f'"{seaweedfs.credentials.access_key}"', '"nobody"'))
    assert seaweedfs.keys(bench.bucket) == []


@pytest.mark.slow
async def test_server_that_is_killed_in_the_middle_of_a_part_and_comes_back_loses_nothing(
    own_seaweedfs: SeaweedFs, bench: Bench
) -> None:
    server, image, clock, outlet = own_seaweedfs.server, mixed(30 * MiB), PatientClock(), Collected()
    bench.bucket = server.new_bucket()
    bench.monkeypatch.setenv("GS_ACCESS_KEY_ID", server.credentials.access_key)
    bench.monkeypatch.setenv("GS_SECRET_ACCESS_KEY", server.credentials.secret_key)
    second = Rule(StallRequest(after_bytes=MiB), method="PUT", query="partNumber=2&", when=Nth(1))
    async with FaultProxy(server.port, rules=[second]) as proxy:
        context = make_context(image, events=bench.events, clock=clock)
        options = Options(url=bench.url, endpoint=proxy.url, parts_in_flight=1)
        writer = GcsPartsWriter(options, replace(context, name="write.gcs"))
        request = SinkRequest(layout=image.layout(), order=Order.SEQUENTIAL, memory=64 * MiB)
        await writer.plan(request)
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(writer.run, image.pieces(), outlet)
                await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
                await anyio.to_thread.run_sync(own_seaweedfs.kill)
                await clock.sleeps.wait()
                await anyio.to_thread.run_sync(own_seaweedfs.start)
                clock.back.set()
        await writer.close()
        again = [len(proxy.requests("PUT", query=f"partNumber={number}&")) for number in (1, 2, 3)]
    assert again == [1, 2, 1], "only the part under way is sent again"
    assert [event for event in bench.events if isinstance(event, RetryScheduled)]
    assert server.get(bench.bucket, NAME) == image.data
    assert server.open_uploads(bench.bucket) == []


# ---- service accounts ----------------------------------------------------------------------------------------------


@contextmanager
def token_server(replies: list[tuple[int, bytes]], asked: list[bytes]) -> Iterator[str]:
    """Answers with the given replies, and keeps what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = replies[min(len(asked), len(replies)) - 1]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/token"
        finally:
            server.shutdown()
            thread.join()


def key_file(folder: Path, token_uri: str) -> tuple[Path, rsa.RSAPublicKey]:
    """The key file of a service account, and the public half of its key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    told = {"type": "service_account", "client_email": "writer@project.example", "private_key_id": "k1"}
    path = folder / "key.json"
    path.write_text(json.dumps({**told, "private_key": pem, "token_uri": token_uri}))
    return path, key.public_key()


def decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


async def test_service_account_exchanges_a_signed_assertion_for_a_token_once(tmp_path: Path) -> None:
    asked: list[bytes] = []
    with token_server([(200, b'{"access_token": "t0ken", "expires_in": 3600}')], asked) as uri:
        path, public = key_file(tmp_path, uri)
        account = ServiceAccount.read(path)
        signer = BearerSigner(GcsAccess(endpoint="https://store", account=account, source="a test"))
        for _ in range(2):
            assert (await signer.sign("GET", "https://store/x", {}, b""))["Authorization"] == "Bearer t0ken"
    (form,) = [parse_qs(text.decode()) for text in asked]
    header, claim, signature = form["assertion"][0].split(".")
    public.verify(decoded(signature), f"{header}.{claim}".encode(), padding.PKCS1v15(), hashes.SHA256())
    assert json.loads(decoded(claim))["iss"] == "writer@project.example"
    assert "PRIVATE" not in repr(account)


async def test_token_is_renewed_before_it_ends(tmp_path: Path) -> None:
    asked: list[bytes] = []
    replies = [(200, b'{"access_token": "%d", "expires_in": 60}' % number) for number in range(3)]
    with token_server(replies, asked) as uri:
        account = ServiceAccount.read(key_file(tmp_path, uri)[0])
        signer = BearerSigner(GcsAccess(endpoint="https://store", account=account))
        told = [(await signer.sign("GET", "https://store/x", {}, b""))["Authorization"] for _ in range(3)]
    assert told == ["Bearer 0", "Bearer 1", "Bearer 2"]


async def test_refused_service_account_and_a_wrong_key_file_are_told(tmp_path: Path) -> None:
    with token_server([(400, b'{"error": "invalid_grant"}')], []) as uri:
        account = ServiceAccount.read(key_file(tmp_path, uri)[0])
        signer = BearerSigner(GcsAccess(endpoint="https://store", account=account))
        with pytest.raises(StoreError, match="no token for writer@project"):
            await signer.sign("GET", "https://store/x", {}, b"")
    for text in ("{}", "no json", '{"type": "authorized_user"}'):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(PlanError, match="key file"):
            ServiceAccount.read(tmp_path / "wrong.json")


async def test_unreachable_token_service_is_told_by_the_name_it_has_in_the_key_file(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    account = ServiceAccount.read(key_file(tmp_path, f"http://127.0.0.1:{port}/token")[0])
    signer = BearerSigner(GcsAccess(endpoint="https://store", account=account))
    with pytest.raises(StoreError, match="can't connect") as caught:
        await signer.sign("GET", "https://store/x", {}, b"")
    assert caught.value.hint.startswith('Check "token_uri" in the key file')


async def test_parts_carry_the_token_and_the_conditions_of_google(bench: Bench) -> None:
    """No server at hand knows both: the proxy answers in its place."""
    image = mixed(9 * MiB, zeros=False)
    started = b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>"
    rules = [
        Rule(Reply(status=404), method="HEAD"),
        Rule(Reply(status=200, body=b"<ListBucketResult/>"), method="GET"),
        Rule(Reply(status=200, body=started), method="POST", query="^uploads="),
        Rule(Reply(status=200, headers={"ETag": '"1"'}, when="body"), method="PUT"),
        Rule(Reply(status=200, body=b"<C><ETag>2</ETag></C>", when="body"), method="POST", query="^uploadId="),
    ]
    with token_server([(200, b'{"access_token": "t0ken"}')], []) as uri:
        path, _ = key_file(bench.tmp, uri)
        async with FaultProxy(bench.server.port, rules=rules) as proxy:
            options = Options(url=bench.url, key_file=path, endpoint=proxy.url)
            writer = GcsPartsWriter(options, replace(make_context(image), name="write.gcs"))
            request = SinkRequest(layout=image.layout(image_bytes_max=1 << 30), order=Order.SEQUENTIAL, memory=64 * MiB)
            await writer.plan(request)
            await writer.run(image.pieces(), Collected())
            await writer.close()
    assert {seen.headers.get("authorization") for seen in proxy.seen} == {"Bearer t0ken"}
    assert not any(name.startswith("x-amz") for seen in proxy.seen for name in seen.headers)
    assert [seen.headers["x-goog-hash"][:7] for seen in proxy.requests("PUT")] == ["crc32c=", "crc32c="]
    assert proxy.requests("POST", query="^uploadId=")[0].headers["x-goog-if-generation-match"] == "0"


async def test_session_carries_the_token_of_a_service_account(bench: Bench) -> None:
    with token_server([(200, b'{"access_token": "t0ken"}')], []) as uri:
        path, _ = key_file(bench.tmp, uri)
        async with FaultProxy(bench.server.port) as proxy:
            bench.reach(proxy.url)
            await bench.export("verify.readback", options=f'upload = "resumable"; key_file = "{path}"')
            assert {seen.headers.get("authorization") for seen in proxy.seen} == {"Bearer t0ken"}
