"""Every damaged or hostile image gets its verdict: from the checker by a finding, from a reader by a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import FormatError
from stages.decode.check.checking import check
from stages.decode.refusal import UnsupportedError
from tests.decode.images import BytesReader
from tests.decode.made import bounded, read_all, refused
from tests.decode.mutations import MUTATIONS, Mutation, good_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return good_images(tmp_path_factory.mktemp("good"))


def mutated(images: dict[str, bytes], mutation: Mutation) -> bytes:
    image = bytearray(images[mutation.base])
    mutation.change(image)
    assert image != images[mutation.base]
    return bytes(image)


def named(mutation: Mutation) -> str:
    return f"{mutation.base}-{mutation.rule}-{mutation.name}"


async def test_the_images_are_clean_before_they_are_damaged(images: dict[str, bytes]) -> None:
    for base, image in images.items():
        report = await check(BytesReader(image), base.split()[0], deep=True)
        assert report.verdict == "clean", (base, report.findings)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=named)
async def test_the_checker_finds_it(images: dict[str, bytes], mutation: Mutation) -> None:
    reader = BytesReader(mutated(images, mutation))
    with bounded():
        verdict, messages = await judged(reader, mutation)
    assert verdict == mutation.expected, messages
    assert any(mutation.finding in message for message in messages) or not mutation.finding, messages
    for offset, length in reader.reads:
        assert offset >= 0
        assert offset + length <= reader.size


async def judged(reader: BytesReader, mutation: Mutation) -> tuple[str, list[str]]:
    try:
        report = await check(reader, mutation.format, deep=mutation.mode == "deep", strict=mutation.mode == "strict")
    except UnsupportedError as error:
        return "refused", [str(error)]
    if report.verdict == "clean" and report.warnings:
        return "warning", [one.message for one in report.findings if one.kind == "warning"]
    return report.verdict, [one.message for one in report.findings if one.kind != "warning"]


@pytest.mark.parametrize("mutation", [one for one in MUTATIONS if not one.reads], ids=named)
async def test_a_reader_refuses_it(images: dict[str, bytes], mutation: Mutation) -> None:
    error = await refused(mutated(images, mutation), mutation.format)
    assert error.message
    assert error.hint
    # What the checker only warns of may be in order, but is not enough to read the disk from.
    assert isinstance(error, UnsupportedError) == (mutation.expected in ("refused", "warning"))


@pytest.mark.parametrize("mutation", [one for one in MUTATIONS if one.reads], ids=named)
async def test_a_reader_takes_what_does_not_concern_it(images: dict[str, bytes], mutation: Mutation) -> None:
    """Readers check bounds; what only the checker sees must not stop them."""
    try:
        await read_all(BytesReader(mutated(images, mutation)), mutation.format)
    except FormatError as error:
        pytest.fail(f"refused: {error}")


def test_the_page_about_the_checker_has_every_row() -> None:
    page = (Path(__file__).parents[2] / "docs" / "checker.md").read_text()
    for mutation in MUTATIONS:
        assert f"| {mutation.rule} | {mutation.name}" in page, "write it again: python -m tests.decode.agreement"
