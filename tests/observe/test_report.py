"""The page of a run: what it says, that it loads nothing, and that it fails no run."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import FormatError
from pipeline.flow.items import Why
from pipeline.flow.series import Series
from pipeline.observe.drawing import nice_rate
from pipeline.observe.page import page
from pipeline.observe.record import columns, intervals, record_of
from pipeline.units import GiB, MiB
from tests.observe.runs import SIZE, disk_runs, manifest, recorded

VOID = {"meta", "link", "br"}
HOSTILE = '"><script>alert(1)</script><img src="https://evil.example/x.png" onerror=alert(1)>&{x}'


def replaced(record: Any, **changes: Any) -> Any:
    """A record with values of any type, as a file may hold them."""
    return dataclasses.replace(record, **changes)


class Reader(HTMLParser):
    """Every tag and attribute of a page, and whether each opened tag was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(**changes: Any) -> Reader:
    reader = Reader(page(record_of(manifest(**changes), where="x")))
    assert reader.open == []
    return reader


def test_the_page_says_what_a_person_wants_to_know() -> None:
    text = read().text
    for said in (
        "Verified: identical",
        "/dev/sda",
        "s3://images/web01.qcow2",
        "42949672960 bytes",
        "write.s3 was the bottleneck: busy 93% of the time.",
        "1 min 00 s transfer, 15.0 s verification",
        "Written zeros",
        "Partition 1: ext4, root",
        "Partition 2: swap",
        "readback: identical, all of the disk compared",
        "xxh3-128 9f86d081884c7d659a2feaa0c55ad015",
        "crc64nvme, of the store q83vEjRWeJA=",
        "put_part: 503 SlowDown (attempt 2) 4 times",
        "compression zlib",
        "endpoint https://s3.example.com",
        "manifest not set",
        "isal 1.9.1",
    ):
        assert said in text, said


PROVEN = {"level": "prove", "state": "proven", "coverage": 0.0, "detail": "proven by structure", "evidence": {}}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"state": "stored", "verdicts": ()}, "Stored, not verified"),
        ({"state": "unproven", "verdicts": ()}, "Unproven"),
        ({"state": "proven", "verdicts": (PROVEN,)}, "Proven by itself, not compared with the disk"),
        ({"state": "proven", "verdicts": (PROVEN,)}, "prove: proven"),
    ],
)
def test_the_verdict_claims_no_more_than_was_compared(changes: dict[str, Any], said: str) -> None:
    text = read(**changes).text
    assert said in text
    assert "Verified" not in text
    assert "of the disk compared" not in read(state="proven", verdicts=(PROVEN,)).text
    sample = dict(manifest().verdicts[0], coverage=0.031)
    assert "Verified: identical in the 3.1% that was compared" in read(verdicts=(sample,)).text


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    reader = read()
    assert not {"script", "iframe", "object", "embed", "img"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert [value for name, value in reader.attributes if name == "href"] == ["data:,"]
    assert "url(" not in page(record_of(manifest(), where="x"))
    assert "default-src 'none'" in dict(reader.attributes)["content"]


def test_names_from_the_run_stay_text() -> None:
    """A disk's serial, an object's name, an error: whoever chose them does not write the page."""
    plain = manifest()
    hostile = read(
        name=HOSTILE,
        bottleneck=HOSTILE,
        created=HOSTILE,
        disk=dataclasses.replace(plain.disk, identity={HOSTILE: HOSTILE, "path": HOSTILE}),
        image=dataclasses.replace(plain.image, uri=HOSTILE, format=HOSTILE, order=HOSTILE),
        options={HOSTILE: {HOSTILE: HOSTILE}, "a.b": {}},
        versions={HOSTILE: HOSTILE},
        receipt=((HOSTILE, HOSTILE, HOSTILE),),
        verdicts=(dict(plain.verdicts[0], level=HOSTILE, detail=HOSTILE, evidence={HOSTILE: HOSTILE}, state=HOSTILE),),
        timings={HOSTILE: {"working": 1, "in": 0, "out": 0, "buffer": 0}},
        facts={
            "partitions": [{"number": 1, "start": 0, "length": GiB, "filesystem": HOSTILE}],
            "guest digest": {"algorithm": HOSTILE, "root": HOSTILE},
        },
        series={
            **plain.series,
            "stages": {HOSTILE: next(iter(plain.series["stages"].values()))},
            "marks": [{"elapsed_s": 1, "stage": HOSTILE, "kind": HOSTILE, "text": HOSTILE}],
        },
    )
    assert sorted(set(hostile.tags)) == sorted(set(read().tags) | set())
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count("<script>alert(1)</script>") > 20


def test_every_picture_is_well_formed_and_named() -> None:
    pictures = re.findall(r"<svg.*?</svg>", page(record_of(manifest(), where="x")), re.DOTALL)
    assert len(pictures) > 8
    for picture in pictures:
        root = xml.etree.ElementTree.fromstring(picture)
        assert root.get("aria-label") or root.get("aria-hidden")
        assert "nan" not in picture


@pytest.mark.parametrize(
    "damage",
    [
        {"state": "perfect"},
        {"disk": dataclasses.replace(manifest().disk, size=-1)},
        {"disk": dataclasses.replace(manifest().disk, totals={"bogus": 1})},
        {"disk": dataclasses.replace(manifest().disk, runs="!!")},
        {"disk": replaced(manifest().disk, identity=[1])},
        {"image": replaced(manifest().image, size="big")},
        {"elapsed_s": None},
        {"verdicts": ({},)},
        {"timings": {"read.disk": 7}},
        {"options": [1]},
        {"facts": {"partitions": [{"number": 1}]}},
        {"series": {"elapsed_s": "1"}},
        {"series": 7},
    ],
)
def test_a_damaged_manifest_is_a_format_error(damage: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        record_of(manifest(**damage), where="x")


def test_an_old_manifest_without_a_series_still_makes_a_page() -> None:
    text = read(series={}, facts={}, timings={}).text
    assert "What the disk held" in text
    assert "Throughput" not in text


def test_an_instant_run_makes_a_page() -> None:
    empty = {name: "" if name != "marks" and name != "stages" else {} for name in Series().to_json()}
    assert "Throughput" not in read(series={**empty, "marks": []}, elapsed_s=0.0).text


# Numbers behind the pictures


def test_columns_tile_the_disk_and_account_for_every_byte() -> None:
    runs = disk_runs()
    for start, length, count in ((0, SIZE, 240), (MiB, 20 * GiB - MiB, 119), (SIZE - 512, 512, 240)):
        made = columns(runs, start, length, count)
        assert made[0].start == start
        assert sum(one.length for one in made) == length
        assert all(sum(one.kinds.values()) == one.length for one in made)
    whole: dict[Why, int] = {}
    for one in columns(runs, 0, SIZE, 240):
        for why, length in one.kinds.items():
            whole[why] = whole.get(why, 0) + length
    assert {why.value: length for why, length in whole.items()} == manifest().disk.totals


def test_intervals_cover_the_transfer_and_conserve_its_bytes() -> None:
    series = recorded().series()
    rows = intervals(series, 80)
    assert 40 <= len(rows) <= 81
    assert (rows[0].begin_s, rows[-1].end_s) == (0.0, series.elapsed_s[-1])
    assert all(before.end_s == after.begin_s for before, after in pairwise(rows))
    read_bytes = sum(row.read_rate * (row.end_s - row.begin_s) for row in rows)
    assert read_bytes == pytest.approx(series.read_bytes[-1])
    assert all(0 <= sum(shares) <= 1.0001 for row in rows for shares in row.shares.values())


@pytest.mark.parametrize(
    "highest, axis", [(0, 1024), (1024, 1024), (3 * MiB, 5 * MiB), (501 * MiB, GiB), (1.5 * GiB, 2 * GiB)]
)
def test_an_axis_ends_at_a_round_number_above_the_highest(highest: float, axis: float) -> None:
    assert nice_rate(highest) == axis


def test_the_page_is_small_enough_to_mail(tmp_path: Path) -> None:
    assert len(page(record_of(manifest(), where="x")).encode()) < 512 * 1024
