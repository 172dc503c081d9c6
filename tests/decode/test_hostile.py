"""Images made to break a reader: each is refused with a FormatError, fast, and without allocating what it claims."""

from __future__ import annotations

import re
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.errors import FormatError
from pipeline.units import GiB, KiB, MiB
from stages.decode.opening import open_image
from tests.decode.images import BytesReader, Patched, content, mixed_disk, qemu_convert, run
from tests.decode.made import bounded

DISK = mixed_disk(2 * MiB + 5 * 512, seed=3)
COMPRESSED = 1 << 62
COPIED = 1 << 63


@pytest.fixture(scope="module")
def plain_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return qemu_convert(tmp_path_factory.mktemp("plain"), DISK)


@pytest.fixture(scope="module")
def compressed_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return qemu_convert(tmp_path_factory.mktemp("compressed"), DISK, "-c")


async def refused(image: bytes | bytearray, *, strict: bool = False) -> FormatError:
    """The error that reading all of the image raises; checks time and memory too."""
    with bounded(memory=64 * MiB), pytest.raises(FormatError) as caught:
        await content(await open_image(BytesReader(image), "qcow2", strict=strict))
    return caught.value


Patch = Callable[[Patched], None]


def put32(offset: int, value: int) -> Patch:
    return lambda image: image.put32(offset, value)


def put64(offset: int, value: int) -> Patch:
    return lambda image: image.put64(offset, value)


def both(one: Patch, other: Patch) -> Patch:
    def patch(image: Patched) -> None:
        one(image)
        other(image)

    return patch


HEADERS: dict[str, tuple[Patch, str]] = {
    "magic": (put32(0, 0x51464900), "begin like a qcow2"),
    "version 1": (put32(4, 1), "version 1"),
    "version 4": (put32(4, 4), "version 4"),
    "backing file": (put64(8, 512), "backing file"),
    "clusters of 256 bytes": (put32(20, 8), "2\\^8"),
    "clusters of 4 MiB": (put32(20, 22), "2\\^22"),
    "cluster bits that shift far": (put32(20, 0xFFFFFFFF), "2\\^4294967295"),
    "disk beyond 2^63": (put64(24, 1 << 63), "disk of 9223372036854775808"),
    "disk larger than its L1": (put64(24, 1 << 50), "L1 table is too small"),
    "AES": (put32(32, 1), "encryption"),
    "LUKS": (put32(32, 2), "encryption"),
    "huge L1": (put32(36, 0xFFFFFFFF), "larger than any image needs"),
    "L1 of 32 MiB in a small file": (put32(36, 4 * MiB), "behind the end"),
    "no L1 entries": (put32(36, 0), "too small"),
    "L1 at 0": (put64(40, 0), "can't be at 0"),
    "L1 between clusters": (put64(40, 0x30200), "can't be at"),
    "L1 behind the end": (put64(40, 1 << 40), "behind the end"),
    "L1 that wraps 64 bits": (put64(40, (1 << 64) - 65536), "behind the end"),
    "corrupt bit": (put64(72, 2), "marked as corrupt"),
    "data file": (put64(72, 4), "external data file"),
    "compression bit without a type": (put64(72, 8), "contradict"),
    "extended L2": (put64(72, 16), "subclusters"),
    "unknown bits": (put64(72, 1 << 5 | 1 << 63), "bits 5, 63"),
    "header of 0 bytes": (put32(100, 0), "header of 0 bytes"),
    "header of 4 GiB": (put32(100, 0xFFFFFFF8), "header of 4294967288"),
    "header not in eights": (put32(100, 105), "header of 105"),
    "type without the bit": (put32(104, 0x01000000), "contradict"),
    "unknown compression": (both(put64(72, 8), put32(104, 0x07000000)), "type 7"),
}


@pytest.mark.parametrize("name", HEADERS)
async def test_a_hostile_header_is_refused(plain_image: bytes, name: str) -> None:
    patch, message = HEADERS[name]
    image = Patched(plain_image)
    patch(image)
    error = await refused(image.bytes)
    assert re.search(message, str(error))
    assert error.hint


TABLES: dict[str, tuple[Patch, str]] = {
    "L1 reserved low bits": (lambda image: image.put64(image.l1, image.u64(image.l1) | 1), "reserved bits"),
    "L1 reserved high bits": (lambda image: image.put64(image.l1, image.u64(image.l1) | 1 << 56), "reserved bits"),
    "L2 behind the end": (lambda image: image.put64(image.l1, COPIED | 1 << 50), "no L2 table can be"),
    "L2 half behind the end": (lambda image: _half_behind(image), "no L2 table can be"),
    "L2 between clusters": (lambda image: image.put64(image.l1, image.u64(image.l1) + 512), "no L2 table can be"),
    "cluster behind the end": (lambda image: image.put64(image.plain[0], COPIED | 1 << 50), "behind the end"),
    "cluster between clusters": (lambda image: image.put64(image.plain[0], COPIED | 0x50200), "between two clusters"),
    "L2 reserved low bits": (lambda image: image.put64(image.plain[0], image.u64(image.plain[0]) | 2), "reserved bits"),
    "L2 reserved high bits": (
        lambda image: image.put64(image.plain[0], image.u64(image.plain[0]) | 1 << 56),
        "reserved bits",
    ),
    "compressed behind the end": (lambda image: image.put64(image.plain[0], COMPRESSED | 1 << 50), "outside"),
    "compressed in the header": (lambda image: image.put64(image.plain[0], COMPRESSED | 8), "outside"),
    "compressed into a table": (lambda image: image.put64(image.plain[0], COMPRESSED | image.l1), "unpacked"),
}


def _half_behind(image: Patched) -> None:
    image.bytes += bytes(-len(image.bytes) % image.cluster)
    end = len(image.bytes)
    image.bytes += bytes(512)
    image.put64(image.l1, COPIED | end)


@pytest.mark.parametrize("name", TABLES)
async def test_a_hostile_table_is_refused(plain_image: bytes, name: str) -> None:
    patch, message = TABLES[name]
    image = Patched(plain_image)
    patch(image)
    error = await refused(image.bytes)
    assert message in str(error)
    assert error.context["offset"] is not None or error.context["guest_offset"] is not None


async def test_the_zero_flag_does_not_exist_in_version_2(tmp_path: Path) -> None:
    image = Patched(qemu_convert(tmp_path, DISK, "-o", "compat=0.10"))
    image.put64(image.plain[0], image.u64(image.plain[0]) | 1)
    assert "reserved bits" in str(await refused(image.bytes))


async def test_tables_that_point_at_themselves_end(plain_image: bytes) -> None:
    """An L2 entry, and an L1 entry, that lead to their own table: odd content, but no endless walk."""
    image = Patched(plain_image)
    image.put64(image.plain[0], COPIED | image.l2)
    assert len(await content(await open_image(BytesReader(image.bytes), "qcow2"))) == len(DISK)
    image.put64(image.l1, COPIED | image.l1)
    image.bytes += bytes(-len(image.bytes) % image.cluster)
    try:
        await content(await open_image(BytesReader(image.bytes), "qcow2"))
    except FormatError:
        pass


async def test_an_image_cut_anywhere_is_refused(plain_image: bytes, compressed_image: bytes) -> None:
    """Truncation is an error wherever it falls, never zeros."""
    for image in (plain_image, compressed_image):
        view = Patched(image)
        ends = {0, 3, 71, 72, 103, 104, 111, view.l1, view.l1 + 7, view.l2 - 1, view.l2 + 8, view.l2 + view.cluster - 1}
        ends |= {len(image) - 70000, len(image) * 3 // 4}
        for end in sorted(ends):
            await refused(image[:end])


async def test_the_last_cluster_may_be_short_only_behind_the_end_of_the_disk(plain_image: bytes) -> None:
    image = Patched(plain_image)
    last = max(image.u64(entry) & 0xFFFFFFFFFFFE00 for entry in image.plain)
    used = len(DISK) % image.cluster
    image.bytes[last + used :] = b""
    assert await content(await open_image(BytesReader(image.bytes), "qcow2")) == DISK
    await refused(image.bytes, strict=True)
    await refused(image.bytes[:-1])


def with_cluster(image: bytes, payload: bytes) -> bytes:
    """The image with `payload` as its first compressed cluster, at the end of the file."""
    made = Patched(image)
    entry = made.compressed[0]
    made.bytes += bytes(-len(made.bytes) % 512)
    at = len(made.bytes)
    made.bytes += payload + bytes(-len(payload) % 512)
    made.put64(entry, COMPRESSED | min(255, (len(payload) - 1) // 512) << 54 | at)
    return bytes(made.bytes)


def deflated(data: bytes, *, bits: int = -12) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, bits, 9)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize("length", [0, 1, 64 * KiB - 1, 64 * KiB + 1, 64 * MiB])
async def test_a_cluster_that_unpacks_to_another_size_is_refused(compressed_image: bytes, length: int) -> None:
    """64 MiB in a few KiB is a bomb: it must not be unpacked."""
    error = await refused(with_cluster(compressed_image, deflated(bytes(length))))
    assert "more than 65536" in str(error) or "of 65536 bytes" in str(error)


@pytest.mark.parametrize("length", [0, 1, 64 * KiB - 1, 64 * KiB + 1, 256 * MiB])
@pytest.mark.parametrize("says_its_size", [True, False])
async def test_a_zstd_cluster_that_unpacks_to_another_size_is_refused(
    tmp_path: Path, length: int, says_its_size: bool
) -> None:
    image = qemu_convert(tmp_path, DISK, "-c", "-o", "compression_type=zstd")
    packer = zstandard.ZstdCompressor(level=1, write_content_size=says_its_size)
    payload = packer.compress(bytes(length))
    await refused(with_cluster(image, payload))


async def test_a_zstd_frame_that_wants_a_huge_window_is_refused(tmp_path: Path) -> None:
    """A header of 8 bytes must not make every thread allocate 2 GiB."""
    image = qemu_convert(tmp_path, DISK, "-c", "-o", "compression_type=zstd")
    frame = struct.pack("<IBB", 0xFD2FB528, 0, 21 << 3) + b"\x01\x00\x00"
    await refused(with_cluster(image, frame))


async def test_an_l1_full_of_entries_for_one_table_is_not_followed_eagerly(tmp_path: Path) -> None:
    """A small file that claims 2 PiB: opening costs its L1, reading a window costs one table."""
    image = Patched(qemu_convert(tmp_path, DISK))
    table, entries = image.l2, 4 * MiB
    image.bytes += bytes(-len(image.bytes) % image.cluster)
    image.put64(40, len(image.bytes))
    image.put32(36, entries)
    image.put64(24, entries * 512 * MiB)
    image.bytes += struct.pack(">Q", COPIED | table) * entries
    begun = time.process_time()
    reader = BytesReader(image.bytes)
    opened = await open_image(reader, "qcow2")
    await opened.read(opened.size - 64 * KiB, 64 * KiB)
    assert time.process_time() - begun < 2
    assert len(reader.reads) < 10


async def test_many_tiny_clusters_far_apart_do_not_multiply_memory(tmp_path: Path) -> None:
    """Gaps read along are bounded, and what overlaps is read once."""
    disk = bytes(range(1, 256)) * 4112
    image = Patched(qemu_convert(tmp_path, disk[:MiB], "-o", "cluster_size=512"))
    image.bytes += bytes(64 * MiB)
    end = len(image.bytes) - 64 * MiB
    # L2 tables of 64 entries; those of the first one lead to places 60 KiB apart.
    for number, entry in enumerate(image.plain):
        image.put64(entry, COPIED | (end + number * 60 * KiB) & ~511)
    reader = BytesReader(image.bytes)
    opened = await open_image(reader, "qcow2")
    await opened.read(0, 32 * KiB)
    assert sum(length for _, length in reader.reads) < 2 * MiB


@pytest.mark.parametrize("kind", ["backing", "extended", "data file"])
async def test_what_qemu_makes_but_this_reader_does_not_know_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "image.qcow2")
    secret = tmp_path / "secret.raw"
    secret.write_bytes(b"secret" * 1000)
    options = {
        "backing": ["-b", str(secret), "-F", "raw"],
        "extended": ["-o", "extended_l2=on"],
        "data file": ["-o", f"data_file={tmp_path / 'data.raw'}"],
    }
    run("qemu-img", "create", "-f", "qcow2", *options[kind], path, "1M")
    error = await refused(Path(path).read_bytes())
    named = {"backing": "backing file", "extended": "subclusters", "data file": "external data file"}
    assert named[kind] in str(error)
    assert "secret.raw" not in str(error)


STRICT: dict[str, tuple[Patch, str]] = {
    "L1 not used once": (lambda image: image.put64(image.l1, image.l2), "used once"),
    "L2 not used once": (lambda image: image.put64(image.plain[0], image.u64(image.plain[0]) & ~COPIED), "used once"),
    "a length of part of a cluster": (lambda image: image.bytes.extend(b"x"), "not whole clusters"),
}


@pytest.mark.parametrize("name", STRICT)
async def test_strict_refuses_what_our_encoder_never_writes(plain_image: bytes, name: str) -> None:
    patch, message = STRICT[name]
    image = Patched(plain_image)
    patch(image)
    assert await content(await open_image(BytesReader(image.bytes), "qcow2")) == DISK
    assert message in str(await refused(image.bytes, strict=True))


@pytest.fixture(scope="module")
def small_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, ...]:
    disk = mixed_disk(192 * KiB, seed=5)
    folder = tmp_path_factory.mktemp("small")
    kinds = ("-o cluster_size=4k", "-c -o cluster_size=4k", "-c -o cluster_size=4k,compression_type=zstd")
    return tuple(qemu_convert(folder, disk, *kind.split()) for kind in kinds)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.integers(0, 2), strict=st.booleans())
def test_whatever_bytes_are_flipped_it_decodes_or_is_refused(
    small_images: tuple[bytes, ...], data: st.DataObject, kind: int, strict: bool
) -> None:
    """No other exception, no endless work, no memory for what the file does not back."""
    import anyio

    image = Patched(small_images[kind])
    places = st.one_of(
        st.integers(0, 111),
        st.integers(image.l1, image.l1 + 7),
        st.integers(image.l2, image.l2 + 400),
        st.integers(0, len(image.bytes) - 1),
    )
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        image.bytes[place] = value

    async def read() -> None:
        opened = await open_image(BytesReader(image.bytes), "qcow2", strict=strict)
        for start in (0, max(0, opened.size - MiB)):
            await opened.read(start, min(MiB, opened.size - start))
        if opened.size <= GiB:
            async for extent in opened.extents(0, opened.size):
                assert extent.length > 0

    with bounded(), suppress(FormatError):
        anyio.run(read)


@settings(max_examples=200, deadline=None)
@example(b"")
@given(st.binary(max_size=300))
def test_any_bytes_at_all_are_refused(junk: bytes) -> None:
    import anyio

    async def read() -> None:
        await open_image(BytesReader(b"QFI\xfb" + junk), "qcow2")

    with bounded(), pytest.raises(FormatError):
        anyio.run(read)
