"""What every encoder of the catalog promises, whatever its format."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.options import option_fields
from pipeline.errors import PlanError, StageError
from pipeline.flow.buffers import Ledger, Pool
from pipeline.flow.items import Block
from pipeline.flow.stage import StageSpec
from pipeline.units import KiB, MiB, Size
from stages.catalog import CATALOG
from tests.encode.lettered import WINDOW, Export, LetterDisk, disk, export, make_encoder


@dataclass(frozen=True)
class Variant:
    """One encoder with options and a head that a store wants."""

    stage: str
    options: dict[str, Any] = field(default_factory=dict)
    head_minimum: int = 0

    @property
    def spec(self) -> StageSpec:
        """Its declaration."""
        spec = CATALOG.find(self.stage)
        assert spec is not None
        return spec

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join([self.stage, *words, *([f"head={self.head_minimum}"] if self.head_minimum else [])])


# Options worth a run of their own; an encoder that is not named here runs with its defaults.
OPTION_SETS: dict[str, tuple[dict[str, Any], ...]] = {
    "encode.qcow2": (
        {},
        {"compression": "none"},
        {"level": "small"},
        {"compression": "zstd"},
        {"compression": "zstd", "level": "small", "cluster_size": Size(2 * MiB)},
        {"cluster_size": Size(512)},
        {"compression": "none", "cluster_size": Size(4 * KiB)},
    ),
    "encode.vhd": ({}, {"variant": "fixed"}),
    "encode.vmdk": ({}, {"level": "small"}, {"variant": "monolithicSparse"}, {"adapter": "ide"}),
    "encode.gce": ({}, {"level": "small"}),
    "encode.ova": ({}, {"level": "small", "boot_mode": "uefi"}),
}
HEADS: dict[str, int] = {
    "encode.qcow2": 5 * MiB,
    "encode.vhd": 5 * MiB,
    "encode.vhdx": 5 * MiB,
    "encode.ova": 5 * MiB,
}


def _variants() -> Iterator[Variant]:
    for spec in CATALOG:
        if spec.role == "encode":
            for options in OPTION_SETS.get(spec.name, ({},)):
                yield Variant(spec.name, options)
            if spec.name in HEADS:
                yield Variant(spec.name, {}, HEADS[spec.name])


VARIANTS = tuple(_variants())


def mixed_disk() -> LetterDisk:
    """Seven windows and a cut one: all kinds side by side, a skip, a window of zeros only, one of nothing but noise."""
    windows = (
        disk("AB0-C.NAOS" * 3 + "A-").extents,
        disk("-", 2 * WINDOW).extents,
        disk("NOPQ" * 8).extents,
        disk("0" * 32).extents,
        disk("AS-N" * 10 + "0A" * 10, 32 * KiB).extents + disk("-", WINDOW - 60 * 32 * KiB).extents,
        disk("S" * 5 + "-" + "A", 12 * KiB, cut=4 * KiB + 100).extents,
    )
    return LetterDisk(tuple(extent for window in windows for extent in window))


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Every encoder with every set of options."""
    found: Variant = request.param
    return found


@pytest.fixture(scope="module")
def exported(variant: Variant) -> Export:
    """What it makes of the mixed disk in one go."""
    return run(variant, checkpoints=variant.spec.checkpointed)


def run(variant: Variant, source: LetterDisk | None = None, **how: Any) -> Export:
    """An export of the mixed disk, or of another."""
    options = variant.spec.options(**variant.options)
    return export(variant.spec, options, source or mixed_disk(), head_minimum=variant.head_minimum, **how)


def test_encoder_resumed_in_a_new_process_after_any_window_makes_the_same_image(
    variant: Variant, exported: Export
) -> None:
    if not variant.spec.checkpointed:
        pytest.skip("says that it can't be checkpointed")
    assert len(exported.checkpoints) == len(list(mixed_disk().blocks()))
    request = {
        "stage": variant.stage,
        "options": variant.options,
        "head_minimum": variant.head_minimum,
        "extents": mixed_disk().extents,
        "checkpoints": [(placed, base64.b64encode(state).decode()) for placed, _, state in exported.checkpoints],
    }
    answer = subprocess.run(
        [sys.executable, "-m", "tests.contracts.resumed_encoder"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert json.loads(answer.stdout) == [exported.digest(since) for _, since, _ in exported.checkpoints]


def test_encoder_resumed_far_into_a_large_disk_makes_the_same_image(variant: Variant) -> None:
    """Behind many tables of every format: they travel in the checkpoint, all of those that are closed."""
    if not variant.spec.checkpointed:
        pytest.skip("says that it can't be checkpointed")
    spread = [("A", 64 * KiB), ("-", 30 * MiB), ("S", 64 * KiB), ("-", 250 * MiB), ("B", 32 * KiB), ("-", 12 * MiB)]
    source = LetterDisk((*spread, *spread, ("N", MiB)))
    whole = run(variant, source, checkpoints=True)
    for placed, since, state in whole.checkpoints[3::4]:
        assert run(variant, source, resume=(placed, state)).digest() == whole.digest(since)


def test_image_does_not_depend_on_the_order_in_which_windows_are_prepared(variant: Variant, exported: Export) -> None:
    assert run(variant, shuffled=True).digest() == exported.digest()


def test_image_is_the_same_again_unless_it_is_asked_to_be_a_new_one(variant: Variant, exported: Export) -> None:
    """`reproducible`, the default: the same disk under the same name gives the same bytes, on any day."""
    assert run(variant).digest() == exported.digest()
    if "reproducible" not in {item.name for item in option_fields(variant.spec.options)}:
        return
    options = variant.options | {"reproducible": False}
    fresh = [run(Variant(variant.stage, options, variant.head_minimum)) for _ in range(2)]
    digests = {one.digest() for one in (exported, *fresh)}
    # GCE's archive has no identifier, only a time: of two within a second both are alike.
    assert len(digests) >= (2 if variant.stage == "encode.gce" else 3)


def test_guest_bytes_of_the_pieces_sum_to_the_disk(exported: Export) -> None:
    assert exported.guest_bytes == mixed_disk().size


def test_guest_bytes_of_an_empty_disk_are_accounted_for(variant: Variant) -> None:
    hole = disk("-", 3 * WINDOW + 1000)
    assert run(variant, hole).guest_bytes == hole.size


def test_every_slice_and_charge_is_given_back(exported: Export) -> None:
    assert (exported.leaked_buffers, exported.leaked_bytes) == (0, 0)


async def test_window_of_zeros_gives_its_buffer_and_charge_back(variant: Variant) -> None:
    encoder, _ = make_encoder(variant.spec, variant.spec.options(**variant.options), WINDOW)
    pool, ledger = Pool(WINDOW, 1), Ledger(WINDOW)
    data = (await pool.lease()).into_slice(WINDOW)
    block = Block(0, WINDOW, data, disk("0-", WINDOW // 2).runs(0, WINDOW))
    for piece in encoder.place(encoder.prepare(block, await ledger.charge(WINDOW))):
        piece.release()
    assert (pool.in_use, ledger.charged) == (0, 0)
    pool.close()


def test_pieces_come_in_sequence_behind_a_head_that_comes_last(exported: Export) -> None:
    """No gap, no overlap; this is what an append-only store with a late first part relies on."""
    head = exported.layout.head_length
    spans = [(offset, offset + length) for offset, length, _, _ in exported.placed]
    body = [span for span in spans if span[0] >= head]
    late = spans[len(body) :]
    assert spans[: len(body)] == body
    assert [start for start, _ in body] == [head, *(stop for _, stop in body)][: len(body)]
    if head:
        assert [start for start, _ in late] == [0, *(stop for _, stop in late[:-1])]
        assert late[-1][1] == head
    assert exported.position == exported.length


def test_image_is_no_longer_than_the_layout_said(exported: Export) -> None:
    assert exported.length <= exported.layout.image_bytes_max
    if exported.layout.image_bytes is not None:
        assert exported.length == exported.layout.image_bytes


def test_position_tells_where_the_next_piece_begins(variant: Variant) -> None:
    encoder, layout = make_encoder(variant.spec, variant.spec.options(**variant.options), 4 * WINDOW)
    assert encoder.position == layout.head_length
    encoder.place(encoder.prepare(Block(0, 4 * WINDOW, None, disk("-", 4 * WINDOW).runs(0, 1)), None))
    before = encoder.position
    tail = [piece for piece in encoder.finish() if piece.offset >= layout.head_length]
    if tail:
        assert tail[0].offset == before


def test_block_out_of_order_is_refused(variant: Variant) -> None:
    encoder, _ = make_encoder(variant.spec, variant.spec.options(**variant.options), 4 * WINDOW)
    late = Block(WINDOW, WINDOW, None, disk("-", 2 * WINDOW).runs(WINDOW, 2 * WINDOW))
    with pytest.raises(StageError, match="do not come in order"):
        encoder.place(encoder.prepare(late, None))


def test_disk_that_ends_early_is_not_finished(variant: Variant) -> None:
    encoder, _ = make_encoder(variant.spec, variant.spec.options(**variant.options), 4 * WINDOW)
    encoder.place(encoder.prepare(Block(0, WINDOW, None, disk("-", WINDOW).runs(0, WINDOW)), None))
    with pytest.raises(StageError, match="end"):
        list(encoder.finish())


@pytest.mark.parametrize("damage", ["another disk", "cut off", "garbage"])
def test_checkpoint_of_another_export_is_refused(variant: Variant, damage: str) -> None:
    if not variant.spec.checkpointed:
        pytest.skip("says that it can't be checkpointed")
    options = variant.spec.options(**variant.options)
    state = make_encoder(variant.spec, options, 8 * WINDOW)[0].checkpoint()
    size = 4 * WINDOW if damage == "another disk" else 8 * WINDOW
    state = {"cut off": state[:-4], "garbage": b"x" * len(state)}.get(damage, state)
    with pytest.raises(PlanError, match="checkpoint"):
        make_encoder(variant.spec, options, size)[0].restore(state)
