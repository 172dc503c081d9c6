"""encode.qcow2, proven by qemu-img and by a strict reader that shares no code with it."""

from __future__ import annotations

import itertools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.errors import PlanError, StageError
from pipeline.flow.buffers import Ledger, Pool, loose_slice
from pipeline.flow.items import Block, Content, Run, Why
from pipeline.units import GiB, KiB, MiB, Size, TiB
from stages.encode.qcow2 import SPEC, Options
from tests.encode.lettered import WINDOW, Export, LetterDisk, disk, export, layout_of, make_encoder
from tests.encode.strict_reader import StrictReader

CLUSTERS = tuple(512 << shift for shift in range(13))


def options(compression: Any = "zlib", level: Any = "fast", cluster_size: int = 64 * KiB) -> Options:
    """Options, the shape first."""
    return Options(compression=compression, level=level, cluster_size=Size(cluster_size))


def check(image: Path) -> None:
    """`qemu-img check` finds neither errors nor leaks."""
    done = subprocess.run(["qemu-img", "check", "--output=json", "-f", "qcow2", image], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found.get("leaks", 0), found.get("corruptions", 0), found["check-errors"]) == (0, 0, 0)
    assert found["image-end-offset"] == image.stat().st_size


def compare(raw: Path, image: Path) -> None:
    """`qemu-img compare` finds the same bytes and the same size."""
    command = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr


def prove(source: LetterDisk, chosen: Options, head_minimum: int = 0) -> Export:
    """Export a disk and have its image checked and compared by qemu-img."""
    made = export(SPEC, chosen, source, head_minimum=head_minimum)
    assert made.guest_bytes == source.size
    assert made.length <= made.layout.image_bytes_max
    assert (made.leaked_buffers, made.leaked_bytes) == (0, 0)
    with tempfile.TemporaryDirectory() as folder:
        image, raw = Path(folder, "image.qcow2"), Path(folder, "disk.raw")
        made.write(image)
        source.write(raw)
        check(image)
        compare(raw, image)
        if chosen.compression != "none":
            reader = StrictReader(image)
            content = raw.read_bytes()
            for offset in range(0, source.size, reader.cluster * (1 + source.size // reader.cluster // 4000)):
                expected = content[offset : offset + reader.cluster]
                assert reader.read(offset) == expected.ljust(reader.cluster, b"\0")
            reader.close()
    return made


lengths = st.one_of(
    st.integers(1, 24).map(lambda sectors: sectors * 512),
    st.integers(1, 12).map(lambda units: units * 64 * KiB),
    st.sampled_from((1 * MiB, 2 * MiB, 4 * MiB)),
)
extents = st.lists(st.tuples(st.sampled_from("AANNSS00--."), lengths), min_size=1, max_size=10)
disks = st.builds(
    lambda parts, cut: LetterDisk((*parts[:-1], (parts[-1][0], parts[-1][1] - cut))), extents, st.integers(0, 511)
)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    source=disks,
    compression=st.sampled_from(("none", "zlib", "zlib", "zstd")),
    level=st.sampled_from(("fast", "small")),
    cluster_size=st.sampled_from(CLUSTERS),
    head_minimum=st.sampled_from((0, 0, 70_000, 5 * MiB)),
)
@example(source=disk("N", 1), compression="zlib", level="fast", cluster_size=64 * KiB, head_minimum=0)
@example(source=disk("ANS", 700 * KiB), compression="zlib", level="fast", cluster_size=512, head_minimum=0)
@example(source=disk("ANS", 700 * KiB), compression="none", level="fast", cluster_size=2 * MiB, head_minimum=0)
def test_image_of_any_disk_is_clean_and_identical(
    source: LetterDisk, compression: str, level: str, cluster_size: int, head_minimum: int
) -> None:
    prove(source, options(compression, level, cluster_size), head_minimum)


@pytest.mark.parametrize("cluster_size", [512, 1 * KiB, 64 * KiB, 2 * MiB])
@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
def test_larger_disk_with_every_kind_of_window_is_clean_and_identical(compression: str, cluster_size: int) -> None:
    """Long enough for many refcount blocks with small clusters, and for packed clusters to run over window ends."""
    windows = ("A", "N", "S", "AS", "AN", "-", "NS0", "A-N", "NNNA", "S", "N")
    parts = [part for letters in windows for part in disk(letters, WINDOW // len(letters) // 512 * 512).extents]
    prove(LetterDisk((*parts, ("A", 3 * 512))), options(compression, "fast", cluster_size))


@pytest.mark.parametrize(
    "compression, cluster_size",
    [*(("zstd", size) for size in CLUSTERS), ("zlib", 512), ("zlib", 64 * KiB), ("zlib", 2 * MiB)],
)
def test_clusters_of_one_byte_are_counted_however_many_share_a_host_cluster(
    compression: str, cluster_size: int
) -> None:
    made = prove(disk("S", 2 * WINDOW), options(compression, "fast", cluster_size))
    assert made.length < made.layout.image_bytes_max


@pytest.mark.parametrize("cluster_size", CLUSTERS)
@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
def test_disk_of_noise_is_exactly_as_long_as_the_layout_allows(compression: str, cluster_size: int) -> None:
    """The bound is no guess: every cluster plain, every table needed."""
    made = export(SPEC, options(compression, "fast", cluster_size), disk("NOPQR", 800 * KiB, cut=37))
    assert made.length == made.layout.image_bytes_max


@pytest.mark.parametrize("cluster_size", [2 * KiB, 64 * KiB, 2 * MiB])
@pytest.mark.parametrize("compression", ["none", "zlib"])
def test_two_tebibytes_of_mostly_nothing_cost_only_their_tables(
    compression: str, cluster_size: int, tmp_path: Path
) -> None:
    source = LetterDisk(
        (("A", 1 * MiB), ("-", 1 * TiB - 1 * MiB), ("N", 3 * MiB), ("-", 1 * TiB - 4 * MiB), ("S", 1 * MiB))
    )
    made = export(SPEC, options(compression, "fast", cluster_size), source)
    assert len(made.placed) < 60
    assert made.guest_bytes == 2 * TiB
    image = made.write(tmp_path / "image.qcow2")
    check(image)
    reader = StrictReader(image)
    expected = bytearray(reader.cluster)
    for offset in (0, 1 * MiB - 4 * KiB, 1 * MiB, 1 * TiB, 1 * TiB + 3 * MiB - 4 * KiB, 2 * TiB - 1 * MiB):
        start = offset // reader.cluster * reader.cluster
        source.fill(start, memoryview(expected))
        assert reader.read(start) == expected
    reader.close()


@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
def test_largest_disk_of_small_clusters_counts_with_eight_bits(compression: str, tmp_path: Path) -> None:
    """Its full refcount table of 16-bit counts would be longer than QEMU accepts."""
    source = LetterDisk((("ANS", 0), ("S", 1 * MiB), ("A", 1 * MiB), ("-", 128 * GiB - 4 * MiB), ("N", 2 * MiB)))
    made = export(SPEC, options(compression, "fast", 512), source)
    image = made.write(tmp_path / "image.qcow2")
    check(image)
    reader = StrictReader(image)
    assert reader.header["refcount_order"] == 3
    expected = bytearray(512)
    for offset in (512, 1 * MiB + 512, 2 * MiB, 128 * GiB - 512):
        source.fill(offset, memoryview(expected))
        assert reader.read(offset) == expected
    reader.close()


@pytest.mark.parametrize(
    "compression, bit, kind", [("none", 0, 0), ("zlib", 0, 0), ("zstd", 8, 1)], ids=["none", "zlib", "zstd"]
)
def test_header_says_what_a_version_3_header_must(compression: str, bit: int, kind: int, tmp_path: Path) -> None:
    made = export(SPEC, options(compression), disk("AN-", 512 * KiB, cut=100), head_minimum=200_000)
    head = made.placed[-2]
    assert (head[0], head[1]) == (0, 64 * KiB)
    assert head[2] is not None
    assert head[2][:8] == b"QFI\xfb\0\0\0\x03"
    assert head[2][120:] == bytes(64 * KiB - 120)
    assert made.placed[-1][:3] == (64 * KiB, 3 * 64 * KiB, None)
    reader = StrictReader(made.write(tmp_path / "image.qcow2"))
    fields = reader.header
    reader.close()
    assert fields["size"] == 1536 * KiB
    assert (fields["incompatible"], fields["kind"], fields["header_length"]) == (bit, kind, 112)
    assert (fields["refcount_order"], fields["cluster_bits"], fields["l1_entries"]) == (4, 16, 1)
    zero = "backing backing_length crypt snapshots snapshots_offset compatible autoclear"
    assert [fields[name] for name in zero.split()] == [0] * 7
    assert made.layout.head_length == 4 * 64 * KiB


def test_zero_cluster_has_no_entry_and_a_partly_zero_one_is_stored_whole(tmp_path: Path) -> None:
    source = LetterDisk((("A", 512), ("-", 127 * 512), ("0", 64 * KiB), ("-", 64 * KiB - 512), ("N", 512)))
    reader = StrictReader(export(SPEC, options(), source).write(tmp_path / "image.qcow2"))
    entries = [reader.entry(offset) for offset in range(0, source.size, 64 * KiB)]
    reader.close()
    assert [entry != 0 for entry in entries] == [True, False, True]


def test_window_is_packed_streams_then_one_pad_then_plain_clusters() -> None:
    made = export(SPEC, options(), disk("NANA-N"))
    packed, pad, plain, *_ = made.placed
    assert packed[0] == 64 * KiB
    assert 0 < packed[1] < 2 * 64 * KiB
    assert pad[2] is None
    assert (packed[1] + pad[1]) % (64 * KiB) == 0
    assert plain[1] == 3 * 64 * KiB


@pytest.mark.parametrize("shrinks_by, packed", [(0, 0), (1, 3)])
def test_cluster_that_shrinks_by_nothing_is_stored_plain(shrinks_by: int, packed: int) -> None:
    class Codec:
        def compress(self, cluster: bytes | memoryview) -> bytes:
            return bytes(len(cluster) - shrinks_by)

    encoder, _ = make_encoder(SPEC, options(), WINDOW)
    encoder._codec = Codec()
    runs = disk("ABC" + "0" * 29).runs(0, WINDOW)
    prepared = encoder.prepare(Block(0, WINDOW, loose_slice(bytearray(WINDOW)), runs), None)
    assert len(prepared.packed) == packed
    assert prepared.plain == ([] if packed else [(0, 3)])


def test_plain_clusters_are_passed_on_without_a_copy() -> None:
    encoder, layout = make_encoder(SPEC, options("none"), WINDOW)
    assert layout.made_max == 0
    buffer = bytearray(b"a" * WINDOW)
    runs = disk("AB-A" + "0" * 28).runs(0, WINDOW)
    placed = encoder.place(encoder.prepare(Block(0, WINDOW, loose_slice(buffer), runs), None))
    buffer[:] = b"b" * WINDOW
    assert [bytes(piece.view) for piece in placed] == [b"b" * 128 * KiB, b"b" * 64 * KiB]


async def test_compressing_gives_the_buffer_back_and_charges_only_what_was_made() -> None:
    encoder, layout = make_encoder(SPEC, options(), WINDOW)
    pool, ledger = Pool(WINDOW, 1), Ledger(layout.made_max)
    lease = await pool.lease()
    disk("S" * 32).fill(0, lease.buffer)
    block = Block(0, WINDOW, lease.into_slice(WINDOW), disk("S" * 32).runs(0, WINDOW))
    prepared = encoder.prepare(block, await ledger.charge(layout.made_max))
    assert pool.in_use == 0
    assert 0 < ledger.charged < 64 * KiB
    for piece in encoder.place(prepared):
        piece.release()
    assert ledger.charged == 0
    pool.close()


async def test_codec_that_fails_gives_buffer_and_charge_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.encode import codecs

    def refuse(cluster: object) -> bytes:
        raise MemoryError("no room")

    monkeypatch.setattr(codecs, "deflate", lambda level: codecs.Codec("refusing", refuse))
    encoder, layout = make_encoder(SPEC, options(), WINDOW)
    pool, ledger = Pool(WINDOW, 1), Ledger(layout.made_max)
    block = Block(0, WINDOW, (await pool.lease()).into_slice(WINDOW), disk("A" * 32).runs(0, WINDOW))
    with pytest.raises(MemoryError):
        encoder.prepare(block, await ledger.charge(layout.made_max))
    assert (pool.in_use, ledger.charged) == (0, 0)
    pool.close()


def test_block_out_of_order_gives_its_bytes_back() -> None:
    encoder, _ = make_encoder(SPEC, options("none"), 4 * WINDOW)
    data = loose_slice(bytes(WINDOW))
    prepared = encoder.prepare(Block(WINDOW, WINDOW, data, disk("A", WINDOW).runs(0, WINDOW)), None)
    with pytest.raises(StageError):
        encoder.place(prepared)
    with pytest.raises(StageError, match="released twice"):
        data.release()


def test_checkpoint_of_four_tebibytes_stays_below_a_mebibyte() -> None:
    """One cluster in every L2 range: the L1 table and the refcounts are as full as they get without data."""
    encoder, _ = make_encoder(SPEC, options("none"), 4 * TiB)
    cluster, reach = bytes(64 * KiB), 512 * MiB
    for start in range(0, 4 * TiB, reach):
        runs = (
            Run(start, 64 * KiB, Content.DATA, Why.READ),
            Run(start + 64 * KiB, WINDOW - 64 * KiB, Content.ZERO, Why.HOLE),
        )
        for piece in encoder.place(encoder.prepare(Block(start, WINDOW, loose_slice(cluster), runs), None)):
            piece.release()
        if start + reach < 4 * TiB:
            skip = Block(start + WINDOW, reach - WINDOW, None, ())
            for piece in encoder.place(encoder.prepare(skip, None)):
                piece.release()
    assert len(encoder.checkpoint()) < 1 * MiB


@pytest.mark.parametrize(
    "disk_size, cluster_size, hint",
    [
        (2 * TiB, 512, '"2 KiB"'),
        (2 * TiB, 1 * KiB, '"2 KiB"'),
        (128 * GiB + 512, 512, '"1 KiB"'),
        (8 * TiB, 4 * KiB, '"8 KiB"'),  # many streams share a cluster, so that counts need 16 bits
        (16 * TiB, 2 * KiB, '"8 KiB"'),
        (600 * TiB, 512, '"64 KiB"'),
        (1 << 59, 2 * MiB, "too large for qcow2"),
    ],
)
def test_clusters_too_small_for_the_disk_are_refused_and_the_smallest_that_work_are_named(
    disk_size: int, cluster_size: int, hint: str
) -> None:
    with pytest.raises(PlanError) as refused:
        layout_of(SPEC, options("zlib", "fast", cluster_size), disk_size)
    assert hint in refused.value.hint
    assert "encode.raw" in refused.value.hint


@pytest.mark.parametrize(
    "disk_size, cluster_size", [(2 * TiB, 2 * KiB), (128 * GiB, 512), (16 * TiB, 64 * KiB), (512, 2 * MiB)]
)
def test_clusters_that_just_work_are_accepted(disk_size: int, cluster_size: int) -> None:
    assert layout_of(SPEC, options("zlib", "fast", cluster_size), disk_size)[0].virtual_size == disk_size


def test_plain_clusters_reach_further_than_the_offset_of_a_compressed_one() -> None:
    """With clusters of 2 MiB a compressed one has 49 bits of offset: 512 TiB of image."""
    size = 512 * TiB
    with pytest.raises(PlanError, match="49 bits"):
        layout_of(SPEC, options("zlib", "fast", 2 * MiB), size)
    assert layout_of(SPEC, options("none", "fast", 2 * MiB), size)[0].image_bytes_max > size


def test_cluster_longer_than_the_window_is_refused() -> None:
    with pytest.raises(PlanError, match="longer than the window") as refused:
        layout_of(SPEC, options("zlib", "fast", 2 * MiB), 1 * GiB, window=1 * MiB)
    assert '"1 MiB"' in refused.value.hint


@pytest.mark.parametrize("size", [0, 256, 513, 96 * KiB, 4 * MiB])
def test_cluster_size_that_no_reader_knows_is_refused_when_options_are_made(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        options("zlib", "fast", size)


@pytest.mark.parametrize("changed", [options("zstd"), options("zlib", "small"), options("zlib", "fast", 32 * KiB)])
def test_checkpoint_made_with_other_options_is_refused(changed: Options) -> None:
    state = make_encoder(SPEC, options(), 8 * WINDOW)[0].checkpoint()
    with pytest.raises(PlanError, match="another export"):
        make_encoder(SPEC, changed, 8 * WINDOW)[0].restore(state)


def test_layout_grows_with_the_disk_and_is_never_below_it() -> None:
    for cluster_size in CLUSTERS:
        sizes = [513, 4 * MiB, 1 * GiB, 64 * GiB]
        lengths = [layout_of(SPEC, options("zlib", "fast", cluster_size), size)[0].image_bytes_max for size in sizes]
        assert all(length >= size for length, size in zip(lengths, sizes, strict=True))
        assert all(shorter <= longer for shorter, longer in itertools.pairwise(lengths))
