"""write.s3 against real stores: what it stores, how it plans, and that nothing is left whatever happens."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from pipeline.errors import LeftBehindError, PlanError, StageError, StoreError
from pipeline.events import (
    Event,
    FallbackTaken,
    PartReplayed,
    PartStored,
    RetryScheduled,
    SendRateLowered,
    UploadRemoved,
)
from pipeline.flow.items import Receipt, StoredImage
from pipeline.flow.orders import Order
from pipeline.flow.retry import RetryPolicy
from pipeline.flow.stage import Clock, RealClock, SinkPlan, SinkRequest
from pipeline.units import KiB, MiB
from stages.store.http import Timeouts
from stages.write.s3 import Options, S3Writer
from tests.stores.faults import (
    AboveRate,
    FlipRequest,
    LoseReply,
    Nth,
    ResetRequest,
    Rule,
    Stall,
    StallRequest,
    error_reply,
    slow_down,
)
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import S3Server, StoreProcess
from tests.write.images import Collected, Image, ImageReplay, QuickClock, make_context, mixed

KEY = "images/web 01+ä.qcow2"
HEAD = 5 * MiB
ROOMY = 64 * MiB
TIGHT = 12 * MiB  # parts of 8 MiB are streamed


@pytest.fixture(autouse=True)
def _no_aws_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what a test sets is in the AWS chain."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@dataclass
class Bench:
    """A bucket of a store, and what a run against it needs."""

    server: S3Server
    monkeypatch: pytest.MonkeyPatch
    bucket: str = ""
    endpoint: str = ""
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bucket = self.bucket or self.server.new_bucket()
        self.endpoint = self.endpoint or self.server.endpoint
        for name, value in self.server.environment().items():
            self.monkeypatch.setenv(name, value)

    @property
    def url(self) -> str:
        """Of the image."""
        return f"s3://{self.bucket}/{KEY}"

    @property
    def memory(self) -> int:
        """Parts are kept with one store and streamed with the other, so that each fault meets both."""
        return ROOMY if self.server.name == "swift" else TIGHT

    def options(self, **changes: object) -> Options:
        """Of a writer to this store."""
        given: dict[str, object] = {"url": self.url, "endpoint": self.endpoint, "region": self.server.region}
        return Options(**{**given, **changes})  # type: ignore[arg-type]  # the types are those of Options' fields

    @asynccontextmanager
    async def planned(
        self,
        image: Image,
        *,
        memory: int = ROOMY,
        longest: int | None = None,
        timeouts: Timeouts | None = None,
        disk_size: int | None = None,
        replay: ImageReplay | None = None,
        clock: Clock | None = None,
        **options: object,
    ) -> AsyncIterator[tuple[S3Writer, SinkPlan]]:
        """A writer after its planning; closed at the end."""
        again = replay or ImageReplay(image.data)
        context = make_context(image, events=self.events, clock=QuickClock(), disk_size=disk_size, replay=again)
        writer = S3Writer(
            self.options(**options),
            replace(context, name="write.s3", clock=clock or context.clock),
            timeouts=timeouts,
            retry_policy=RetryPolicy(),
        )
        layout = image.layout(image_bytes_max=longest or image.size)
        order = Order.HEAD_LAST if image.head_length else Order.SEQUENTIAL
        try:
            plan = await writer.plan(SinkRequest(layout=layout, order=order, memory=memory))
            again.boundaries = plan.boundaries
            yield writer, plan
        finally:
            with anyio.CancelScope(shield=True):
                await writer.close()

    async def store(self, image: Image, **more: object) -> StoredImage:
        """Plan, run, and close."""
        async with self.planned(image, **more) as (writer, _):  # type: ignore[arg-type]  # passed through
            outlet = Collected()
            await writer.run(image.pieces(), outlet)
            return outlet.images[0]

    def check_nothing_is_left(self) -> None:
        """Neither object nor upload, in the server's own words."""
        assert self.server.keys(self.bucket) == []
        assert self.server.open_uploads(self.bucket) == []

    def stored(self) -> bytes:
        """The object in the store."""
        return self.server.get(self.bucket, KEY)


@pytest.fixture
def bench(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """With each store in turn."""
    return Bench(s3_server, monkeypatch)


@pytest.fixture
def weed(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """With the store that is the faster one to test faults against."""
    return Bench(seaweedfs, monkeypatch)


@asynccontextmanager
async def through_proxy(bench: Bench, *rules: Rule) -> AsyncIterator[FaultProxy]:
    """Let the bench reach its server through a proxy with faults."""
    async with FaultProxy(bench.server.port, rules=rules) as proxy:
        bench.endpoint = proxy.url
        yield proxy


async def receipt_of(image: StoredImage) -> Receipt:
    """What the store says of it."""
    assert image.fetch_receipt is not None
    async with image.fetch_receipt() as receipt:
        return receipt


# ---- storing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image,memory,longest",
    [
        pytest.param(mixed(3 * MiB, head_length=64 * KiB), ROOMY, None, id="small, surely"),
        pytest.param(mixed(3 * MiB, head_length=HEAD), ROOMY, 100 * MiB, id="small, as it turns out"),
        pytest.param(mixed(30 * MiB + 99, head_length=HEAD), ROOMY, 200 * MiB, id="parts, head last"),
        pytest.param(mixed(30 * MiB + 99), ROOMY, None, id="parts in sequence, with zeros"),
        pytest.param(mixed(30 * MiB + 99, head_length=HEAD), TIGHT, None, id="streamed"),
        pytest.param(mixed(20 * MiB + 99), TIGHT, 200 * MiB, id="streamed, length guessed"),
    ],
)
async def test_the_stored_object_is_the_image_and_the_store_proves_it(
    bench: Bench, image: Image, memory: int, longest: int | None
) -> None:
    async with bench.planned(image, memory=memory, longest=longest) as (writer, _):
        outlet = Collected()
        await writer.run(image.pieces(), outlet)
        (stored,) = outlet.images
        assert bench.stored() == image.data
        assert (stored.uri, stored.size) == (bench.url, image.size)
        receipt = await receipt_of(stored)
        assert receipt.size == image.size
        assert receipt.proofs
        assert all(ours == theirs for _, ours, theirs in receipt.proofs)
        async with stored.open_reader() as reader:
            assert reader.size == image.size
            assert await reader.read(1000, 70_000) == image.data[1000:71_000]
        manifest_uri = await writer.publish(b"{}")
        assert manifest_uri == bench.url + ".manifest.json"
        assert bench.server.keys(bench.bucket) == [KEY, KEY + ".manifest.json"]
        assert bench.server.open_uploads(bench.bucket) == []
        await writer.withdraw()
        bench.check_nothing_is_left()


async def test_each_store_gets_the_best_checksum_that_it_knows(bench: Bench) -> None:
    image = mixed(20 * MiB)
    async with bench.planned(image) as (writer, _):
        outlet = Collected()
        async with FaultProxy(bench.server.port):
            await writer.run(image.pieces(), outlet)
        names = {name for name, _, _ in (await receipt_of(outlet.images[0])).proofs}
    assert names & {"CRC64NVME", "ETag (MD5)"}
    if bench.server.name == "seaweedfs":
        assert "CRC64NVME" in names


@pytest.mark.parametrize("checksum", ["crc64nvme", "crc32c", "md5"])
@pytest.mark.parametrize("size", [2 * MiB, 20 * MiB])
async def test_every_checksum_that_can_be_chosen_works(weed: Bench, checksum: str, size: int) -> None:
    image = mixed(size)
    async with through_proxy(weed) as proxy:
        await weed.store(image, checksum=checksum)
        header = {"crc64nvme": "x-amz-checksum-crc64nvme", "crc32c": "x-amz-checksum-crc32c", "md5": "content-md5"}
        puts = proxy.requests("PUT")
        assert puts
        assert all(seen.headers[header[checksum]] for seen in puts)
        assert all(seen.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD" for seen in puts)
    assert weed.stored() == image.data


async def test_over_tls_the_store_is_known_by_the_given_authority(
    seaweedfs_tls: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(seaweedfs_tls, monkeypatch)
    image = mixed(20 * MiB, head_length=HEAD)
    monkeypatch.delenv("AWS_CA_BUNDLE")
    with pytest.raises(StoreError, match="certificate"):
        await bench.store(image)
    await bench.store(image, ca_file=seaweedfs_tls.ca_file)
    assert bench.stored() == image.data


async def test_replacing_an_object_keeps_the_old_one_until_the_new_one_is_complete(weed: Bench) -> None:
    image = mixed(20 * MiB)
    weed.server.put(weed.bucket, KEY, b"the old one")
    seen = []

    async def pieces() -> AsyncIterator[object]:
        async for piece in image.pieces():
            yield piece
        seen.append(weed.stored())

    async with weed.planned(image, overwrite=True) as (writer, _):
        await writer.run(pieces(), Collected())  # type: ignore[arg-type]  # it gives pieces
    assert seen == [b"the old one"]
    assert weed.stored() == image.data


# ---- planning ------------------------------------------------------------------------------------------------------


async def test_planning_says_how_the_image_will_be_stored_and_sends_nothing(bench: Bench) -> None:
    image = mixed(20 * MiB, head_length=HEAD)
    async with through_proxy(bench) as proxy, bench.planned(image, longest=1000 * MiB) as (_, plan):
        assert {seen.method for seen in proxy.seen} <= {"GET", "HEAD"}
    said = dict(plan.summary)
    assert said["parts"] == "at most 126 of 8 MiB"
    assert said["sending"] == "7 in flight"
    assert "environment variables, key " in said["credentials"]
    assert plan.held_bytes <= ROOMY
    bench.check_nothing_is_left()


async def test_an_existing_target_is_refused_in_planning(bench: Bench) -> None:
    for key in (KEY, KEY + ".manifest.json"):
        bench.server.put(bench.bucket, key, b"somebody's")
        with pytest.raises(PlanError, match="the target exists") as caught:
            await bench.store(mixed(MiB))
        assert "overwrite = true" in caught.value.hint
        assert bench.server.get(bench.bucket, key) == b"somebody's"
        bench.server.client().delete_object(Bucket=bench.bucket, Key=key)


async def test_a_missing_bucket_is_refused_in_planning(bench: Bench) -> None:
    with pytest.raises(PlanError, match="NoSuchBucket") as caught:
        await bench.store(mixed(MiB), url="s3://no-such-bucket-here/a.raw")
    assert 'Create the bucket "no-such-bucket-here"' in caught.value.hint


async def test_wrong_credentials_are_refused_in_planning_with_their_source(bench: Bench) -> None:
    bench.monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PlanError, match=r"SignatureDoesNotMatch|AccessDenied") as caught:
        await bench.store(mixed(MiB))
    assert "environment variables" in caught.value.hint
    assert "wrong" not in str(caught.value) + caught.value.hint


async def test_missing_credentials_are_refused_in_planning_with_the_way_out(weed: Bench) -> None:
    weed.monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    weed.monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PlanError, match="no credentials") as caught:
        await weed.store(mixed(MiB))
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://bucket/folder/", "http://bucket/a", "bucket/a"])
async def test_a_url_without_an_object_is_refused(weed: Bench, url: str) -> None:
    with pytest.raises(PlanError, match="does not name an object"):
        await weed.store(mixed(MiB), url=url)


async def test_a_store_that_is_not_there_is_a_store_error_with_a_hint(weed: Bench) -> None:
    with pytest.raises(StoreError, match="can't connect") as caught:
        await weed.store(mixed(MiB), endpoint="http://127.0.0.1:9")
    assert '"endpoint"' in caught.value.hint
    assert [event.attempt for event in weed.events if isinstance(event, RetryScheduled)] == [2, 3, 4, 5, 6]


async def test_an_identity_that_may_not_write_leaves_nothing(weed: Bench) -> None:
    """It may read, so planning succeeds; the first write is refused."""
    limited = Bench(weed.server.as_limited(), weed.monkeypatch, bucket=weed.bucket)
    for size in (MiB, 20 * MiB):
        with pytest.raises(StoreError, match="AccessDenied"):
            await limited.store(mixed(size))
        weed.check_nothing_is_left()


# ---- failures ------------------------------------------------------------------------------------------------------

PART = "partNumber=2&"
OPEN = "^uploads"
SEAL = "^uploadId="


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(Rule(slow_down(), method="PUT", query="partNumber=", when=Nth(1)), id="503 before the body"),
        pytest.param(Rule(slow_down(when="body"), method="PUT", query="partNumber=", when=Nth(2)), id="503 after it"),
        pytest.param(Rule(error_reply(500, "InternalError"), query=PART, when=Nth(1)), id="500"),
        pytest.param(Rule(ResetRequest(after_bytes=3 * MiB), query=PART, when=Nth(1)), id="reset inside a part"),
        pytest.param(Rule(ResetRequest(after_bytes=0), query=PART, when=Nth(1)), id="reset before a part"),
        pytest.param(Rule(LoseReply(), query=PART, when=Nth(1)), id="lost reply of a part"),
        pytest.param(Rule(LoseReply(), method="POST", query=SEAL, when=Nth(1)), id="lost reply of Complete"),
        pytest.param(Rule(error_reply(503, "SlowDown"), method="POST", query=SEAL, when=Nth(1)), id="503 of Complete"),
        pytest.param(Rule(LoseReply(), method="POST", query=OPEN, when=Nth(1)), id="lost reply of Create"),
    ],
)
async def test_a_failure_for_a_moment_does_not_end_the_run(bench: Bench, rule: Rule) -> None:
    image, memory = mixed(14 * MiB, head_length=HEAD), bench.memory
    async with through_proxy(bench, rule) as proxy:
        stored = await bench.store(image, memory=memory)
        assert any(seen.fault is not None for seen in proxy.seen), "the fault was met"
    assert bench.stored() == image.data
    assert stored.size == image.size
    assert bench.server.open_uploads(bench.bucket) == [], "also not the one whose id nobody heard"
    told = [event for event in bench.events if isinstance(event, RetryScheduled)]
    assert len(told) == (0 if rule.fault == LoseReply() and rule.query == SEAL else 1)


async def test_a_streamed_part_is_made_again_from_its_checkpoint(bench: Bench) -> None:
    image = mixed(40 * MiB, head_length=HEAD, zeros=False)
    replay = ImageReplay(image.data)
    rule = Rule(ResetRequest(after_bytes=6 * MiB), query="partNumber=3&", when=Nth(1))
    async with through_proxy(bench, rule):
        await bench.store(image, memory=TIGHT, replay=replay)
    assert bench.stored() == image.data
    ((start, end),) = replay.asked
    assert start == HEAD + 8 * MiB
    assert MiB < end - start <= 8 * MiB
    attempts = {event.number: event.attempts for event in bench.events if isinstance(event, PartStored)}
    assert attempts == {1: 1, 2: 1, 3: 2, 4: 1, 5: 1, 6: 1}
    assert [event.number for event in bench.events if isinstance(event, PartReplayed)] == [3]


@pytest.mark.parametrize(
    "rule",
    [
        Rule(LoseReply(), method="PUT", when=Nth(1)),
        Rule(error_reply(500, "InternalError"), method="PUT", when=Nth(1)),
        Rule(ResetRequest(after_bytes=MiB), method="PUT", when=Nth(1)),
    ],
)
async def test_a_small_image_survives_a_lost_answer(bench: Bench, rule: Rule) -> None:
    """Its own object is there when it tries again, and is not taken for somebody else's."""
    image = mixed(3 * MiB)
    async with through_proxy(bench, rule):
        await bench.store(image)
    assert bench.stored() == image.data


@pytest.mark.parametrize(
    "rule,message",
    [
        pytest.param(
            Rule(error_reply(403, "AccessDenied"), method="PUT", query=PART), "AccessDenied", id="refused mid-upload"
        ),
        pytest.param(
            Rule(error_reply(400, "BadDigest"), method="PUT", query=PART),
            "BadDigest",
            id="checksum rejected by a reply",
        ),
        pytest.param(Rule(slow_down(), method="PUT", query=PART), "SlowDown", id="always busy"),
        pytest.param(Rule(ResetRequest(after_bytes=MiB), query=PART), "connection was lost", id="always reset"),
        pytest.param(Rule(error_reply(403, "AccessDenied"), method="POST"), "AccessDenied", id="may not open"),
        pytest.param(
            Rule(error_reply(403, "AccessDenied"), method="POST", query=SEAL), "AccessDenied", id="may not complete"
        ),
    ],
)
async def test_a_failure_for_good_leaves_nothing(bench: Bench, rule: Rule, message: str) -> None:
    image, memory = mixed(14 * MiB, head_length=HEAD), bench.memory
    async with through_proxy(bench, rule) as proxy:
        with pytest.raises(StoreError, match=message):
            await bench.store(image, memory=memory)
        if isinstance(rule.fault, type(error_reply(400, ""))) and rule.fault.status in (400, 403):
            assert sum(seen.fault is not None for seen in proxy.seen) == 1, "not tried again"
    bench.check_nothing_is_left()


async def test_a_busy_store_slows_the_run_down_and_never_ends_it(bench: Bench) -> None:
    """It refuses parts above a rate that is far below ours, for the whole run and not for a moment."""
    image = mixed(128 * MiB, zeros=False)
    rule = Rule(slow_down(when="head"), method="PUT", query="partNumber=", when=AboveRate(4.0))
    async with through_proxy(bench, rule) as proxy:
        async with bench.planned(image, clock=RealClock()) as (writer, _):
            await writer.run(image.pieces(), Collected())
        parts = [seen.fault is not None for seen in proxy.requests("PUT", query="partNumber=")]
    assert bench.stored() == image.data
    assert [event.stage for event in bench.events if isinstance(event, SendRateLowered)]
    # Unpaced nearly all would be refused. A busy machine makes the pace uneven: asked is that most get through.
    assert sum(parts[-14:]) <= 7, "it has found the store's pace"


async def test_bytes_go_out_at_the_limit(weed: Bench) -> None:
    image = mixed(20 * MiB, zeros=False)
    clock = QuickClock()
    begun = clock.now()
    async with weed.planned(image, clock=clock, rate_limit=2 * MiB) as (writer, _):
        await writer.run(image.pieces(), Collected())
    assert clock.now() - begun == pytest.approx(10, abs=0.5)
    assert weed.stored() == image.data


async def test_damage_on_the_way_is_noticed_and_nothing_is_left(bench: Bench) -> None:
    """A byte of a part changes between us and the store, which refuses it, or else shows it in its answer."""
    image = mixed(20 * MiB, zeros=False)
    for memory in (ROOMY, TIGHT):
        async with through_proxy(bench, Rule(FlipRequest(offset=1_234_567), query=PART)):
            with pytest.raises(StoreError, match=r"BadDigest|other bytes|InvalidDigest|Checksum"):
                await bench.store(image, memory=memory)
        bench.check_nothing_is_left()


async def test_damage_of_a_small_image_is_noticed_and_nothing_is_left(bench: Bench) -> None:
    async with through_proxy(bench, Rule(FlipRequest(offset=1_234_567), method="PUT")):
        with pytest.raises(StoreError, match=r"BadDigest|other bytes|InvalidDigest|Checksum"):
            await bench.store(mixed(3 * MiB))
    bench.check_nothing_is_left()


@pytest.mark.parametrize(
    "fault,memory",
    [
        (Stall(at="head"), ROOMY),
        (Stall(at="reply"), ROOMY),
        (StallRequest(after_bytes=MiB), ROOMY),
        (StallRequest(after_bytes=MiB), TIGHT),
    ],
)
async def test_a_server_that_stands_still_is_given_up_and_tried_again(
    weed: Bench, fault: Stall | StallRequest, memory: int
) -> None:
    image = mixed(40 * MiB, zeros=False)
    timeouts = Timeouts(connect_s=5, progress_s=1.5)
    async with through_proxy(weed, Rule(fault, query="partNumber=2&", when=Nth(1))):
        with anyio.fail_after(20):
            await weed.store(image, timeouts=timeouts, memory=memory)
    assert weed.stored() == image.data
    reasons = [event.reason for event in weed.events if isinstance(event, RetryScheduled)]
    assert reasons
    assert all("1.5 s" in reason for reason in reasons)
    assert max(event.attempts for event in weed.events if isinstance(event, PartStored)) >= 2


async def test_a_target_that_appears_meanwhile_is_left_alone(bench: Bench) -> None:
    for size in (3 * MiB, 20 * MiB):
        image = mixed(size)

        async def pieces(image: Image = image) -> AsyncIterator[object]:
            async for piece in image.pieces():
                yield piece
            bench.server.put(bench.bucket, KEY, b"somebody's")

        async with bench.planned(image) as (writer, _):
            with pytest.raises(StoreError, match="appeared while the image was written"):
                await writer.run(pieces(), Collected())  # type: ignore[arg-type]  # it gives pieces
        assert bench.stored() == b"somebody's"
        assert bench.server.open_uploads(bench.bucket) == []
        bench.server.client().delete_object(Bucket=bench.bucket, Key=KEY)


async def test_withdrawing_never_deletes_what_somebody_else_put_there(bench: Bench) -> None:
    image = mixed(20 * MiB)
    async with bench.planned(image) as (writer, _):
        await writer.run(image.pieces(), Collected())
        bench.server.put(bench.bucket, KEY, b"somebody's")
        await writer.withdraw()
    assert bench.stored() == b"somebody's"


async def test_a_short_disk_is_never_committed(bench: Bench) -> None:
    image = mixed(20 * MiB, head_length=HEAD)
    with pytest.raises(StageError, match=f"{image.guest_bytes} of {image.guest_bytes + 512} guest bytes"):
        await bench.store(image, disk_size=image.guest_bytes + 512)
    bench.check_nothing_is_left()


async def test_a_failed_clean_up_names_the_exact_command(weed: Bench) -> None:
    image = mixed(20 * MiB)
    rules = (Rule(error_reply(403, "AccessDenied"), query=PART), Rule(error_reply(403, "NoAbort"), method="DELETE"))
    async with through_proxy(weed, *rules) as proxy:
        with pytest.raises(LeftBehindError) as caught:
            await weed.store(image)
        ((key, upload_id),) = weed.server.open_uploads(weed.bucket)
        assert key == KEY
        assert caught.value.commands == (
            f"aws s3api abort-multipart-upload --bucket {weed.bucket} --key '{KEY}' --upload-id {upload_id} "
            f"--endpoint-url {proxy.url}",
            f"pipeline uploads abort '{weed.url}' --upload-id {upload_id} --endpoint {proxy.url}",
        )
        assert isinstance(caught.value.cause, StoreError)


async def test_a_failed_withdrawal_names_the_exact_command(weed: Bench) -> None:
    image = mixed(MiB)
    async with through_proxy(weed, Rule(error_reply(403, "NoDelete"), method="DELETE")) as proxy:
        async with weed.planned(image) as (writer, _):
            await writer.run(image.pieces(), Collected())
            with pytest.raises(LeftBehindError) as caught:
                await writer.withdraw()
        assert caught.value.commands == (
            f"aws s3api delete-object --bucket {weed.bucket} --key '{KEY}' --endpoint-url {proxy.url}",
        )


async def test_a_killed_server_ends_the_run_and_says_what_may_be_left(
    own_store: StoreProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(own_store.server, monkeypatch)
    image = mixed(40 * MiB)

    async def pieces() -> AsyncIterator[object]:
        count = 0
        async for piece in image.pieces():
            yield piece
            count += 1
            if piece.end > 25 * MiB and own_store.is_running():
                await anyio.to_thread.run_sync(own_store.kill)

    async with bench.planned(image) as (writer, _):
        with pytest.raises(LeftBehindError, match=r"can't connect|connection was lost") as caught:
            await writer.run(pieces(), Collected())  # type: ignore[arg-type]  # it gives pieces
    await anyio.to_thread.run_sync(own_store.restart)
    ((_, upload_id),) = bench.server.open_uploads(bench.bucket)
    assert f"--upload-id {upload_id}" in caught.value.commands[0]


async def test_a_server_that_is_killed_and_comes_back_loses_nothing(
    own_seaweedfs: StoreProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(own_seaweedfs.server, monkeypatch)
    image = mixed(40 * MiB)
    restarted = False

    async def pieces() -> AsyncIterator[object]:
        nonlocal restarted
        async for piece in image.pieces():
            yield piece
            if piece.end > 20 * MiB and not restarted:
                restarted = True
                await anyio.to_thread.run_sync(own_seaweedfs.restart)

    async with bench.planned(image, parts_in_flight=1) as (writer, _):
        await writer.run(pieces(), Collected())  # type: ignore[arg-type]  # it gives pieces
    assert bench.stored() == image.data


# ---- cancellation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Stall(at="head"), Stall(at="reply")])
@pytest.mark.parametrize("image", [mixed(MiB), mixed(20 * MiB, head_length=HEAD)], ids=["small", "parts"])
async def test_cancelled_at_any_request_nothing_is_left(
    weed: Bench, image: Image, fault: Stall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancel while the n-th request is under way, before or after the store did it, for every n."""
    monkeypatch.setattr("stages.write.s3_upload.GRACE_S", 0.2)
    for number in range(1, 40):
        async with through_proxy(weed) as proxy:
            if not await run_cancelled_at(weed, image, proxy, Rule(fault, when=Nth(number))):
                break
        weed.check_nothing_is_left()
    else:
        raise AssertionError("it never succeeded")
    assert weed.stored() == image.data
    assert number > 2
    assert any(isinstance(event, UploadRemoved) for event in weed.events)


async def run_cancelled_at(bench: Bench, image: Image, proxy: FaultProxy, rule: Rule) -> bool:
    """Plan undisturbed, then run and cancel when the rule's request is met; False where it never was."""
    ended = anyio.Event()
    scope = anyio.CancelScope()

    async def run(writer: S3Writer) -> None:
        with scope:
            await writer.run(image.pieces(), Collected())
        ended.set()

    async with bench.planned(image, parts_in_flight=2) as (writer, _):
        proxy.set_rules(rule)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run, writer)
                tasks.start_soon(cancel_when_stalled, proxy, scope)
                await ended.wait()
                tasks.cancel_scope.cancel()
    return scope.cancelled_caught


async def cancel_when_stalled(proxy: FaultProxy, scope: anyio.CancelScope) -> None:
    """Wait for the fault."""
    await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
    scope.cancel()


async def test_an_upload_of_somebody_else_to_the_same_key_is_never_aborted(weed: Bench) -> None:
    client = weed.server.client()
    theirs = client.create_multipart_upload(Bucket=weed.bucket, Key=KEY)["UploadId"]
    async with through_proxy(weed, Rule(LoseReply(), method="POST", query=OPEN, when=Nth(1))):
        await weed.store(mixed(20 * MiB))
    assert weed.server.open_uploads(weed.bucket) == [(KEY, theirs)]


async def test_a_store_without_crc64nvme_or_conditions_is_served_with_less(weed: Bench) -> None:
    """As old stores do: 501 for headers that they do not know."""
    image = mixed(20 * MiB)
    rules = (
        Rule(error_reply(501, "NotImplemented"), method="POST", query=OPEN, when=Nth(1)),
        Rule(error_reply(501, "NotImplemented"), method="POST", query=SEAL, when=Nth(1)),
    )
    async with through_proxy(weed, *rules) as proxy:
        await weed.store(image)
        parts = proxy.requests("PUT", query="partNumber=")
        assert all("content-md5" in seen.headers for seen in parts)
        last = proxy.requests("POST", query=SEAL)[-1]
        assert "if-none-match" not in last.headers
    assert weed.stored() == image.data
    assert len([event for event in weed.events if isinstance(event, FallbackTaken)]) == 2


def test_the_key_in_the_tests_is_not_an_easy_one() -> None:
    """It needs quoting in paths and on command lines, and its quoting is signed."""
    assert hashlib.md5(KEY.encode()).hexdigest()
    assert not KEY.isascii()
    assert " " in KEY
    assert "+" in KEY
