"""A store that lies, and every verification that claims to find it out: the table of docs/proof.md, cell by cell."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StoreError, VerificationError
from pipeline.flow.items import Receipt, StoredImage
from pipeline.units import MiB
from stages.write.file import FileWriter
from stages.write.memory import MemoryReader
from tests.chains import export, write_toml
from tests.disks.letters import write_disk

PART = 2 * MiB
DOCS = Path(__file__).parents[2] / "docs" / "proof.md"

Lie = Callable[[bytes], bytes | None]


def _part(image: bytes, number: int) -> bytes:
    return image[number * PART : (number + 1) * PART]


LIES: dict[str, Lie] = {
    "accepts a part and drops it": lambda image: image[: 2 * PART] + bytes(PART) + image[3 * PART :],
    "keeps another part's bytes": lambda image: image[: 2 * PART] + _part(image, 4) + image[3 * PART :],
    "truncates the image": lambda image: image[:-PART],
    "puts parts in another order": lambda image: (
        image[: 2 * PART] + _part(image, 3) + _part(image, 2) + image[4 * PART :]
    ),
    "says yes to the last step and loses the image": lambda image: None,
}


def _gone() -> StoreError:
    return StoreError("there is no such object", operation="read", status=404)


def _receipt(how: str, true: bytes, held: bytes | None) -> Receipt:
    ours = f"{zlib.crc32(true):08x}"
    if how == "repeats ours":
        return Receipt(len(true), (("crc32", ours, ours),))
    if held is None:
        raise _gone()
    if how == "states none":
        return Receipt(len(held), note="the store keeps no checksum of the image")
    return Receipt(len(held), (("crc32", ours, f"{zlib.crc32(held):08x}"),))


def lying(monkeypatch: pytest.MonkeyPatch, lie: Lie, how: str) -> None:
    """From now on what write.file sealed is looked at through the lie."""
    real = FileWriter.run

    async def run(writer: FileWriter, inlet: Any, outlet: Any) -> None:
        class Through:
            async def send(self, image: StoredImage) -> None:
                true = writer._partial.read_bytes()
                held = lie(true)

                @asynccontextmanager
                async def open_reader() -> AsyncIterator[MemoryReader]:
                    if held is None:
                        raise _gone()
                    yield MemoryReader(held)

                @asynccontextmanager
                async def fetch_receipt() -> AsyncIterator[Receipt]:
                    yield _receipt(how, true, held)

                await outlet.send(replace(image, open_reader=open_reader, fetch_receipt=fetch_receipt))

        await real(writer, inlet, Through())

    monkeypatch.setattr(FileWriter, "run", run)


async def outcome(folder: Path, *verifiers: str, encoder: str = "encode.raw") -> str:
    """What becomes of an export of 16 MiB that the store lies about."""
    if not (folder / "disk").exists():
        write_disk(folder / "disk", "ABCDEFGHIJKLMNOP", MiB)
    toml = write_toml(
        folder / "export.toml",
        f'read.disk; path = "{folder / "disk"}"',
        "checksum.guest",
        encoder,
        f'write.file; path = "{folder / "image"}"',
        *verifiers,
    )
    try:
        done = await export(toml)
    except (VerificationError, StoreError):
        assert not (folder / "image").exists(), "it was withdrawn"
        return "caught"
    (folder / "image").unlink()
    (folder / "image.manifest.json").unlink()
    return {"identical": "missed", "stored": "missed", "unproven": "unproven"}[done.state]


# Column of the table: how the store answers when it is asked for a receipt, and the verification.
LEVELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no `verify.*`": ("repeats ours", ()),
    "`receipt`, store states a checksum": ("states it", ("verify.receipt",)),
    "`receipt`, store states none": ("states none", ("verify.receipt",)),
    "`receipt`, store repeats ours": ("repeats ours", ("verify.receipt",)),
    "`sample`": ("repeats ours", ("verify.sample",)),
    "`readback`": ("repeats ours", ("verify.readback",)),
}


def told() -> dict[tuple[str, str], str]:
    """The table in the docs, by (lie, level)."""
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in DOCS.read_text().splitlines()
        if line.startswith("|")
    ]
    head = rows[0]
    table = rows[2 : 2 + len(LIES)]
    return {(row[0], level): cell for row in table for level, cell in zip(head[1:], row[1:], strict=True)}


def test_table_of_the_docs_has_every_lie_and_every_level() -> None:
    assert set(told()) == {(lie, level) for lie in LIES for level in LEVELS}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("lie", LIES)
async def test_lie_is_found_out_as_the_docs_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str, level: str
) -> None:
    how, verifiers = LEVELS[level]
    lying(monkeypatch, LIES[lie], how)
    expected = told()[lie, level]
    # Usually a sample is at least 64 MiB: it looks at all of this disk.
    assert await outcome(tmp_path, *verifiers) == expected.removesuffix(" where it looks")


@pytest.mark.parametrize("lie", [lie for lie in LIES if told()[lie, "`sample`"] == "caught where it looks"])
async def test_sample_finds_a_lie_only_where_it_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    lying(monkeypatch, LIES[lie], "repeats ours")
    found = {
        await outcome(tmp_path, f'verify.sample; share = 0.0; bytes = "2 MiB"; seed = "{seed}"') for seed in range(16)
    }
    assert found == {"caught", "missed"}


@pytest.mark.parametrize("lie", LIES)
async def test_readback_finds_every_lie_about_a_compressed_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    lying(monkeypatch, LIES[lie], "repeats ours")
    assert await outcome(tmp_path, "verify.readback", encoder="encode.qcow2") == "caught"


async def test_store_that_tells_the_truth_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lying(monkeypatch, lambda image: image, "states it")
    assert await outcome(tmp_path, "verify.receipt", "verify.readback") == "missed"  # nothing was there to catch
