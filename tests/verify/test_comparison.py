"""verify_image: whatever is not the disk is found, and nothing is read that need not be."""

from __future__ import annotations

import random
from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from pipeline.errors import StoreError
from pipeline.flow.buffers import Ledger
from pipeline.flow.items import Verdict
from pipeline.units import KiB, MiB, TiB
from stages.checksum.leaves import LEAF, GuestDigest, LeafDigests, hash_leaves
from stages.decode.image import Fetched
from stages.decode.qcow2 import Qcow2Image
from stages.verify.comparison import TOLD_MAX, WINDOW, WINDOW_MEMORY, Differences, verify_image
from tests.decode.images import BytesReader, Patched, mixed_disk, qemu_convert, run

DISK = mixed_disk(7 * MiB + 5 * 512, seed=11)
COPIED = 1 << 63


def digest_of(disk: bytes) -> GuestDigest:
    made = LeafDigests("xxh3-128", len(disk))
    made.add(b"".join(hash_leaves("xxh3-128", memoryview(disk))))
    return GuestDigest(made)


def padded(image: bytes) -> bytes:
    """Whole clusters, as our encoder writes them; qemu-img leaves the last one short when it compresses."""
    return image + bytes(-len(image) % 65536)


@pytest.fixture(scope="module")
def plain_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return qemu_convert(tmp_path_factory.mktemp("plain"), DISK)


@pytest.fixture(scope="module")
def packed_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return padded(qemu_convert(tmp_path_factory.mktemp("packed"), DISK, "-c"))


async def verdict_on(
    image: bytes | bytearray, *, disk: bytes = DISK, format: str = "qcow2", written: int | None = None
) -> Verdict:
    return await verify_image(
        BytesReader(image),
        format,
        digest_of(disk),
        virtual_size=len(disk),
        image_size=len(image) if written is None else written,
    )


@pytest.mark.parametrize("arguments", ["", "-c", "-c -o compression_type=zstd", "-o cluster_size=2M", "raw"])
async def test_the_image_of_the_disk_is_identical(tmp_path: Path, arguments: str) -> None:
    if arguments == "raw":
        verdict = await verdict_on(DISK, format="raw")
    else:
        verdict = await verdict_on(padded(qemu_convert(tmp_path, DISK, *arguments.split())))
    assert verdict.state == "identical", verdict.detail
    assert verdict.coverage == 1.0
    assert verdict.differing == ()
    assert verdict.evidence["compared_bytes"] == str(len(DISK))
    assert str(len(DISK)) in verdict.detail


async def test_one_flipped_bit_in_any_stored_cluster_is_found_in_its_leaf(plain_image: bytes) -> None:
    image = Patched(plain_image)
    draw = random.Random(1)
    for entry in image.plain:
        guest = (entry - image.l2) // 8 * image.cluster
        place = draw.randrange(min(image.cluster, len(DISK) - guest))
        host = (image.u64(entry) & 0xFF_FFFF_FFFF_FE00) + place
        image.bytes[host] ^= 1 << draw.randrange(8)
        verdict = await verdict_on(image.bytes)
        assert verdict.state == "differs"
        assert len(verdict.differing) == 1
        assert guest + place in verdict.differing[0]
        assert len(verdict.differing[0]) <= LEAF
        image.bytes[:] = plain_image


async def test_one_flipped_bit_in_any_compressed_cluster_is_found(packed_image: bytes) -> None:
    image = Patched(packed_image)
    draw = random.Random(2)
    for entry in image.compressed:
        host = image.u64(entry) & (1 << 54) - 1
        # Within the first bytes: behind the end of its stream a cluster has what belongs to the next one.
        image.bytes[host + draw.randrange(24)] ^= 1 << draw.randrange(8)
        verdict = await verdict_on(image.bytes)
        assert verdict.state == "differs", image.u64(entry)
        assert any((entry - image.l2) // 8 * image.cluster in found for found in verdict.differing)
        image.bytes[:] = packed_image


async def test_a_truncated_image_differs(plain_image: bytes, packed_image: bytes) -> None:
    for image in (plain_image, packed_image):
        for end in (0, 60, 104, 65536, len(image) - 65536, len(image) - 1):
            verdict = await verdict_on(image[:end], written=len(image))
            assert verdict.state == "differs"
            assert str(end) in verdict.detail
            # Also where somebody made the recorded size fit.
            assert (await verdict_on(image[:end])).state == "differs"


async def test_a_replaced_image_differs(plain_image: bytes, tmp_path: Path) -> None:
    other = qemu_convert(tmp_path, mixed_disk(len(DISK), seed=12))
    assert (await verdict_on(other, written=len(other))).state == "differs"
    assert (await verdict_on(bytes(len(plain_image)))).state == "differs"
    empty = tmp_path / "empty.qcow2"
    run("qemu-img", "create", "-f", "qcow2", str(empty), str(len(DISK)))
    verdict = await verdict_on(padded(empty.read_bytes()))
    assert verdict.state == "differs"
    assert verdict.differing[0].start == 0
    smaller = await verify_image(
        BytesReader(plain_image),
        "qcow2",
        digest_of(DISK[:-512]),
        virtual_size=len(DISK) - 512,
        image_size=len(plain_image),
    )
    assert smaller.state == "differs"
    assert f"a disk of {len(DISK)} bytes" in smaller.detail


async def test_an_image_with_something_behind_its_end_differs(plain_image: bytes) -> None:
    verdict = await verdict_on(plain_image + bytes(65536), written=len(plain_image))
    assert verdict.state == "differs"
    assert f"the stored image has {len(plain_image) + 65536} bytes" in verdict.detail


async def test_an_image_of_a_disk_that_ends_before_what_was_read_differs(plain_image: bytes) -> None:
    verdict = await verify_image(
        BytesReader(plain_image),
        "qcow2",
        digest_of(DISK + bytes(512)),
        virtual_size=len(DISK),
        image_size=len(plain_image),
    )
    assert verdict.state == "differs"
    assert f"{len(DISK) + 512} were exported" in verdict.detail


async def test_two_table_entries_swapped_or_one_dropped_are_found(plain_image: bytes) -> None:
    image = Patched(plain_image)
    one, *_, other = image.plain
    first, last = image.u64(one), image.u64(other)
    image.put64(one, last)
    image.put64(other, first)
    verdict = await verdict_on(image.bytes)
    assert verdict.state == "differs"
    assert len(verdict.differing) == 2
    image.bytes[:] = plain_image
    image.put64(one, 0)
    verdict = await verdict_on(image.bytes)
    assert [(one - image.l2) // 8 * image.cluster in found for found in verdict.differing] == [True]


async def test_a_damaged_window_does_not_hide_the_others(plain_image: bytes) -> None:
    image = Patched(plain_image)
    early, late = image.plain[0], image.plain[-1]
    image.put64(early, COPIED | 1 << 45)
    image.bytes[(image.u64(late) & 0xFF_FFFF_FFFF_FE00) + 5] ^= 1
    verdict = await verdict_on(image.bytes)
    assert verdict.state == "differs"
    assert "damaged" in verdict.detail
    assert len(verdict.differing) == 2
    assert verdict.coverage == 1.0


@pytest.mark.parametrize("missing", [512, LEAF])
async def test_a_decoder_that_gives_fewer_bytes_than_asked_for_is_no_proof(
    plain_image: bytes, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not there differs in nothing: only the count tells."""
    fetch = Qcow2Image.fetch

    async def short(image: Qcow2Image, offset: int, length: int) -> Fetched:
        return await fetch(image, offset, length if offset else length - missing)

    monkeypatch.setattr(Qcow2Image, "fetch", short)
    verdict = await verdict_on(plain_image)
    assert verdict.state == "differs"
    if missing == LEAF:  # else the last leaf of the window differs, too
        assert f"{len(DISK) - missing} of {len(DISK)} bytes could be compared" in verdict.detail
        assert verdict.coverage < 1.0


async def test_a_damaged_table_differs_with_what_could_be_compared(plain_image: bytes) -> None:
    image = Patched(plain_image)
    image.put64(image.l1, COPIED | 1 << 45)
    verdict = await verdict_on(image.bytes)
    assert verdict.state == "differs"
    assert "no L2 table can be" in verdict.detail
    assert verdict.coverage < 1.0


async def test_rounding_up_must_be_zeros(tmp_path: Path) -> None:
    """The virtual disk is larger than the exported one: the rest is outside of the digest, and zero."""
    size, virtual = 3 * MiB + 512, 8 * MiB
    disk = mixed_disk(size)
    image = Patched(qemu_convert(tmp_path, disk + bytes(virtual - size)))

    async def check() -> Verdict:
        reader = BytesReader(image.bytes)
        return await verify_image(reader, "qcow2", digest_of(disk), virtual_size=virtual, image_size=reader.size)

    assert (await check()).state == "identical"
    assert (await check()).coverage == 1.0
    path = tmp_path / "image.qcow2"
    for place in (size, size + 5000, 4 * MiB, virtual - 1):
        path.write_bytes(image.bytes)
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 1 {place} 1", str(path))
        before, image.bytes = image.bytes, bytearray(path.read_bytes())
        verdict = await check()
        assert verdict.state == "differs"
        assert place in verdict.differing[0]
        assert verdict.differing[0].start >= size
        image.bytes = before


async def test_sparse_terabytes_are_compared_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-f", "qcow2", str(path), "2T")
    places = (0, TiB + 5 * MiB, 2 * TiB - 65536)
    for place in places:
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 1 {place} 64k", str(path))
    made = LeafDigests("xxh3-128", 2 * TiB)
    for place in places:
        made.add_zeros(place // LEAF - len(made))
        leaf = bytearray(LEAF)
        leaf[place % LEAF : place % LEAF + 64 * KiB] = b"\1" * 64 * KiB
        made.add(b"".join(hash_leaves("xxh3-128", memoryview(leaf))))
    made.add_zeros(made.total - len(made))
    reader = BytesReader(padded(path.read_bytes()))
    with anyio.fail_after(3):
        verdict = await verify_image(reader, "qcow2", GuestDigest(made), virtual_size=2 * TiB, image_size=reader.size)
    assert verdict.state == "identical", verdict.detail
    assert len(reader.reads) <= 2 + 2 * len(places)
    missing = LeafDigests("xxh3-128", 2 * TiB)
    missing.add_zeros(TiB // LEAF + 100)
    missing.add(b"x" * 16)
    missing.add_zeros(missing.total - len(missing))
    verdict = await verify_image(reader, "qcow2", GuestDigest(missing), virtual_size=2 * TiB, image_size=reader.size)
    assert range(TiB + 100 * MiB, TiB + 101 * MiB) in verdict.differing


async def test_an_empty_disk_and_a_short_one_verify() -> None:
    for disk in (b"", b"x" * 512, bytes(512), bytes(3 * MiB + 512)):
        assert (await verdict_on(disk, disk=disk, format="raw")).state == "identical"


async def test_an_unread_short_tail_of_zeros_is_zero(tmp_path: Path) -> None:
    """The last leaf is short: its digest is not the one of a whole zero leaf."""
    disk = b"A" * MiB + bytes(4 * MiB + 512)
    image = qemu_convert(tmp_path, disk)
    assert (await verdict_on(image, disk=disk)).state == "identical"
    other = disk[:-1] + b"!"
    verdict = await verdict_on(image, disk=other)
    assert verdict.differing == (range(5 * MiB, 5 * MiB + 512),)


class Watched(BytesReader):
    """Counts reads of data under way at once; each lets others start meanwhile."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.busy = self.peak = 0

    async def read(self, offset: int, length: int) -> bytes:
        self.busy += 1
        self.peak = max(self.peak, self.busy)
        for _ in range(20):
            await checkpoint()
        self.busy -= 1
        return await super().read(offset, length)


@pytest.mark.parametrize("parallel", [1, 3])
async def test_windows_in_flight_are_bounded_and_charged(parallel: int) -> None:
    disk = random.Random(3).randbytes(16 * MiB)
    reader, ledger = Watched(disk), Ledger(64 * MiB)
    verdict = await verify_image(
        reader, "raw", digest_of(disk), virtual_size=len(disk), image_size=len(disk), parallel=parallel, ledger=ledger
    )
    assert verdict.state == "identical"
    assert reader.peak == parallel
    assert ledger.peak == parallel * WINDOW_MEMORY
    assert ledger.charged == 0


async def test_little_memory_means_fewer_windows_not_a_standstill() -> None:
    disk = random.Random(3).randbytes(8 * MiB)
    reader, ledger = Watched(disk), Ledger(WINDOW_MEMORY - 1)
    with anyio.fail_after(10):
        verdict = await verify_image(
            reader, "raw", digest_of(disk), virtual_size=len(disk), image_size=len(disk), parallel=4, ledger=ledger
        )
    assert verdict.state == "identical"
    assert reader.peak == 1
    assert ledger.charged == 0


class Broken(BytesReader):
    async def read(self, offset: int, length: int) -> bytes:
        if offset >= 4 * MiB:
            raise StoreError("the store went away", temporary=True)
        return await super().read(offset, length)


async def test_a_store_that_fails_is_no_verdict() -> None:
    disk = random.Random(3).randbytes(8 * MiB)
    ledger = Ledger(64 * MiB)
    with pytest.raises(StoreError, match="went away"):
        await verify_image(
            Broken(disk), "raw", digest_of(disk), virtual_size=len(disk), image_size=len(disk), ledger=ledger
        )
    assert ledger.charged == 0


class Stuck(BytesReader):
    async def read(self, offset: int, length: int) -> bytes:
        await anyio.sleep_forever()
        raise AssertionError


async def test_cancellation_gives_all_memory_back() -> None:
    disk = bytes(8 * MiB)
    ledger = Ledger(64 * MiB)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(
            lambda: verify_image(
                Stuck(disk), "raw", digest_of(disk), virtual_size=len(disk), image_size=len(disk), ledger=ledger
            )
        )
        await anyio.wait_all_tasks_blocked()
        assert ledger.charged == 4 * WINDOW_MEMORY
        tasks.cancel_scope.cancel()
    assert ledger.charged == 0


async def test_a_format_without_reader_is_unproven() -> None:
    verdict = await verdict_on(b"x" * 512, format="vdi")
    assert verdict.state == "unproven"
    assert "verify.receipt" in verdict.detail


async def test_only_the_first_differing_ranges_are_told() -> None:
    disk = bytearray(random.Random(3).randbytes(2 * (TOLD_MAX + 4) * LEAF))
    digest = digest_of(bytes(disk))
    for start in range(0, len(disk), 2 * LEAF):
        disk[start] ^= 1
    verdict = await verify_image(BytesReader(disk), "raw", digest, virtual_size=len(disk), image_size=len(disk))
    assert verdict.differing == tuple(range(start, start + LEAF) for start in range(0, TOLD_MAX * 2 * LEAF, 2 * LEAF))
    assert str((TOLD_MAX + 4) * LEAF) in verdict.detail


async def test_progress_ends_at_the_disk_size() -> None:
    seen: list[tuple[int, int]] = []
    await verify_image(
        BytesReader(DISK),
        "raw",
        digest_of(DISK),
        virtual_size=len(DISK),
        image_size=len(DISK),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (len(DISK), len(DISK))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) >= len(DISK) // WINDOW


def test_differences_merge_in_any_order_and_stay_bounded() -> None:
    starts = list(range(0, 6000, 2))
    random.Random(1).shuffle(starts)
    found = Differences()
    for start in starts:
        found.add(range(start, start + 1))
    assert found.merged()[:3] == (range(1), range(2, 3), range(4, 5))
    assert len(found.merged()) <= 1024
    assert found.total == 3000
    joined = Differences()
    for start in (3, 1, 2, 0):
        joined.add(range(start * 10, start * 10 + 10))
    assert joined.merged() == (range(40),)
