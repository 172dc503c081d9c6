"""Partition tables and every legal cut of them, held against sfdisk and sgdisk."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError, PlanError
from pipeline.units import GiB, KiB, MiB
from stages.disk.cuts import Cut, cut_disk, guide_count
from stages.disk.tables import DISK_ID_AT, ENTRIES_AT, PartitionTable, read_table
from stages.store.file import open_file_reader
from tests.disk.making import blank, need, run
from tests.disk.memory import Memory

LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


async def table_of(image: Path, sector_size: int | None = None) -> PartitionTable:
    async with open_file_reader(image) as reader:
        return await read_table(reader, reader.size, sector_size=sector_size)


def apply(image: Path, cut: Cut) -> Path:
    """The image that a cut describes."""
    made = blank(image.with_suffix(".cut"), cut.size)
    with image.open("rb") as source, made.open("r+b") as target:
        position = 0
        for offset, length in (*cut.skipped, (cut.copied, 0)):
            # Sparse: only what the tests write is there.
            while position < offset:
                source.seek(position)
                data = source.read(min(MiB, offset - position))
                if data.count(0) != len(data):
                    target.seek(position)
                    target.write(data)
                position += len(data)
            position = offset + length
        for overlay in cut.overlays:
            target.seek(overlay.offset)
            target.write(overlay.data)
    return made


def sfdisk(image: Path) -> dict[str, Any]:
    """The table as sfdisk reads it."""
    done = subprocess.run(["/usr/sbin/sfdisk", "-J", image], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)["partitiontable"]
    return found


def numbered(table: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Partitions by number, without their device names."""
    found = {}
    for one in table.get("partitions", []):
        digits = one["node"][len(one["node"].rstrip("0123456789")) :]
        found[int(digits)] = {key: value for key, value in one.items() if key != "node"}
    return found


async def check_cut(image: Path, table: PartitionTable, cut: Cut) -> None:
    """The tools read the cut image without complaint, and see what was kept exactly as it was."""
    made = apply(image, cut)
    before, after = sfdisk(image), sfdisk(made)
    assert after["id"].lower() == before["id"].lower()
    kept = numbered(after)
    extended = {one.number for one in table.partitions if one.is_extended}
    for number, one in numbered(before).items():
        if number in cut.kept:
            assert kept.pop(number) == one
        elif number in extended and number in kept:
            assert kept.pop(number)["start"] == one["start"]
    assert kept == {}
    assert made.open("rb").read(DISK_ID_AT) == image.open("rb").read(DISK_ID_AT)
    if table.gpt is not None:
        assert "No problems found" in run("sgdisk", "-v", made)
    else:
        out = run("sfdisk", "-V", made)
        assert "No errors detected" in out, out
    again = await table_of(made)
    assert again.problems == ()
    assert tuple(one.number for one in again.partitions if not one.is_extended) == cut.kept
    made.unlink()


GUIDE = [(0x80, 0x83, 2048, 41945087), (0, 0x82, 41945088, 46123007), (0, 0x83, 46123008, 88066047)]
GUIDE_END = (0, 0x8E, 88066048, 2919910139)


def mbr(entries: list[tuple[int, int, int, int]], signature: int = 0x0008F290) -> bytes:
    """A boot record; entries are (flag, type, first, last) in sectors."""
    made = bytearray(512)
    struct.pack_into("<I", made, DISK_ID_AT, signature)
    for slot, (flag, kind, first, last) in enumerate(entries):
        struct.pack_into("<B3xB3xII", made, ENTRIES_AT + 16 * slot, flag, kind, first, last - first + 1)
    made[510:] = b"\x55\xaa"
    return bytes(made)


async def test_the_guides_own_example_is_20481_mib() -> None:
    disk = Memory(1494996746240, {0: mbr([*GUIDE, GUIDE_END])})
    table = await read_table(disk, disk.size)
    assert (table.kind, table.problems, table.disk_signature) == ("mbr", (), "0008f290")
    count = guide_count(table, 1)
    assert (count.size, count.mib, count.last_sector) == (21475885056, 20481, 41945087)
    assert count.command == "bs=1M count=20481"
    assert "bs=1K count=20481M" in count.trap
    cut = cut_disk(table, through=1)
    assert (cut.size, cut.copied, cut.kept, cut.dropped) == (21475885056, 21475885056, (1,), (2, 3, 4))
    assert cut_disk(table, through=1, alignment=GiB).size == 21 * GiB
    assert table.partitions[0].bootable
    assert table.partitions[0].uuid == "0008f290-01"


async def test_a_dropped_partition_between_kept_ones_reads_as_zero() -> None:
    disk = Memory(1494996746240, {0: mbr([*GUIDE, GUIDE_END])})
    cut = cut_disk(await read_table(disk, disk.size), partitions=[1, 3])
    assert cut.skipped == ((41945088 * 512, 4177920 * 512),)
    assert (cut.kept, cut.dropped) == ((1, 3), (2, 4))


async def test_everything_of_an_aligned_disk_is_left_as_it_is(tmp_path: Path) -> None:
    need("sgdisk")
    image = blank(tmp_path / "disk", 100 * MiB)
    run("sgdisk", "-n", "1:0:0", image)
    cut = cut_disk(await table_of(image))
    assert (cut.size, cut.copied, cut.overlays) == (100 * MiB, 100 * MiB, ())


async def test_a_disk_that_grows_gets_its_backup_gpt_at_the_new_end(tmp_path: Path) -> None:
    need("sgdisk")
    image = blank(tmp_path / "disk", 100 * MiB + 5 * 512)
    run("sgdisk", "-n", "1:0:0", "-A", "1:set:2", "-c", "1:Wurzel", image)
    table = await table_of(image)
    cut = cut_disk(table, alignment=GiB)
    assert cut.size == GiB
    await check_cut(image, table, cut)


def _layout_gpt(dice: random.Random) -> tuple[str, int]:
    """sfdisk's script for a random GPT whose numbers are out of order, and the disk's size."""
    lines = ["label: gpt"]
    position = 2048
    numbers = dice.sample(range(1, 20), dice.randint(1, 6))
    for number in numbers:
        position += dice.choice([0, 0, 1, 2048, 5000])
        length = dice.randint(1, 9000)
        lines.append(
            f"{number}: start={position}, size={length}, type={LINUX}, name=p{number}"
            + dice.choice(["", ", attrs=LegacyBIOSBootable"])
        )
        position += length
    return "\n".join(lines) + "\n", (position + dice.choice([34, 2048, 9001])) * 512


def _write_mbr(image: Path, dice: random.Random) -> None:
    """A random MBR whose slots are out of order, often with logical partitions; sfdisk writes only tidy ones."""
    entries = [(0, 0, 0, -1)] * 4
    slots = dice.sample(range(4), dice.randint(1, 4))
    box = dice.choice([None, *slots])
    records: dict[int, bytes] = {}
    position = 2048
    for slot in slots:
        position += dice.choice([0, 7, 2048])
        begin = position
        if slot == box:
            logical = []
            for _ in range(dice.randint(1, 5)):
                start = position + dice.choice([1, 63, 2048])
                logical.append((position, start, start + dice.randint(1, 6000)))
                position = logical[-1][2]
            if dice.random() < 0.4:
                rest = logical[1:]
                dice.shuffle(rest)  # the chain then jumps back and forth
                logical[1:] = rest
            for (here, start, end), following in zip(logical, [*logical[1:], None], strict=True):
                chained = [(0, 0x83, start - here, end - here - 1)]
                if following is not None:
                    chained.append((0, 5, following[0] - begin, following[2] - begin - 1))
                records[here] = mbr(chained, 0)
            position += dice.choice([0, 100])
            entries[slot] = (0, dice.choice([0x5, 0xF, 0x85]), begin, position - 1)
        else:
            position += dice.randint(1, 9000)
            entries[slot] = (dice.choice([0, 0x80]) if slot == slots[0] else 0, 0x83, begin, position - 1)
    blank(image, (position + dice.choice([0, 34, 2048])) * 512)
    with image.open("r+b") as file:
        for sector, record in {0: mbr(entries, dice.getrandbits(32) | 1), **records}.items():
            file.seek(sector * 512)
            file.write(record)


def _is_legal(table: PartitionTable, asked: dict[str, Any]) -> bool:
    """Whether a cut breaks no partition and leaves every kept one its number."""
    plain = [one for one in table.partitions if not one.is_extended]
    ends = {one.number: one.end for one in table.partitions}
    if not {"partitions", "through", "stop"} & set(asked):
        return True
    if "partitions" in asked:
        kept = set(asked["partitions"])
        end = max(ends[number] for number in kept)
    else:
        end = asked["stop"] if "stop" in asked else ends[asked["through"]]
        kept = {one.number for one in plain if one.end <= end}
    logical = [record.number for record in table.boot_records if record.number]
    dropped_at = next((place for place, number in enumerate(logical) if number not in kept), len(logical))
    return (
        end <= table.disk_size
        and not any(one.start < end < one.end for one in plain)
        and not kept & set(logical[dropped_at:])
    )


async def _every_cut(image: Path, table: PartitionTable, dice: random.Random) -> int:
    """Try every cut through a partition, and some sets and sizes; checks those that are legal, counts them."""
    numbers = [one.number for one in table.partitions]
    plain = [one.number for one in table.partitions if not one.is_extended]
    asked: list[dict[str, Any]] = [{"through": number} for number in numbers]
    asked += [{"partitions": dice.sample(plain, dice.randint(1, len(plain)))} for _ in range(3)]
    asked += [{"stop": dice.choice([one.end for one in table.partitions]) + dice.choice([0, 512 * 100])}]
    asked += [{"alignment": 1}, {"size_min": table.disk_size + 7 * MiB}]
    done = 0
    for one in asked:
        cut = None
        with suppress(PlanError):
            cut = cut_disk(table, **one)
        assert (cut is not None) == _is_legal(table, one), one
        if cut is None:
            continue
        for number in {one["through"]} & set(plain) if "through" in one else one.get("partitions", ()):
            assert number in cut.kept
        await check_cut(image, table, cut)
        done += 1
    return done


@pytest.mark.parametrize(
    "label, seed",
    [
        *((label, seed) for label in ("gpt", "mbr") for seed in range(12)),
        ("hybrid", 0),
        *(pytest.param("hybrid", seed, marks=pytest.mark.slow) for seed in range(1, 8)),
    ],
)
async def test_every_legal_cut_of_a_random_disk_satisfies_the_tools(label: str, seed: int, tmp_path: Path) -> None:
    need("sfdisk", "sgdisk")
    dice = random.Random(f"{label} {seed}")
    image = tmp_path / "disk"
    if label != "mbr":
        script, size = _layout_gpt(dice)
        run("sfdisk", "-q", "--no-reread", "--wipe", "never", blank(image, size), text=script)
        if label == "hybrid":
            numbers = list(numbered(sfdisk(image)))
            chosen = dice.sample(numbers, dice.randint(1, min(3, len(numbers))))
            run("sgdisk", "-h", ":".join(map(str, chosen)), image)
    else:
        _write_mbr(image, dice)
        assert "No errors detected" in run("sfdisk", "-V", image)
    with image.open("r+b") as file:
        file.write(b"\xeb\x63boot code")
    table = await table_of(image)
    assert (table.kind, table.problems) == (label, ())
    assert table.boot_code
    theirs = sfdisk(image)
    ours = {
        one.number: (one.start // 512, one.length // 512, one.name, one.bootable and not one.attributes)
        for one in table.partitions
    }
    assert ours == {
        number: (one["start"], one["size"], one.get("name", ""), one.get("bootable", False))
        for number, one in numbered(theirs).items()
    }
    assert await _every_cut(image, table, dice) >= 3


async def test_a_hybrid_keeps_the_entries_of_kept_partitions(tmp_path: Path) -> None:
    need("sgdisk")
    image = blank(tmp_path / "disk", 64 * MiB)
    run("sgdisk", "-n", "1:2048:+8M", "-n", "2:0:+8M", "-n", "3:0:+8M", "-h", "1:3", image)
    table = await table_of(image)
    assert table.kind == "hybrid"
    assert [one.number for one in table.partitions] == [1, 2, 3]
    cut = cut_disk(table, through=2)
    made = apply(image, cut)
    assert "No problems found" in run("sgdisk", "-v", made)
    after = await table_of(made)
    assert after.kind == "hybrid"
    assert [one.number for one in after.partitions] == [1, 2]


async def test_a_gpt_of_4096_byte_sectors_is_found_and_cut() -> None:
    sector, size = 4096, 100 * MiB
    last = size // sector - 1
    entries = bytearray(16384)
    struct.pack_into("<16s16sQQQ72s", entries, 0, b"t" * 16, b"u" * 16, 256, 511, 0, "root".encode("utf-16-le"))
    struct.pack_into("<16s16sQQQ72s", entries, 128, b"t" * 16, b"v" * 16, 512, 1023, 0, b"")

    def header(mine: int, other: int, array: int) -> bytes:
        places = (mine, other, 6, last - 5, b"d" * 16, array)
        made = bytearray(struct.pack("<8sIIIIQQQQ16sQ", b"EFI PART", 65536, 92, 0, 0, *places))
        made += struct.pack("<III", 128, 128, zlib.crc32(entries))
        struct.pack_into("<I", made, 16, zlib.crc32(made))
        return bytes(made)

    disk = Memory(
        size,
        {
            0: mbr([(0, 0xEE, 1, last)]),
            sector: header(1, last, 2),
            2 * sector: bytes(entries),
            (last - 4) * sector: bytes(entries),
            last * sector: header(last, 1, last - 4),
        },
    )
    table = await read_table(disk, size)
    assert (table.kind, table.sector_size, table.problems, table.backup_is_sound) == ("gpt", 4096, (), True)
    assert [(one.start, one.length) for one in table.partitions] == [(MiB, MiB), (2 * MiB, 2 * MiB)]
    cut = cut_disk(table, through=1)
    assert cut.size == 3 * MiB
    made = Memory(cut.size, {one.offset: one.data for one in cut.overlays})
    again = await read_table(made, cut.size)
    assert (again.problems, again.backup_is_sound, len(again.partitions)) == ((), True, 1)


async def test_a_primary_gpt_that_is_damaged_is_replaced_by_the_backup(tmp_path: Path) -> None:
    need("sgdisk")
    image = blank(tmp_path / "disk", 64 * MiB)
    run("sgdisk", "-n", "1:2048:+8M", "-n", "2:0:+8M", image)
    with image.open("r+b") as file:
        file.seek(512 + 50)
        file.write(b"\xff")
    table = await table_of(image)
    assert [one.number for one in table.partitions] == [1, 2]
    assert any("primary GPT is not sound" in problem for problem in table.problems)
    made = apply(image, cut_disk(table, through=1))
    assert "No problems found" in run("sgdisk", "-v", made)


async def test_a_gpt_that_can_not_be_read_is_called_protective(tmp_path: Path) -> None:
    need("sgdisk")
    image = blank(tmp_path / "disk", 64 * MiB)
    run("sgdisk", "-n", "1:2048:+8M", image)
    with image.open("r+b") as file:
        for at in (512, 64 * MiB - 512):
            file.seek(at + 20)
            file.write(b"\xff")
    table = await table_of(image)
    assert (table.kind, table.partitions) == ("protective", ())
    with pytest.raises(PlanError, match="GPT can't be read"):
        cut_disk(table, stop=MiB)


async def test_a_cut_through_a_partition_names_the_smallest_that_works() -> None:
    disk = Memory(1494996746240, {0: mbr([*GUIDE, GUIDE_END])})
    table = await read_table(disk, disk.size)
    with pytest.raises(PlanError, match="goes through partition 2") as caught:
        cut_disk(table, stop=21475885056 + 512)
    assert "through = 2" in caught.value.hint
    with pytest.raises(PlanError, match="no partition 7"):
        cut_disk(table, through=7)


async def test_a_logical_partition_can_not_be_dropped_before_a_kept_one(tmp_path: Path) -> None:
    need("sfdisk")
    image = blank(tmp_path / "disk", 64 * MiB)
    script = "label: dos\n1: start=2048, size=20000, type=5\n" + "".join(
        f"{number}: start={4096 + (number - 5) * 4000}, size=1000, type=83\n" for number in (5, 6, 7)
    )
    run("sfdisk", "-q", "--no-reread", image, text=script)
    table = await table_of(image)
    with pytest.raises(PlanError, match="partition 6 would get another number") as caught:
        cut_disk(table, partitions=[6])
    assert "[5, 6]" in caught.value.hint


async def test_a_chain_that_loops_is_a_problem_not_a_hang() -> None:
    ebr = mbr([(0, 0x83, 1, 10), (0, 5, 0, 99)])
    disk = Memory(100 * MiB, {0: mbr([(0, 5, 2048, 100000)]), 2048 * 512: ebr})
    table = await read_table(disk, disk.size)
    assert [one.number for one in table.partitions] == [1, 5]
    assert any("loops" in problem for problem in table.problems)
    with pytest.raises(PlanError, match="damaged"):
        cut_disk(table, through=5)


async def test_overlapping_partitions_are_a_problem() -> None:
    disk = Memory(100 * MiB, {0: mbr([(0, 0x83, 2048, 10000), (0, 0x83, 9000, 20000), (0, 0x83, 200000, 900000)])})
    table = await read_table(disk, disk.size)
    assert any("1 and 2 overlap" in problem for problem in table.problems)
    assert any("behind the end" in problem for problem in table.problems)


@pytest.mark.parametrize("kind", ["12", "32"])
async def test_a_filesystem_on_the_whole_disk_is_no_partition_table(kind: str, tmp_path: Path) -> None:
    need("mkfs.fat")
    image = blank(tmp_path / "disk", 64 * MiB if kind == "32" else 4 * MiB)
    run("mkfs.fat", "-F", kind, image)
    assert (await table_of(image)).kind == "none"


async def test_a_gpt_that_an_mbr_has_replaced_is_not_in_force(tmp_path: Path) -> None:
    need("sgdisk")
    image = blank(tmp_path / "disk", 64 * MiB)
    run("sgdisk", "-n", "1:2048:+8M", image)
    with image.open("r+b") as file:
        file.write(mbr([(0, 0x83, 4096, 9000)]))
    table = await table_of(image)
    assert (table.kind, table.partitions[0].start) == ("mbr", 4096 * 512)


sector_numbers = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2048, 4096]))
entry = st.tuples(
    st.sampled_from([0, 0x80]), st.sampled_from([0, 5, 0xF, 0x83, 0xEE, 0x82]), sector_numbers, sector_numbers
)


def _record(entries: list[tuple[int, int, int, int]]) -> bytes:
    made = bytearray(512)
    for slot, (flag, kind, first, count) in enumerate(entries):
        struct.pack_into("<B3xB3xII", made, ENTRIES_AT + 16 * slot, flag, kind, first, count)
    made[510:] = b"\x55\xaa"
    return bytes(made)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.tuples(st.integers(0, 300), st.lists(entry, max_size=4)), max_size=12),
    head=st.lists(entry, min_size=1, max_size=4),
    gpt=st.binary(max_size=120),
)
async def test_any_table_gives_an_answer_in_bounded_time(
    records: list[tuple[int, list[tuple[int, int, int, int]]]], head: list[tuple[int, int, int, int]], gpt: bytes
) -> None:
    parts = {at * 512: _record(entries) for at, entries in records} | {0: _record(head)}
    if gpt:
        parts[512] = (b"EFI PART" + gpt).ljust(512, b"\0")
    disk = Memory(200 * KiB, parts)
    table = await read_table(disk, disk.size)
    assert disk.bytes_read < MiB
    for one in table.partitions:
        try:
            cut = cut_disk(table, through=one.number)
        except PipelineError:
            continue
        assert cut.copied <= disk.size
        assert cut.copied <= cut.size
        assert all(before.end <= after.offset for before, after in zip(cut.overlays, cut.overlays[1:], strict=False))
