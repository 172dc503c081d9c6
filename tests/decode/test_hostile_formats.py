"""Attacks on the readers of VHD, VMDK, VHDX, OVA and GCE, and fuzzing of every reader and checker.

The classes are those of known weaknesses: paths in descriptors, huge counts, tables shared by many entries, bombs,
truncation, and archives with odd headers.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import time
import uuid
import zlib
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import FormatError
from pipeline.units import GiB, KiB, MiB, TiB
from stages.decode.check.checking import check
from stages.decode.opening import open_image
from stages.decode.probing import probe_format
from stages.decode.refusal import UnsupportedError
from tests.decode.images import BytesReader, mixed_disk
from tests.decode.made import bounded, made_by_qemu, made_gce, made_stream, made_tar, read_all, refused
from tests.decode.mutations import good_images, grains, signed, signed_header

SECRET = "/etc/passwd"


def descriptor(*extents: str, create_type: str = "monolithicFlat") -> bytes:
    lines = "\n".join(extents)
    head = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
    return f'{head}createType="{create_type}"\n{lines}\n'.encode()


@pytest.mark.parametrize(
    "name", [SECRET, "../../etc/passwd", "..", ".", "", "a/b", "..\\x", "json:{}", "nbd://host/x", "image\0/etc"]
)
async def test_a_path_in_a_descriptor_is_never_opened(name: str) -> None:
    """Without named extents the disk is refused; with them, a name only ever selects among what was named."""
    text = descriptor(f'RW 8 FLAT "{name}" 0')
    error = await refused(text, "vmdk")
    assert isinstance(error, UnsupportedError) or "extent" in str(error)
    decoy = BytesReader(bytes(4096))
    error = await refused(text, "vmdk", extents={"image": decoy})
    assert decoy.reads == []


@pytest.mark.parametrize("kind", ["VMFSSPARSE", "VMFSRDM", "VMFSRAW", "SESPARSE", "PARTITIONED", "NONSENSE"])
async def test_other_kinds_of_extents_are_refused_by_name(kind: str) -> None:
    error = await refused(descriptor(f'RW 8 {kind} "image"'), "vmdk", extents={"image": BytesReader(bytes(4096))})
    assert kind in str(error)


async def test_extents_that_are_too_short_or_lie_are_refused(tmp_path: Path) -> None:
    error = await refused(descriptor('RW 9 FLAT "image" 0'), "vmdk", extents={"image": BytesReader(bytes(4096))})
    assert "ends early" in str(error)
    error = await refused(descriptor('RW 8 FLAT "i" 9999999999999999999'), "vmdk", extents={"i": BytesReader(b"")})
    assert "not possible" in str(error)
    small, _, _ = made_by_qemu(tmp_path, mixed_disk(MiB), "vmdk")
    error = await refused(descriptor('RW 9999 SPARSE "i"'), "vmdk", extents={"i": BytesReader(small)})
    assert "its descriptor says" in str(error)
    many = descriptor(*(f'RW 8 ZERO "{number}"' for number in range(5000)))
    assert "5000 extents" in str(await refused(many, "vmdk"))
    assert "larger than any" in str(await refused(descriptor() + b"#" * 2 * MiB, "vmdk"))


async def test_one_extent_file_alone_says_that_its_descriptor_is_wanted(tmp_path: Path) -> None:
    _, extents, _ = made_by_qemu(tmp_path, mixed_disk(MiB), "vmdk", "subformat=twoGbMaxExtentSparse")
    error = await refused(next(iter(extents.values())), "vmdk")
    assert "descriptor in another file" in str(error)


def stream_with(payload: bytes) -> bytes:
    """A streamOptimized VMDK whose first grain is `payload`."""
    image = bytearray(made_stream(mixed_disk(256 * KiB)))
    at = grains(image)[0]
    tail = bytes(image[-1536:])
    del image[-1536:]
    place = len(image) // 512
    image += struct.pack("<QI", 0, len(payload)) + payload
    image += bytes(-len(image) % 512)
    struct.pack_into("<I", image, at, place)
    return bytes(image) + tail


@pytest.mark.parametrize("missing", [1, 4])
async def test_a_grain_without_its_checksum_is_refused(missing: int) -> None:
    """All of its bytes are there, and nothing proves them."""
    packed = zlib.compress(mixed_disk(64 * KiB), 9)
    assert "ends early" in str(await refused(stream_with(packed[:-missing]), "vmdk"))


@pytest.mark.parametrize("length", [0, 1, 64 * KiB - 1, 64 * KiB + 1, 64 * MiB])
async def test_a_grain_that_unpacks_to_another_size_is_refused(length: int) -> None:
    """64 MiB in 64 KiB is a bomb: it must not be unpacked."""
    error = await refused(stream_with(zlib.compress(bytes(length), 9)), "vmdk")
    assert "unpack" in str(error) or "ends early" in str(error)
    good = stream_with(zlib.compress(bytes(64 * KiB), 9))
    assert await (await open_image(BytesReader(good), "vmdk", strict=True)).read(0, 64 * KiB) == bytes(64 * KiB)


async def test_a_small_vmdk_of_petabytes_with_one_table_is_refused_in_time() -> None:
    """A directory whose entries all lead to one table, whose entries all lead to one grain."""
    entries = 1 << 17
    capacity = entries * 512 * 128
    image = bytearray(MiB + 4096 + 64 * KiB)
    text = descriptor(f'RW {capacity} SPARSE "i"', create_type="monolithicSparse")
    struct.pack_into("<4sIIQQQQIQQQ", image, 0, b"KDMV", 1, 3, capacity, 128, 1, 20, 512, 0, 24, 64)
    image[72:79] = b"\0\n \r\n\0\0"
    image[512 : 512 + len(text)] = text
    directory = 24 * 512
    table = (directory + entries * 4 + 511) // 512
    image[directory : directory + entries * 4] = struct.pack("<I", table) * entries
    image += bytes(table * 512 + 2048 + 64 * KiB)
    struct.pack_into("<512I", image, table * 512, *([table + 4] * 512))
    error = await refused(image, "vmdk")
    assert "overlap" in str(error) or "more grain tables" in str(error)
    begun = time.process_time()
    assert (await check(BytesReader(image), "vmdk")).verdict == "corrupt"
    assert time.process_time() - begun < 2


async def test_a_small_vhd_whose_entries_lead_to_one_block_is_refused_in_time(tmp_path: Path) -> None:
    image = bytearray(made_by_qemu(tmp_path, mixed_disk(3 * MiB), "vhd")[0])
    entry = image[1536:1540]
    tail = bytes(image[-512:])
    image[-512:] = entry * 200_000
    table = len(image) - 800_000 - (len(image) - 800_000) % 512
    image[table : table + 800_000] = entry * 200_000
    image += bytes(-len(image) % 512) + tail
    import tests.decode.mutations as changes

    signed(changes.be64(48, 390 * GiB))(image)
    signed_header(changes.be64(16, table), changes.be32(28, 200_000))(image)
    assert "overlap" in str(await refused(image, "vhd"))
    report = await check(BytesReader(image), "vhd")
    assert report.verdict == "corrupt"
    assert len(report.findings) < 100


async def test_every_image_cut_anywhere_is_refused_or_was_not_needed(tmp_path: Path) -> None:
    """Truncation never turns into zeros."""
    disk = mixed_disk(MiB + 512, seed=6)
    for base, options in (("vhd", "force_size=on"), ("vmdk", ""), ("vhdx", "block_size=1M"), ("vmdk", "stream")):
        image = made_stream(disk) if options == "stream" else made_by_qemu(tmp_path, disk, base, options)[0]
        for part in range(40):
            end = len(image) * part // 40
            try:
                opened = await open_image(BytesReader(image[:end]), base)
                assert await opened.read(0, len(disk)) == disk
            except FormatError:
                continue


async def test_a_gzip_bomb_is_unpacked_only_as_far_as_it_is_read() -> None:
    """1 MiB that holds 1 GiB of zeros: opening unpacks the first header, not the disk."""
    info = tarfile.TarInfo("disk.raw")
    info.size = GiB
    packer = zlib.compressobj(9, wbits=31)
    made = packer.compress(info.tobuf(format=tarfile.GNU_FORMAT)) + packer.flush(zlib.Z_FULL_FLUSH)
    image = made + (packer.compress(bytes(MiB)) + packer.flush(zlib.Z_FULL_FLUSH)) * 1024
    assert len(image) < 1.2 * MiB
    begun = time.process_time()
    opened = await open_image(BytesReader(image), "gce")
    assert time.process_time() - begun < 0.2
    assert await opened.read(0, MiB) == bytes(MiB)
    info.size = 8 * TiB
    lying = gzip.compress(info.tobuf(format=tarfile.GNU_FORMAT) + bytes(MiB), mtime=0)
    assert "behind the end" in str(await refused(lying, "gce"))


async def test_streams_of_tiny_or_empty_gzip_members_cost_no_endless_time() -> None:
    archive = made_tar({"disk.raw": bytes(40 * 512)}, format=tarfile.GNU_FORMAT)
    tiny = b"".join(gzip.compress(archive[at : at + 1], mtime=0) for at in range(len(archive)))
    assert await read_all(BytesReader(tiny), "gce") == 40 * 512
    empty = gzip.compress(archive[:700], mtime=0) + gzip.compress(b"") * 45_000
    assert "empty members" in str(await refused(empty, "gce"))


def old_sparse(fields: bytes, size: int, *, more: bytes = b"", extended: int = 0) -> bytes:
    info = tarfile.TarInfo("disk.raw")
    info.size = size
    header = bytearray(info.tobuf(format=tarfile.GNU_FORMAT))
    header[156] = ord("S")
    header[386 : 386 + len(fields)] = fields
    header[482] = extended
    header[483:495] = b"%011o\0" % MiB
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return gzip.compress(bytes(header) + more + bytes(4096), mtime=0)


@pytest.mark.parametrize(
    "image, message",
    [
        (old_sparse(b"%011o\0%011o\0" % (0, 512) + b"%011o\0%011o\0" % (0, 512), 1024), "not in order"),
        (old_sparse(b"%011o\0%011o\0" % (MiB, 512), 512), "not in order"),
        (old_sparse(b"%011o\0%011o\0" % (0, 512), 1024), "contradict"),
        (
            old_sparse(b"%011o\0%011o\0" % (0, 512), 512, more=(bytes(504) + b"\1").ljust(512, b"\0") * 2, extended=1),
            "",
        ),
        (old_sparse(b"\xff" * 24, 512), "negative"),
    ],
)
async def test_hostile_maps_of_sparse_members_are_refused(image: bytes, message: str) -> None:
    error = await refused(image, "gce")
    assert message in str(error)


async def test_endless_chains_of_sparse_records_are_refused_in_time() -> None:
    chain = (bytes(504) + b"\1").ljust(512, b"\0") * 1500
    await refused(old_sparse(b"%011o\0%011o\0" % (0, 512), 512, more=chain, extended=1), "gce")


@pytest.mark.parametrize(
    "record",
    [
        b"99 path=short\n",
        b"0 path=x\n",
        b"path\n",
        b"999999999999999999999 path=x\n",
        b"-9 path=x\n",
        b"22 GNU.sparse.major=1\n",
    ],
)
async def test_hostile_pax_records_are_refused(record: bytes) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        info = tarfile.TarInfo("pax")
        info.type = tarfile.XHDTYPE
        info.size = len(record)
        archive.addfile(info, io.BytesIO(record))
    await refused(made.getvalue() + made_tar({"x.ovf": b"", "x.vmdk": b""}), "ova")


async def test_checksum_at_the_end_of_a_gce_archive_is_compared_with_the_last_read() -> None:
    """The disk ends before the archive does, and its reader asks for no more."""
    disk = mixed_disk(MiB)
    image = bytearray(made_gce(disk))
    assert await read_all(BytesReader(image), "gce") == len(disk)
    image[-8] ^= 1
    assert "damaged" in str(await refused(image, "gce"))
    assert "cut short" in str(await refused(made_gce(disk)[:-1], "gce"))


async def test_newer_of_two_vhdx_headers_counts(images: dict[str, bytes]) -> None:
    """A writer that was killed leaves an old header, with a log that was replayed since, or a new one with a log."""
    import tests.decode.mutations as changes

    places = (64 * KiB, 128 * KiB)
    for newer, older in (places, places[::-1]):
        for at, ends in ((older, True), (newer, False)):
            image = bytearray(images["vhdx"])
            changes.x_header(changes.le64(8, 9), which=(newer,))(image)
            changes.x_header(changes.le64(8, 8), which=(older,))(image)
            changes.x_header(lambda raw: raw.__setitem__(slice(48, 64), b"l" * 16), which=(at,))(image)
            if ends:
                await read_all(BytesReader(image), "vhdx")
            else:
                assert "log" in str(await refused(image, "vhdx"))


async def test_parent_locator_of_a_vhdx_is_a_parent_whatever_its_flags_say(images: dict[str, bytes]) -> None:
    import tests.decode.mutations as changes

    image = bytearray(images["vhdx"])
    table = changes.x_metadata(image)
    (count,) = struct.unpack_from("<H", image, table + 10)
    locator = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
    struct.pack_into("<H", image, table + 10, count + 1)
    image[table + 32 + count * 32 : table + 64 + count * 32] = locator + struct.pack("<IIII", 64 * KiB, 20, 4, 0)
    assert "a parent image" in str(await refused(image, "vhdx"))


async def test_block_of_a_vhdx_inside_of_its_header_is_refused(images: dict[str, bytes]) -> None:
    import tests.decode.mutations as changes

    image = bytearray(images["vhdx"])
    changes.x_bat(0, lambda _: 6)(image)
    assert "outside" in str(await refused(image, "vhdx"))


async def test_an_archive_of_very_many_members_is_refused() -> None:
    error = await refused(made_tar({f"{number}": b"" for number in range(1100)}), "ova")
    assert "1024 members" in str(error)


BASES = ("qcow2", "qcow2 packed", "vhd", "vhd fixed", "vmdk", "vmdk stream", "vhdx", "ova", "gce")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return good_images(tmp_path_factory.mktemp("good"))


# Where the tables are: begin, end, and for VHDX header, regions, metadata and block table.
HOT = [0, 512, 1024, 1536, 64 * KiB, 128 * KiB, 192 * KiB, 256 * KiB, 2 * MiB, 2 * MiB + 64 * KiB, 3 * MiB, 4 * MiB]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), base=st.sampled_from(BASES), strict=st.booleans())
def test_whatever_is_changed_it_decodes_or_is_refused(
    images: dict[str, bytes], data: st.DataObject, base: str, strict: bool
) -> None:
    """No other exception from reader, checker or probe, time and memory as a small file may take, no read outside."""
    image = bytearray(images[base])
    places = st.one_of(
        st.integers(0, 120),
        st.builds(lambda hot, more: (hot + more) % len(image), st.sampled_from(HOT), st.integers(0, 200)),
        st.integers(max(0, len(image) - 2048), len(image) - 1),
        st.integers(0, len(image) - 1),
    )
    values = st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF])
    for place, value, count in data.draw(
        st.lists(st.tuples(places, values, st.sampled_from([1, 1, 2, 4, 8])), min_size=1, max_size=4)
    ):
        image[place : place + count] = bytes([value]) * min(count, len(image) - place)
    if data.draw(st.booleans()):
        resigned(image, base)
    if data.draw(st.integers(0, 5)) == 0:
        del image[data.draw(st.integers(0, len(image))) :]
    anyio.run(survive, bytes(image), base.split()[0], strict)


def resigned(image: bytearray, base: str) -> None:
    """Make checksums right again, so that what lies behind them is reached."""
    import tests.decode.mutations as changes

    if base == "vhd":
        signed()(image)
        signed_header()(image)
    elif base == "vhd fixed":
        signed(copy=False)(image)
    elif base == "vhdx":
        changes.x_header(lambda _: None)(image)
        changes.x_region(lambda _: None)(image)
    elif base == "ova":
        changes.tar_header(0, lambda _: None)(image)


async def survive(image: bytes, format: str, strict: bool) -> None:
    reader = BytesReader(image)
    with bounded(), suppress(FormatError):
        opened = await open_image(reader, format, strict=strict)
        for start in (0, max(0, opened.size - MiB)):
            await opened.read(start, min(MiB, opened.size - start))
        if opened.size <= GiB:
            async for extent in opened.extents(0, opened.size):
                assert extent.length > 0
    with bounded(), suppress(UnsupportedError):
        report = await check(reader, format)
        assert report.is_complete or report.verdict == "corrupt"
    with bounded(), suppress(FormatError):
        await probe_format(reader)
    for offset, length in reader.reads:
        assert offset >= 0
        assert offset + length <= len(image)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["vhd", "vmdk", "vhdx", "ova", "gce"]), st.binary(max_size=600))
def test_any_bytes_at_all_are_refused(format: str, junk: bytes) -> None:
    anyio.run(survive, junk, format, False)
    magics = {"vhd": b"conectix", "vmdk": b"KDMV", "vhdx": b"vhdxfile", "ova": b"", "gce": b"\x1f\x8b\x08"}
    anyio.run(survive, magics[format] + junk, format, False)


async def test_a_good_gce_image_is_the_same_whoever_asks_in_what_order() -> None:
    """Several windows in flight, as verification has them."""
    disk = mixed_disk(16 * MiB, seed=4)
    opened = await open_image(BytesReader(made_gce(disk, member=MiB)), "gce")
    found: dict[int, bytes] = {}

    async def load(start: int) -> None:
        found[start] = await opened.read(start, 2 * MiB)

    async with anyio.create_task_group() as tasks:
        for start in (2 * MiB, 0, 6 * MiB, 4 * MiB, 14 * MiB, 8 * MiB, 12 * MiB, 10 * MiB):
            tasks.start_soon(load, start)
    assert b"".join(found[start] for start in sorted(found)) == disk
