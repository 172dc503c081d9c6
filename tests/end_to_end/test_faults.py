"""A bad network and a bad store in the middle of an export: what can be mended is, the rest is cleaned up and told."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import anyio
import pytest

from pipeline.units import MiB
from tests.end_to_end.command import IMPATIENT, PROGRAM, Said, environment, run, running
from tests.end_to_end.places import Place, new_place
from tests.stores.faults import (
    Chance,
    Every,
    Fault,
    First,
    FlipReply,
    FlipRequest,
    LoseReply,
    Nth,
    ResetReply,
    ResetRequest,
    Rule,
    Stall,
    StallRequest,
    TruncateReply,
    error_reply,
    slow_down,
)
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import StoreProcess

When = Every | Nth | First | Chance
ALWAYS = Every()


def on_open(fault: Fault, when: When = ALWAYS) -> Rule:
    """Strike the request that opens the upload."""
    return Rule(fault, method="POST", query="^uploads", when=when)


def on_part_3(fault: Fault, when: When = ALWAYS) -> Rule:
    """Strike the second part behind the head."""
    return Rule(fault, method="PUT", query="partNumber=3&", when=when)


def on_complete(fault: Fault, when: When = ALWAYS) -> Rule:
    """Strike the request that makes the object visible."""
    return Rule(fault, method="POST", query="^uploadId=", when=when)


def on_manifest(fault: Fault, when: When = ALWAYS) -> Rule:
    """Strike the request that stores the manifest."""
    return Rule(fault, method="PUT", path="manifest", when=when)


BOTH = ["disk.image", "disk.image.manifest.json"]

MENDED = {
    "503 on some parts": Rule(slow_down(), method="PUT", query="partNumber=", when=Chance(0.3, seed=4)),
    "500 on a part": on_part_3(error_reply(500, "InternalError"), First(2)),
    "part reset": on_part_3(ResetRequest(after_bytes=MiB), Nth(1)),
    "reply to a part lost": on_part_3(LoseReply(), Nth(1)),
    "reply to open lost": on_open(LoseReply(), Nth(1)),
    "reply to complete lost": on_complete(LoseReply(), Nth(1)),
    "complete reset": on_complete(ResetRequest(after_bytes=0), Nth(1)),
    "reply to the manifest lost": on_manifest(LoseReply(), Nth(1)),
    "readback reset": Rule(ResetReply(after_bytes=1000), method="GET", path="disk.image$", when=Nth(2)),
    "readback cut short": Rule(TruncateReply(after_bytes=1000), method="GET", path="disk.image$", when=Nth(2)),
}

FATAL: dict[str, tuple[Rule, str, tuple[str, ...]]] = {
    "refused in mid-upload": (on_part_3(error_reply(403, "AccessDenied")), "put_part", ("AccessDenied",)),
    "upload vanished": (on_part_3(error_reply(404, "NoSuchUpload")), "put_part", ("NoSuchUpload",)),
    "refused at the end": (on_complete(error_reply(403, "AccessDenied")), "seal", ("AccessDenied",)),
    "reset for ever": (on_part_3(ResetRequest(after_bytes=MiB)), "put_part", ("the connection was lost",)),
    "503 for ever": (on_part_3(slow_down()), "put_part", ("SlowDown", "reduce your request rate")),
    "checksum rejected": (
        on_part_3(FlipRequest(offset=MiB)),
        "put_part",
        ("What arrived is not what was sent: suspect memory or network of this machine",),
    ),
    "manifest refused": (on_manifest(error_reply(403, "AccessDenied")), "put_manifest", ("AccessDenied",)),
}


async def is_mended(place: Place, name: str) -> None:
    async with FaultProxy(place.server.port, rules=[MENDED[name]]) as proxy:
        said = await run("run", place.toml(), "--json", env=place.through(proxy.url))
        assert [seen for seen in proxy.seen if seen.fault], "the fault never struck"
    assert said.code == 0, said.err
    assert said.has()
    assert said.last("run_finished")["verified"] == "identical"
    assert place.server.keys(place.bucket) == BOTH
    assert place.server.open_uploads(place.bucket) == []


@pytest.mark.parametrize("name", [name for name in MENDED if "lost" in name])
async def test_lost_reply_is_no_failure_whatever_the_store(place: Place, name: str) -> None:
    await is_mended(place, name)


@pytest.mark.parametrize("name", [name for name in MENDED if "lost" not in name])
async def test_temporary_fault_is_mended_by_trying_again(one_place: Place, name: str) -> None:
    await is_mended(one_place, name)


async def is_fatal(place: Place, name: str) -> None:
    rule, operation, words = FATAL[name]
    toml = place.toml(options="attempts = 3")
    async with FaultProxy(place.server.port, rules=[rule]) as proxy:
        # A store that is busy for ever is given up after a time, which is short here.
        said = await run("run", toml, env=place.through(proxy.url), program=IMPATIENT)
        times = len([seen for seen in proxy.seen if seen.fault])
    assert said.code == 1, said.err
    assert said.has(f"error: {operation}: ", *words)
    if "for ever" in name:
        assert times > 1, "a busy store is asked again"
    elif name == "checksum rejected":
        # A store may close the connection so soon that its answer is lost, and lost connections are tried again.
        assert times <= 3, "no more than the attempts"
    else:
        assert times == 1, "permanent errors are not tried again"
    assert place.nothing_is_left()


@pytest.mark.parametrize("name", ["checksum rejected", "refused at the end"])
async def test_fault_that_stores_tell_differently_ends_the_run_and_leaves_nothing(place: Place, name: str) -> None:
    await is_fatal(place, name)


@pytest.mark.parametrize("name", [name for name in FATAL if name not in ("checksum rejected", "refused at the end")])
async def test_permanent_fault_ends_the_run_and_leaves_nothing(one_place: Place, name: str) -> None:
    await is_fatal(one_place, name)


async def test_checksum_that_is_wrong_once_is_not_tried_again(one_place: Place) -> None:
    """Memory that flips bits is no reason to go on."""
    rule = on_part_3(FlipRequest(offset=MiB), Nth(1))
    async with FaultProxy(one_place.server.port, rules=[rule]) as proxy:
        said = await run("run", one_place.toml(), env=one_place.through(proxy.url))
    assert said.code == 1
    assert one_place.nothing_is_left()


@pytest.mark.parametrize("fault", [Stall(at="head"), Stall(at="reply"), StallRequest(after_bytes=MiB)], ids=str)
async def test_request_that_stalls_once_is_sent_again(one_place: Place, fault: Fault) -> None:
    async with FaultProxy(one_place.server.port, rules=[on_part_3(fault, Nth(1))]) as proxy:
        said = await run("run", one_place.toml(), "--json", env=one_place.through(proxy.url), program=IMPATIENT)
        proxy.release()
    assert said.code == 0, said.err
    assert said.last("retry_scheduled")["operation"] == "put_part"
    assert one_place.server.keys(one_place.bucket) == BOTH
    assert one_place.server.open_uploads(one_place.bucket) == []


async def test_part_that_stalls_for_ever_ends_the_run(one_place: Place) -> None:
    async with FaultProxy(one_place.server.port, rules=[on_part_3(Stall())]) as proxy:
        said = await run("run", one_place.toml(), env=one_place.through(proxy.url), program=IMPATIENT)
        proxy.release()
    assert said.code == 1
    assert said.has("put_part: the store stopped taking data for 1.0 s")
    assert one_place.nothing_is_left()


# -- what is left, and the command that removes it ---------------------------------------------------------------------


async def clean_up_as_told(place: Place, said: Said) -> None:
    """Run the commands that the last words name, and see that they do what they say."""
    [line] = [line for line in said.err.splitlines() if "Remove it with: " in line]
    told = line.partition("Remove it with: ")[2].split(" ; ")
    commands = " && ".join(command for command in told if command.startswith("aws s3api "))
    assert commands
    if shutil.which("aws") is None:
        pytest.skip("the AWS command line is not installed, so what was told can't be tried")
    env = {**environment(place.env), "HOME": os.environ.get("HOME", "/")}
    done = await anyio.run_process(commands, env=env, check=False)
    assert done.returncode == 0, done.stderr.decode()
    await anyio.to_thread.run_sync(place.nothing_is_left)


async def test_upload_that_cannot_be_aborted_is_told_with_the_command_that_does_it(place: Place) -> None:
    rules = [on_part_3(error_reply(403, "AccessDenied")), Rule(error_reply(403, "AccessDenied"), method="DELETE")]
    async with FaultProxy(place.server.port, rules=rules) as proxy:
        said = await run("run", place.toml(), env=place.through(proxy.url))
        assert said.code == 4, said.err
        assert said.has("removing what was stored failed", "after: put_part: AccessDenied", proxy.url)
        proxy.set_rules()
        await clean_up_as_told(place, said)


async def test_image_that_cannot_be_withdrawn_is_told_with_the_command_that_does_it(place: Place) -> None:
    rules = [
        Rule(FlipReply(offset=MiB), method="GET", path="disk.image$"),
        Rule(error_reply(403, "AccessDenied"), method="DELETE"),
    ]
    async with FaultProxy(place.server.port, rules=rules) as proxy:
        said = await run("run", place.toml("encode.raw"), env=place.through(proxy.url))
        assert said.code == 4, said.err
        assert said.has("could not be removed", "after: verify.readback: the stored image is not the disk")
        proxy.set_rules()
        await clean_up_as_told(place, said)


async def test_store_that_is_silent_from_the_readback_on_is_told_with_the_command(one_place: Place) -> None:
    rules = [Rule(Stall(), method="GET", path="disk.image$"), Rule(Stall(), method="DELETE")]
    async with FaultProxy(one_place.server.port, rules=rules) as proxy:
        said = await run("run", one_place.toml(), env=one_place.through(proxy.url), program=IMPATIENT)
        assert said.code == 4, said.err
        assert said.has("the image could not be removed", "after: read: no answer for 1.0 s", "aws s3api delete-object")
        proxy.set_rules()
        proxy.release()
        await clean_up_as_told(one_place, said)


async def killed_in_mid_upload(
    store: StoreProcess, folder: Path, disk: Path, program: tuple[str, ...]
) -> tuple[Place, Said]:
    """An export whose store is killed when the third part is on its way."""
    place = new_place(store.server, folder, disk)
    async with FaultProxy(store.server.port, rules=[on_part_3(Stall())]) as proxy:
        endpoint = f'endpoint = "{proxy.url}"'
        async with running("run", place.toml(options=endpoint), env=place.env, program=program) as (_, end):
            async with anyio.create_task_group() as tasks:

                async def kill() -> None:
                    await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
                    await anyio.to_thread.run_sync(store.kill)
                    proxy.release()

                tasks.start_soon(kill)
                said: Said = await end()
                tasks.cancel_scope.cancel()
    return place, said


async def test_killed_store_ends_the_run_with_the_command_for_when_it_is_back(
    own_store: StoreProcess, tmp_path: Path, letters: Path
) -> None:
    place, said = await killed_in_mid_upload(own_store, tmp_path, letters, IMPATIENT)
    assert said.code == 4, said.err
    assert said.has("removing what was stored failed", "aws s3api abort-multipart-upload", place.bucket)
    assert said.last("run_failed")["exit_code"] == 4
    await anyio.to_thread.run_sync(own_store.restart)
    # The address in the command is the proxy's, which is gone with the test; the user's would be there.
    told = Said(said.code, said.out, said.err.replace(_endpoint(said), own_store.server.endpoint))
    await clean_up_as_told(place, told)


def _endpoint(said: Said) -> str:
    return said.err.partition("--endpoint-url ")[2].split()[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_killed_store_ends_the_run_within_two_minutes(
    own_seaweedfs: StoreProcess, tmp_path: Path, letters: Path
) -> None:
    begun = anyio.current_time()
    _, said = await killed_in_mid_upload(own_seaweedfs, tmp_path, letters, PROGRAM)
    assert said.code == 4
    assert anyio.current_time() - begun < 120


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_store_that_is_silent_from_the_middle_on_ends_the_run_within_two_minutes(one_place: Place) -> None:
    begun = anyio.current_time()
    rules = [on_part_3(Stall()), Rule(Stall(), method="DELETE")]
    async with FaultProxy(one_place.server.port, rules=rules) as proxy:
        with anyio.fail_after(125):
            async with running("run", one_place.toml(), env=one_place.through(proxy.url)) as (program, _):
                await program.process.wait()
        assert program.process.returncode == 4
        proxy.release()
    assert anyio.current_time() - begun < 120


# -- verification, and objects of somebody else ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoder, when", [("encode.raw", Every()), ("encode.raw", Nth(3)), ("encode.qcow2", Every())], ids=str
)
async def test_flipped_byte_is_found_and_the_image_withdrawn(one_place: Place, encoder: str, when: Every | Nth) -> None:
    rule = Rule(FlipReply(offset=4096 * 3 + 100), method="GET", path="disk.image$", when=when)
    async with FaultProxy(one_place.server.port, rules=[rule]) as proxy:
        said = await run("run", one_place.toml(encoder), env=one_place.through(proxy.url))
        assert [seen for seen in proxy.seen if seen.fault]
    assert said.code == 3, said.err
    assert one_place.nothing_is_left()


async def meddle(place: Place, rule: Rule, body: bytes, key: str = "disk.image") -> Said:
    """Let somebody put an object while a request of the run is held."""
    async with FaultProxy(place.server.port, rules=[rule]) as proxy:
        async with running("run", place.toml("encode.raw"), env=place.through(proxy.url)) as (_, end):
            async with anyio.create_task_group() as tasks:

                async def put() -> None:
                    await proxy.until(lambda: any(seen.is_stalled for seen in proxy.seen))
                    await anyio.to_thread.run_sync(place.server.put, place.bucket, key, body)
                    proxy.release()

                tasks.start_soon(put)
                said: Said = await end()
                tasks.cancel_scope.cancel()
    return said


@pytest.mark.parametrize("how", ["replaced", "truncated"])
async def test_object_that_was_replaced_before_it_was_verified_is_found_and_left_alone(place: Place, how: str) -> None:
    disk = place.disk.read_bytes()
    other = disk[: len(disk) // 2] if how == "truncated" else disk[:-1] + b"!"
    said = await meddle(place, Rule(Stall(), method="GET", path="disk.image$", when=Nth(1)), other)
    assert said.code in (1, 3), said.err
    assert said.has("error: ")
    assert place.server.get(place.bucket, "disk.image") == other
    assert place.server.keys(place.bucket) == ["disk.image"]
    assert place.no_file_is_left()


async def test_object_that_appears_in_mid_upload_is_left_alone(place: Place) -> None:
    said = await meddle(place, on_part_3(Stall(), Nth(1)), b"somebody's")
    assert said.code == 1, said.err
    assert said.has("the target appeared while the image was written", "Somebody else wrote it; it was left alone.")
    assert place.server.get(place.bucket, "disk.image") == b"somebody's"
    assert place.server.open_uploads(place.bucket) == []
    assert place.server.keys(place.bucket) == ["disk.image"]


async def test_object_that_appears_just_before_the_end_is_left_alone(place: Place) -> None:
    """The moment between looking and completing: the store's own condition decides."""
    said = await meddle(place, on_complete(Stall(), Nth(1)), b"somebody's")
    assert said.code == 1, said.err
    assert said.has("the target appeared while the image was written")
    assert place.server.get(place.bucket, "disk.image") == b"somebody's"
    assert place.server.open_uploads(place.bucket) == []


async def test_manifest_that_appears_in_mid_upload_is_left_alone(place: Place) -> None:
    rule = on_part_3(Stall(), Nth(1))
    said = await meddle(place, rule, b"somebody's", key="disk.image.manifest.json")
    assert said.code == 1, said.err
    assert place.server.get(place.bucket, "disk.image.manifest.json") == b"somebody's"
    assert place.server.keys(place.bucket) == ["disk.image.manifest.json"]


async def test_open_upload_of_somebody_else_is_left_alone(place: Place) -> None:
    theirs = place.server.client().create_multipart_upload(Bucket=place.bucket, Key="disk.image")["UploadId"]
    rules = [on_open(LoseReply(), Nth(1)), on_part_3(error_reply(403, "AccessDenied"))]
    async with FaultProxy(place.server.port, rules=rules) as proxy:
        said = await run("run", place.toml(), env=place.through(proxy.url))
    assert said.code == 1, said.err
    assert place.server.open_uploads(place.bucket) == [("disk.image", theirs)]
