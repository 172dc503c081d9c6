"""The page in a real browser, as a phone and as a desktop: it fits, it is quiet, and the picture shows the disk."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pipeline.observe.page import page
from pipeline.observe.record import Record, record_of
from tests.observe.browser import PROGRAM, opened_browser
from tests.observe.runs import SIZE, manifest, recorded

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs chromium (apt-get install chromium)")

# What sticks out to the right of the window, and words that are cut off by what surrounds them.
OVERFLOW = """
[...document.querySelectorAll('body *')].filter(one => {
  const box = one.getBoundingClientRect();
  return box.right > innerWidth + 0.5 && !one.closest('svg');
}).map(one => one.outerHTML.slice(0, 80))
"""
DATA, FREE, HOLE = "var(--data)", "var(--free)", "var(--hole)"
LONG = "s3://images/" + "a-very-long-name-without-any-place-to-break-" * 6 + ".qcow2"

FAILED = Record(
    name="web01",
    created="2026-11-23T04:12:09+00:00",
    state="failed",
    target=LONG,
    disk_size=SIZE,
    elapsed_s=33.0,
    read_bytes=SIZE // 2,
    acked_bytes=SIZE // 4,
    series=recorded(seconds=33).series(),
    timings={"read.disk": (20.0, 0.0, 0.0, 3.0), "write.s3": (31.0, 1.0, 0.0, 0.0)},
    options={"read.disk": {"path": "/dev/sda"}, "write.s3": {"url": LONG}},
    versions={"disk-pipeline": "0.1.0"},
    error="put_part: access denied (bucket=images)",
    hint="Ask for s3:PutObject.",
)


def colour(text: str) -> tuple[int, ...]:
    """`rgb(31, 95, 208)` as numbers."""
    return tuple(int(word) for word in text.removeprefix("rgb(").removesuffix(")").split(","))


async def test_the_page_fits_phone_and_desktop_and_asks_for_nothing(tmp_path: Path) -> None:
    files = {"good": record_of(manifest(), where="x"), "failed": FAILED}
    for name, record in files.items():
        (tmp_path / f"{name}.html").write_text(page(record))
    async with opened_browser(tmp_path / "profile") as browser:
        for name, (width, dark) in itertools.product(files, [(390, False), (390, True), (320, False), (1280, False)]):
            file = tmp_path / f"{name}.html"
            await browser.open(file, width=width, dark=dark)
            assert await browser.value("document.documentElement.scrollWidth") <= width, (name, width)
            assert await browser.value(OVERFLOW) == [], (name, width)
            flat = "[...document.querySelectorAll('svg')].filter(one => one.getBoundingClientRect().height < 5).length"
            assert await browser.value(flat) == 0
            ground = "getComputedStyle(document.body).backgroundColor"
            assert (sum(colour(await browser.value(ground))) < 150) == dark
            assert set(browser.requests) <= {each.as_uri() for each in tmp_path.glob("*.html")}
            assert browser.complaints == []


async def test_the_picture_shows_data_where_there_was_data_and_holes_where_there_were_holes(tmp_path: Path) -> None:
    """The screenshot: in its first half each GiB begins with data and ends with free space; the rest is one hole."""
    (tmp_path / "good.html").write_text(page(record_of(manifest(), where="x")))
    async with opened_browser(tmp_path / "profile") as browser:
        for dark in (False, True):
            await browser.open(tmp_path / "good.html", width=1280, dark=dark)
            picture = await browser.picture(".strip")
            assert picture.width > 900
            for x, y, kind in (
                (4.35 / 40, 0.9, DATA),
                (4.917 / 40, 0.5, FREE),
                (16.35 / 40, 0.1, DATA),
                (0.75, 0.9, HOLE),
                (0.75, 0.1, HOLE),
                (0.95, 0.5, HOLE),
            ):
                shown = f"(() => {{ const one = document.createElement('i'); one.style.color = '{kind}';"
                shown += " document.body.append(one); return getComputedStyle(one).color })()"
                assert picture.at(x, y) == colour(await browser.value(shown)), (x, y, kind, dark)


async def test_a_hostile_name_does_nothing_in_the_browser(tmp_path: Path) -> None:
    name = "<img src='http://127.0.0.1:9/x' onerror='document.title=1'><script>document.title=1</script>"
    (tmp_path / "x.html").write_text(page(record_of(manifest(name=name), where="x")))
    async with opened_browser(tmp_path / "profile") as browser:
        await browser.open(tmp_path / "x.html", width=390)
        assert await browser.value("document.querySelector('h1').textContent") == name
        assert browser.requests == [(tmp_path / "x.html").as_uri()]
        assert browser.complaints == []
