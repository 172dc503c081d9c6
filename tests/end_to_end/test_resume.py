"""An export that failed or was stopped is gone on with: what is kept, what is refused, and what is told."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from pipeline.config.continuing import Attempt, Mode, journal_path
from pipeline.config.parse import load_config
from pipeline.errors import AlreadyFinished, KeptError, PipelineError, PlanError, VerificationError
from pipeline.events import Event, FallbackTaken, LeftoverFound, PartStored, RunResumed, UploadKept
from pipeline.flow import resume
from pipeline.flow.engine import Outcome
from pipeline.flow.journal import RecordLog
from pipeline.observe.progress import phase_line
from pipeline.units import MiB, format_exact, format_size
from stages.catalog import CATALOG
from stages.write import parts, ranges
from stages.write.partial import partial_name
from tests.chains import export, write_toml
from tests.end_to_end.kills import write_large_letters
from tests.stores.faults import Every, FlipReply, Nth, Rule, error_reply
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import S3Server, StoreProcess

RESUME = Attempt(mode=Mode.RESUME, command="pipeline run x.toml")
NEW = Attempt(command="pipeline run x.toml")
DISCARD = Attempt(mode=Mode.DISCARD, command="pipeline run x.toml")
# Part 5 of 7 or 8 fails for good.
FAILS = Rule(error_reply(403, "AccessDenied"), method="PUT", query="partNumber=5&")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts as small as S3 takes them, and a point at every window."""
    monkeypatch.setattr(parts, "BASE_PART", 5 * MiB)
    monkeypatch.setattr(resume, "POINT_EVERY_S", 0.0)
    monkeypatch.setattr(resume, "POINT_SHARE", 0)
    monkeypatch.setattr(ranges, "_MARK_EVERY_S", 0.001)
    monkeypatch.setattr(ranges, "_MARK_SHARE", 0)


class Case:
    """An export to S3 through a proxy."""

    def __init__(self, folder: Path, server: S3Server, proxy: FaultProxy) -> None:
        self.folder = folder
        self.server = server
        self.proxy = proxy
        self.bucket = server.new_bucket()
        self.disk = write_large_letters(folder / "disk.raw")
        self.events: list[Event] = []

    def toml(
        self,
        encoder: str = "encode.qcow2",
        *,
        checksum: str = "checksum.guest",
        memory: str = "96 MiB",
        write: str = "",
        endpoint: str = "",
        more: str = "",
    ) -> Path:
        path = write_toml(
            self.folder / "export.toml",
            f'read.disk; path = "{self.disk}"; block_size = "2 MiB"',
            *([checksum] if checksum else []),
            "sparse.zeros",
            encoder,
            f'write.s3; url = "s3://{self.bucket}/image"; endpoint = "{endpoint or self.proxy.url}"; '
            f"parts_in_flight = 1{write}",
            *(["verify.readback"] if checksum else []),
            memory=memory,
        )
        if more:
            path.write_text(path.read_text().replace("[export]", f"[export]\n{more}"))
        return path

    async def run(self, toml: Path, attempt: Attempt) -> Outcome:
        self.events.clear()
        return await export(toml, attempt=attempt, events=self.events)

    async def fail(self, toml: Path, *, rule: Rule = FAILS) -> KeptError:
        """Run until a part fails for good; the proxy works again afterwards, and has forgotten what it saw."""
        self.proxy.set_rules(rule)
        with pytest.raises(KeptError) as raised:
            await self.run(toml, NEW)
        self.proxy.set_rules()
        self.stored = {event.number for event in self.events if isinstance(event, PartStored)}
        self.proxy.seen.clear()
        return raised.value

    def sent(self) -> set[int]:
        found = (re.search(r"partNumber=(\d+)", seen.query) for seen in self.proxy.requests("PUT", query="partNumber="))
        return {int(one[1]) for one in found if one}

    def left(self) -> list[str]:
        keys = set(self.server.keys(self.bucket)) - {"image", "image.manifest.json"}
        uploads = [str(one) for one in self.server.open_uploads(self.bucket)]
        state = Path(os.environ["XDG_STATE_HOME"]) / "disk-pipeline"
        return [*keys, *uploads, *(one.name for one in state.iterdir())]

    def fallbacks(self) -> list[str]:
        return [f"{event.what}: {event.reason}" for event in self.events if isinstance(event, FallbackTaken)]

    @property
    def resumed(self) -> RunResumed:
        [event] = [event for event in self.events if isinstance(event, RunResumed)]
        return event


@pytest.fixture
def case(seaweedfs: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Case]:
    """Makes a Case of a proxy that the test opened."""
    for name, value in seaweedfs.environment().items():
        monkeypatch.setenv(name, value)

    def make(proxy: FaultProxy) -> Case:
        return Case(tmp_path, seaweedfs, proxy)

    return make


Make = Callable[[FaultProxy], Case]


@pytest.mark.parametrize("memory", ["96 MiB", "40 MiB"])
@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
async def test_failed_upload_is_kept_and_gone_on_with(
    seaweedfs: S3Server, case: Make, encoder: str, memory: str
) -> None:
    """With 40 MiB parts are streamed, and made again where they have to be compared."""
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml(encoder, memory=memory)
        error = await it.fail(toml)
        assert error.exit_code == 4
        assert error.resume == "pipeline run x.toml --resume"
        assert "aws s3api abort-multipart-upload" in error.commands[0]
        assert "Resume it with: pipeline run x.toml --resume\n" in error.hint
        assert any(isinstance(event, UploadKept) for event in it.events)
        assert len(seaweedfs.open_uploads(it.bucket)) == 1
        outcome = await it.run(toml, RESUME)
        assert outcome.state == "identical"
        assert outcome.manifest.attempts == 2
        assert it.stored
        assert not it.stored & it.sent()
        assert it.resumed.guest_bytes > 4 * MiB
        sent = sum(event.length_bytes for event in it.events if isinstance(event, PartStored))
        assert outcome.stored_bytes - outcome.earlier_stored_bytes == sent < outcome.stored_bytes
        assert it.resumed.guest_bytes <= outcome.earlier_disk_bytes < outcome.disk_size
        assert 0 < outcome.earlier_read_bytes < outcome.read_bytes
        assert it.left() == []
        if encoder == "encode.raw":
            assert seaweedfs.get(it.bucket, "image") == it.disk.read_bytes()


async def test_commands_that_a_kept_run_tells_remove_everything(
    seaweedfs: S3Server, case: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        error = await it.fail(it.toml())
        found = re.search(r"--upload-id (\S+)", error.commands[0])
        assert found is not None
        seaweedfs.client().abort_multipart_upload(Bucket=it.bucket, Key="image", UploadId=found[1])
        subprocess.run(error.commands[-1], shell=True, check=True)
        assert it.left() == []


async def test_run_that_finds_an_unfinished_one_says_what_to_type(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()
        await it.fail(toml)
        with pytest.raises(PlanError, match=r'an export "test" .* is not finished') as raised:
            await it.run(toml, NEW)
        assert "pipeline run x.toml --resume" in raised.value.hint
        assert "pipeline run x.toml --discard" in raised.value.hint
        assert it.proxy.seen == []


async def test_plan_that_finds_an_unfinished_run_says_what_to_type(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()

        async def plan() -> str:
            command = [sys.executable, "-m", "pipeline", "plan", str(toml)]
            return (await anyio.run_process(command, cwd=Path(__file__).parents[2])).stdout.decode()

        assert (await plan()).endswith(f"The next step: pipeline run {toml}\n")
        await it.fail(toml)
        before = it.left()
        told = await plan()
        assert f"Go on with it: pipeline run {toml} --resume\n" in told
        assert f"start anew: pipeline run {toml} --discard\n" in told
        assert "The next step" not in told
        assert it.left() == before
        assert (await it.run(toml, RESUME)).state == "identical"


async def test_discard_removes_what_was_sent_and_starts_anew(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        await it.fail(it.toml())
        outcome = await it.run(it.toml('encode.qcow2; compression = "zstd"'), DISCARD)
        assert outcome.state == "identical"
        assert it.stored <= it.sent()
        assert it.fallbacks() == ["the export starts anew: what was sent before has been removed"]
        assert it.left() == []


@pytest.mark.parametrize(
    "changed, told",
    [
        (
            {"encoder": 'encode.qcow2; cluster_size = "128 KiB"'},
            "begun: encode.qcow2.cluster_size was 65536, is 131072",
        ),
        ({"encoder": 'encode.qcow2; level = "small"'}, 'encode.qcow2.level was "fast", is "small"'),
        ({"write": '; checksum = "md5"'}, 'write.s3.checksum was "auto", is "md5"'),
        ({"checksum": 'checksum.guest; algorithm = "blake3"'}, 'checksum.guest.algorithm was "xxh3-128", is "blake3"'),
        ({"checksum": ""}, "the chain was read.disk -> checksum.guest -> "),
        ({"encoder": "encode.raw"}, "-> encode.raw -> write.s3"),
    ],
)
async def test_option_that_shapes_the_image_is_refused_by_name(
    seaweedfs: S3Server, case: Make, changed: dict[str, str], told: str
) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        await it.fail(it.toml())
        with pytest.raises(PlanError) as raised:
            await it.run(it.toml(**changed), RESUME)
        assert told in str(raised.value)
        assert "the image's" not in str(raised.value), "what follows from an option is not its fault"
        assert it.sent() == set()
        assert len(it.left()) == 3, "the upload and the journal stay"


async def test_option_that_does_not_shape_the_image_may_change(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        await it.fail(it.toml())
        toml = it.toml(write="; attempts = 2; overwrite = true", endpoint=seaweedfs.endpoint, memory="128 MiB")
        toml.write_text(toml.read_text().replace("parts_in_flight = 1", "parts_in_flight = 5"))
        assert (await it.run(toml, RESUME)).state == "identical"
        assert it.left() == []


async def test_disk_that_changed_is_refused_with_its_place(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()
        await it.fail(toml)
        with it.disk.open("r+b") as disk:
            disk.seek(5 * MiB + 100)
            disk.write(b"changed")
        with pytest.raises(PlanError, match=r"the disk changed since it was sent .*offset=5242880"):
            await it.run(toml, RESUME)
        assert it.sent() == set()
        assert (await it.run(toml, DISCARD)).state == "identical"


async def test_disk_that_was_only_touched_is_read_again_and_gone_on_with(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()
        await it.fail(toml)
        os.utime(it.disk)
        assert (await it.run(toml, RESUME)).state == "identical"
        assert it.resumed.compared_bytes >= 4 * MiB
        assert not it.stored & it.sent()


async def test_raw_image_gets_the_parts_of_a_disk_that_changed_again(seaweedfs: S3Server, case: Make) -> None:
    """Part 2 of a raw image holds [5, 10) MiB of the disk; no other part is sent again."""
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml("encode.raw")
        await it.fail(toml)
        assert {1, 2, 3} <= it.stored
        with it.disk.open("r+b") as disk:
            disk.seek(6 * MiB)
            disk.write(b"changed")
        outcome = await it.run(toml, RESUME)
        assert outcome.state == "identical"
        assert it.sent() & it.stored == {2}
        assert any("what changed is sent again" in told for told in it.fallbacks())
        assert seaweedfs.get(it.bucket, "image") == it.disk.read_bytes()
        assert it.left() == []


async def test_another_disk_is_refused(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()
        await it.fail(toml)
        real = resume.other_disk
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("pipeline.config.continuing.other_disk", lambda old, now: real({**old, "serial": "A"}, now))
            with pytest.raises(PlanError, match="not the disk that was being exported: its serial was A, is none"):
                await it.run(toml, RESUME)


@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
@pytest.mark.parametrize("change", [-4 * MiB, 4 * MiB, 512])
async def test_disk_that_shrank_or_grew_is_refused_with_both_sizes(
    seaweedfs: S3Server, case: Make, encoder: str, change: int
) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml(encoder)
        await it.fail(toml)
        before = it.disk.stat().st_size
        os.truncate(it.disk, before + change)
        with pytest.raises(PlanError) as raised:
            await it.run(toml, RESUME)
        told = format_size if change % MiB == 0 else format_exact
        begun = f"the disk is {told(before + change)}, and was {told(before)} when this export was begun"
        assert begun in str(raised.value)
        assert "old value" not in raised.value.hint
        assert "--discard" in raised.value.hint


@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
async def test_without_digests_a_full_recheck_compares_the_image_itself(
    seaweedfs: S3Server, case: Make, encoder: str
) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml(encoder, checksum="")
        await it.fail(toml)
        assert (await it.run(toml, Attempt(mode=Mode.RESUME, recheck="full"))).state == "stored"
        assert it.resumed.guest_bytes == 0
        assert it.stored
        assert not it.stored & it.sent()
        assert it.left() == []


async def test_without_digests_a_changed_disk_is_found_by_the_parts(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml(checksum="")
        await it.fail(toml)
        with it.disk.open("r+b") as disk:
            disk.write(b"changed")
        with pytest.raises(KeptError) as raised:
            await it.run(toml, RESUME)
        assert "gives other bytes than an earlier process" in str(raised.value.cause)


async def test_on_failure_abort_leaves_nothing(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        it.proxy.set_rules(FAILS)
        with pytest.raises(PipelineError) as raised:
            await it.run(it.toml(more='on_failure = "abort"'), NEW)
        assert raised.value.exit_code == 1
        assert it.left() == []


async def test_run_that_failed_before_any_part_was_stored_leaves_nothing(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        it.proxy.set_rules(Rule(error_reply(403, "AccessDenied"), method="PUT", query="partNumber="))
        with pytest.raises(PipelineError) as raised:
            await it.run(it.toml(), NEW)
        assert raised.value.exit_code == 1
        assert it.left() == []


async def test_failed_verification_is_never_kept(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        it.proxy.set_rules(Rule(FlipReply(offset=1000), method="GET", path="/image$", query="^$", when=Nth(3)))
        with pytest.raises(VerificationError):
            await it.run(it.toml("encode.raw"), NEW)
        assert seaweedfs.keys(it.bucket) == []
        assert it.left() == []


async def test_verification_that_could_not_be_made_is_gone_on_with(seaweedfs: S3Server, case: Make) -> None:
    """The object is complete: nothing is sent again, it is only verified and published."""
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()
        rule = Rule(error_reply(403, "AccessDenied"), method="GET", path="/image$", query="^$", when=Every())
        error = await it.fail(toml, rule=rule)
        assert "delete-object" in error.commands[0]
        outcome = await it.run(toml, RESUME)
        assert outcome.state == "identical"
        assert it.sent() == set()
        assert it.left() == []


async def test_resume_without_a_journal_starts_anew_and_says_so(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        outcome = await it.run(it.toml(), RESUME)
        assert outcome.state == "identical"
        assert it.fallbacks()[0].startswith("the export starts anew: there is nothing to resume in ")


@pytest.mark.parametrize(
    "damage", ["missing", *(pytest.param(one, marks=pytest.mark.slow) for one in ("cut", "unreadable"))]
)
@pytest.mark.parametrize("attempt", [NEW, RESUME])
async def test_upload_whose_journal_is_gone_is_named_with_the_command_that_removes_it(
    seaweedfs: S3Server, case: Make, attempt: Attempt, damage: str
) -> None:
    """It is left where it is: a run of another machine may be at work on it."""
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml(endpoint=proxy.url)
        await it.fail(toml)
        spoil(journal_path(load_config(toml, CATALOG)), damage)
        [(_, old)] = seaweedfs.open_uploads(it.bucket)
        assert (await it.run(toml, attempt)).state == "identical"
        assert seaweedfs.open_uploads(it.bucket) == [("image", old)]
        [found] = [event for event in it.events if isinstance(event, LeftoverFound)]
        assert found.uri == f"s3://{it.bucket}/image"
        assert (found.size_bytes or 0) >= 5 * MiB
        assert found.remove == f"pipeline uploads abort {found.uri} --endpoint {proxy.url} --upload-id {old}"
        assert found.remove in phase_line(found)
        await removed_by(found.remove)
        assert seaweedfs.open_uploads(it.bucket) == []


async def test_store_that_does_not_list_uploads_holds_no_run_up(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        proxy.set_rules(Rule(error_reply(403, "AccessDenied"), method="GET", query="uploads"))
        assert (await it.run(it.toml(), RESUME)).state == "identical"
        told = next(one for one in it.fallbacks() if "earlier run" in one)
        assert f"pipeline uploads list s3://{it.bucket}/image --endpoint {proxy.url}: AccessDenied" in told


@pytest.mark.parametrize("damage", ["missing", "cut", "unreadable"])
async def test_file_whose_journal_is_gone_is_named_with_the_command_that_removes_it(
    tmp_path: Path, damage: str
) -> None:
    disk = write_large_letters(tmp_path / "disk.raw")
    target = tmp_path / "my images" / "image"
    target.parent.mkdir()
    toml = write_toml(
        tmp_path / "export.toml", f'read.disk; path = "{disk}"', "encode.raw", f'write.file; path = "{target}"'
    )
    partial = target.parent / partial_name("image", "test", "0badcafe")
    partial.write_bytes(bytes(8192))
    spoil(journal_path(load_config(toml, CATALOG)), damage)
    events: list[Event] = []
    assert (await export(toml, attempt=RESUME, events=events)).state == "stored"
    [found] = [event for event in events if isinstance(event, LeftoverFound)]
    assert (found.uri, found.size_bytes) == (str(partial), 8192)
    assert partial.exists()
    await removed_by(found.remove)
    assert sorted(one.name for one in target.parent.iterdir()) == ["image", "image.manifest.json"]


def spoil(journal: Path, damage: str) -> None:
    """Leave a journal as a lost disk, a power loss, or a slip leaves it."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    if damage == "missing":
        journal.unlink(missing_ok=True)
    else:
        journal.write_bytes(journal.read_bytes()[:40] if damage == "cut" and journal.exists() else b"precious")


async def removed_by(command: str) -> None:
    """Run a command that was told, as a person pastes it."""
    program, *arguments = shlex.split(command)
    assert program == "pipeline"
    await anyio.run_process([sys.executable, "-m", "pipeline", *arguments], cwd=Path(__file__).parents[2])


async def test_resume_of_a_finished_export_has_nothing_to_do(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()
        await it.run(toml, NEW)
        it.proxy.seen.clear()
        with pytest.raises(AlreadyFinished) as raised:
            await it.run(toml, RESUME)
        assert raised.value.exit_code == 0
        assert it.proxy.requests("PUT") == []
        assert it.left() == []
        it.disk.write_bytes(bytes(4 * MiB))
        with pytest.raises(PlanError, match="the target exists"):
            await it.run(toml, RESUME)


async def test_upload_that_the_store_forgot_is_begun_anew(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()
        await it.fail(toml)
        for key, upload_id in seaweedfs.open_uploads(it.bucket):
            seaweedfs.client().abort_multipart_upload(Bucket=it.bucket, Key=key, UploadId=upload_id)
        assert (await it.run(toml, RESUME)).state == "identical"
        assert "does not have the upload any more" in it.fallbacks()[0]
        assert it.left() == []


async def test_part_that_the_store_lost_is_sent_again(
    seaweedfs: S3Server, case: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's list of parts decides, not the journal."""
    from stages.store.s3 import S3Client

    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()
        await it.fail(toml)
        real = S3Client.list_parts

        async def forgets(client: S3Client, key: str, upload_id: str) -> dict[int, tuple[int, str]] | None:
            found = await real(client, key, upload_id)
            return {number: part for number, part in (found or {}).items() if number != 3}

        monkeypatch.setattr(S3Client, "list_parts", forgets)
        assert (await it.run(toml, RESUME)).state == "identical"
        assert it.stored & it.sent() == {3}
        assert it.left() == []


async def test_codec_that_gives_other_bytes_sends_everything_again(
    seaweedfs: S3Server, case: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.encode.codecs import Codec

    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()
        await it.fail(toml)
        monkeypatch.setattr(Codec, "identity", lambda self: "of a later version")
        assert (await it.run(toml, RESUME)).state == "identical"
        assert "gives other bytes" in it.fallbacks()[0]
        assert it.stored <= it.sent()
        assert it.left() == []


async def test_export_that_is_running_is_not_begun_twice(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()
        running = RecordLog.open(journal_path(load_config(toml, CATALOG)))
        for attempt in (NEW, RESUME, DISCARD):
            with pytest.raises(PlanError, match="running already"):
                await it.run(toml, attempt)
        running.remove()


async def test_journal_on_the_exported_disk_is_refused(
    seaweedfs: S3Server, case: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.config.continuing.lies_on_disk", lambda folder, disk: True)
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        with pytest.raises(PlanError, match="journal would lie on the disk"):
            await it.run(it.toml(), NEW)
        assert (await it.run(it.toml(more='journal = "off"'), NEW)).state == "identical"


async def test_journal_goes_where_the_file_says(seaweedfs: S3Server, case: Make, tmp_path: Path) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml(more=f'journal = "{tmp_path}/deep/x.log"')
        await it.fail(toml)
        assert sorted(one.name for one in (tmp_path / "deep").iterdir()) == ["x.log", "x.log.leaves"]
        assert (await it.run(toml, RESUME)).state == "identical"
        assert list((tmp_path / "deep").iterdir()) == []


async def test_cancelled_run_is_kept(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()
        with anyio.CancelScope() as scope:

            class Stops(list[Event]):
                def append(self, event: Event) -> None:
                    super().append(event)
                    if isinstance(event, PartStored) and event.number == 4:
                        scope.cancel()

            await export(toml, attempt=NEW, events=(events := Stops()))
        assert scope.cancelled_caught
        assert any(isinstance(event, UploadKept) for event in events)
        proxy.seen.clear()
        assert (await it.run(toml, RESUME)).state == "identical"
        assert not {event.number for event in events if isinstance(event, PartStored)} & it.sent()
        assert it.left() == []


@pytest.mark.parametrize("encoder", ["encode.raw", "encode.qcow2"])
async def test_file_that_was_being_written_is_gone_on_with(tmp_path: Path, encoder: str) -> None:
    disk = write_large_letters(tmp_path / "disk.raw")
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.disk; path = "{disk}"; block_size = "2 MiB"',
        "checksum.guest",
        "sparse.zeros",
        encoder,
        f'write.file; path = "{tmp_path}/out/image"',
        "verify.readback",
    )
    (tmp_path / "out").mkdir()
    whole = await export(toml)
    expected = (tmp_path / "out" / "image").read_bytes()
    for one in (tmp_path / "out").iterdir():
        one.unlink()
    events: list[Event] = []
    with anyio.CancelScope() as scope:
        real = resume.RunJournal.note_mark

        def mark(journal: resume.RunJournal, position: int) -> None:
            real(journal, position)
            if position > 8 * MiB:
                scope.cancel()

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(resume.RunJournal, "note_mark", mark)
            await export(toml, attempt=NEW)
    assert scope.cancelled_caught
    assert [one.suffix for one in (tmp_path / "out").iterdir()] == [".partial"]
    outcome = await export(toml, attempt=RESUME, events=events)
    assert outcome.state == "identical"
    assert outcome.image_size == whole.image_size
    [resumed] = [event for event in events if isinstance(event, RunResumed)]
    assert resumed.guest_bytes > 0
    assert (tmp_path / "out" / "image").read_bytes() == expected
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["image", "image.manifest.json"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["refuse", "blackhole"])
async def test_network_that_was_cut_for_long_is_no_loss(
    seaweedfs: S3Server, case: Make, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.flow.retry import RetryPolicy
    from stages.store.http import Timeouts
    from stages.write.s3 import S3Writer

    real = S3Writer.__init__

    def hasty(writer: S3Writer, *given: object, **named: object) -> None:
        timeouts = Timeouts(connect_s=1, progress_s=2)
        real(writer, *given, timeouts=timeouts, retry_policy=RetryPolicy(attempts=2, deadline_s=3))  # type: ignore[arg-type]

    monkeypatch.setattr(S3Writer, "__init__", hasty)
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml()

        class Cuts(list[Event]):
            def append(self, event: Event) -> None:
                super().append(event)
                if isinstance(event, PartStored) and event.number == 4:
                    proxy.cut(how)  # type: ignore[arg-type]  # one of the two

        with pytest.raises(KeptError):
            await export(toml, attempt=NEW, events=(events := Cuts()))
        proxy.mend()
        proxy.seen.clear()
        assert (await it.run(toml, RESUME)).state == "identical"
        assert not {event.number for event in events if isinstance(event, PartStored)} & it.sent()
        assert it.left() == []


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_server_that_was_killed_and_started_again_is_no_loss(
    own_store: StoreProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = own_store.server
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    async with FaultProxy(server.port) as proxy:
        it = Case(tmp_path, server, proxy)
        toml = it.toml(write="; attempts = 2")

        class Kills(list[Event]):
            def append(self, event: Event) -> None:
                super().append(event)
                if isinstance(event, PartStored) and event.number == 4:
                    own_store.kill()

        with pytest.raises(KeptError):
            await export(toml, attempt=NEW, events=(events := Kills()))
        own_store.restart()
        proxy.seen.clear()
        assert (await it.run(toml, RESUME)).state == "identical"
        assert not {event.number for event in events if isinstance(event, PartStored)} & it.sent()
        assert it.left() == []


async def test_command_that_is_interrupted_says_how_to_go_on(seaweedfs: S3Server, case: Make) -> None:
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        toml = it.toml("encode.raw", write="; attempts = 2")
        proxy.set_rules(Rule(error_reply(503, "SlowDown"), method="PUT", query="partNumber=5&"))
        command = [sys.executable, "-m", "tests.end_to_end.killed_run", "0", "run", str(toml), "--quiet"]
        async with await anyio.open_process(command, cwd=Path(__file__).parents[2]) as process:
            await proxy.until(lambda: any(seen.status == 503 for seen in proxy.requests(query="partNumber=5&")))
            await proxy.until(lambda: any(seen.status == 200 for seen in proxy.requests(query="partNumber=2&")))
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            said = b""
            async for chunk in process.stderr:
                said += chunk
            assert await process.wait() == 130
        assert f"Resume it with: pipeline run {toml} --quiet --resume" not in said.decode()
        assert f"Resume it with: pipeline run {toml} --resume" in said.decode()
        assert "Remove it with: aws s3api abort-multipart-upload" in said.decode()
        proxy.set_rules()
        assert (await it.run(toml, RESUME)).state == "identical"
        assert it.left() == []


async def test_machine_without_a_place_for_journals_exports_all_the_same(
    seaweedfs: S3Server, case: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    async with FaultProxy(seaweedfs.port) as proxy:
        it = case(proxy)
        assert (await it.run(it.toml(), NEW)).state == "identical"
        assert it.fallbacks()[0].startswith(f"no journal at {tmp_path}/file/disk-pipeline/test.journal")
        with pytest.raises(PlanError, match="journal can't be written"):
            await it.run(it.toml(), RESUME)
        with pytest.raises(PlanError, match="journal can't be written"):
            await it.run(it.toml(more=f'journal = "{tmp_path}/file/x.journal"'), NEW)
