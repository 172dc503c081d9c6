"""Plain qcow2 in sequence: a map first, then tables, then clusters."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, PlanError, SourceError, StageError
from pipeline.flow.buffers import loose_slice
from pipeline.flow.items import Block
from pipeline.flow.mapping import DataMap
from pipeline.flow.orders import Order
from pipeline.flow.stage import Catalog, LayoutRequest, StageContext
from pipeline.units import GiB, KiB, MiB, Size
from stages.catalog import CATALOG
from stages.encode.qcow2 import SPEC, Options, plan_layout
from stages.read import synthetic
from tests.chains import export, write_toml
from tests.disks.letters import write_disk
from tests.encode.lettered import WINDOW, LetterDisk, disk
from tests.verify.context import make_context

SOURCE = disk("AB0-C.NA" * 4 + "-" * 96 + "0A" * 32 + "-" * 32 + "S", 64 * KiB, cut=512)
PLAIN = Options(compression="none")


def mapped(source: LetterDisk, options: Options, found: DataMap | None = None) -> tuple[Any, StageContext]:
    """An encoder with the map of the disk, or with another."""
    if found is None:
        found = DataMap(int(options.cluster_size), source.size)
        for run in source.runs(0, source.size):
            if run.is_data:
                found.add(run.offset, run.end)
    request = LayoutRequest(disk_size=source.size, window=WINDOW, order=Order.SEQUENTIAL, map=found)
    layout = plan_layout(options, request)
    context = replace(make_context(SPEC.name, disk_size=source.size, layout=layout), order=Order.SEQUENTIAL)
    return SPEC.build(options, context), context


def encode(encoder: Any, source: LetterDisk, first: int = 0) -> tuple[bytes, list[tuple[int, int, bytes]]]:
    """The image from block `first` on, and (blocks, image bytes, state) behind each."""
    image = bytearray()
    states = []
    base, guest_bytes = encoder.position, 0
    for number, wanted in enumerate(source.blocks()):
        if number < first:
            continue
        block = wanted
        if any(run.is_data for run in wanted.runs):
            buffer = bytearray(wanted.length)
            source.fill(wanted.offset, memoryview(buffer))
            block = Block(wanted.offset, wanted.length, loose_slice(buffer), wanted.runs)
        for piece in encoder.place(encoder.prepare(block, None)):
            assert piece.offset == base + len(image)
            assert piece.length > 0
            image += piece.view if piece.view is not None else bytes(piece.length)
            guest_bytes += piece.guest_bytes
            piece.release()
        states.append((number + 1, len(image), encoder.checkpoint()))
    assert list(encoder.finish()) == []
    if not first:
        assert guest_bytes == source.size
    return bytes(image), states


@pytest.mark.parametrize("cluster", [512, 4 * KiB, 64 * KiB, 2 * MiB])
def test_qemu_finds_the_disk_in_it(tmp_path: Path, cluster: int) -> None:
    options = Options(compression="none", cluster_size=Size(cluster))
    encoder, context = mapped(SOURCE, options)
    image, _ = encode(encoder, SOURCE)
    assert context.layout is not None
    assert len(image) == context.layout.image_bytes == context.layout.image_bytes_max
    (tmp_path / "image").write_bytes(image)
    SOURCE.write(tmp_path / "raw")
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", tmp_path / "image"], check=True)
    compare = ["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2"]
    subprocess.run([*compare, str(tmp_path / "raw"), str(tmp_path / "image")], check=True)


def test_encoder_resumed_in_a_new_process_after_any_window_makes_the_same_image() -> None:
    whole, states = encode(mapped(SOURCE, PLAIN)[0], SOURCE)
    program = (
        "import sys, json, base64, hashlib\n"
        "from tests.encode.test_qcow2_mapped import *\n"
        "made = []\n"
        "for blocks, state in json.load(sys.stdin):\n"
        "    encoder, _ = mapped(SOURCE, PLAIN)\n"
        "    encoder.restore(base64.b64decode(state))\n"
        "    made.append(hashlib.sha256(encode(encoder, SOURCE, blocks)[0]).hexdigest())\n"
        "print(json.dumps(made))\n"
    )
    request = json.dumps([(blocks, base64.b64encode(state).decode()) for blocks, _, state in states])
    answer = subprocess.run(
        [sys.executable, "-c", program],
        input=request,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    import hashlib

    assert json.loads(answer.stdout) == [hashlib.sha256(whole[since:]).hexdigest() for _, since, _ in states]


def test_checkpoint_of_another_map_is_refused() -> None:
    state = mapped(SOURCE, PLAIN)[0].checkpoint()
    found = DataMap(64 * KiB, SOURCE.size)
    with pytest.raises(PlanError, match="checkpoint"):
        mapped(SOURCE, PLAIN, found)[0].restore(state)


def test_blocks_that_end_inside_a_cluster_are_never_a_finished_image() -> None:
    """A cluster of two blocks would be there twice, and every table wrong."""
    source = disk("AB", 64 * KiB)
    encoder, _ = mapped(source, PLAIN)
    for offset in range(0, source.size, 32 * KiB):
        block = Block(offset, 32 * KiB, loose_slice(bytes(32 * KiB)), source.runs(offset, offset + 32 * KiB))
        for piece in encoder.place(encoder.prepare(block, None)):
            piece.release()
    with pytest.raises(StageError, match="do not end with the disk"):
        encoder.finish()


def test_image_of_a_large_sparse_disk_has_its_tables_in_front() -> None:
    source = LetterDisk((("A", 64 * KiB), ("-", 600 * GiB - 128 * KiB), ("B", 64 * KiB)))
    encoder, context = mapped(source, PLAIN)
    image, _ = encode(encoder, source)
    assert context.layout is not None
    # header, refcount table, one refcount block, L1, two L2 tables, two clusters
    assert len(image) == context.layout.image_bytes == 8 * 64 * KiB


def chain(folder: Path, source: str, *, scan: bool = True) -> Path:
    return write_toml(
        folder / "export.toml",
        source,
        "checksum.guest",
        *(["sparse.zeros"] if scan else []),
        'encode.qcow2; compression = "none"',
        'checksum.image; sha256 = true',
        f'write.file; path = "{folder / "image.qcow2"}"; overwrite = true',
        "verify.readback",
    )  # fmt: skip


class Changing(synthetic.SyntheticReader):
    """Zeros at the map pass; what comes then is up to the test."""

    passes = 0
    then: Callable[[Block, memoryview], None]

    async def windows(self, window: int, start: int = 0) -> Any:
        Changing.passes += 1
        async for block in super().windows(window, start):
            yield block

    def load(self, block: Block, buffer: memoryview) -> None:
        buffer[: block.length] = bytes(block.length)
        if block.offset == 8 * MiB and Changing.passes == Changing.data_in:
            buffer[70_000] = 1

    data_in = 0


def changing_catalog() -> Catalog:
    def build(options: Any, context: StageContext) -> Changing:
        return Changing(options, context)

    Changing.passes = 0
    return Catalog([replace(spec, build=build) if spec.name == "read.synthetic" else spec for spec in CATALOG])


async def test_data_where_the_map_found_zeros_fails_the_run(tmp_path: Path) -> None:
    Changing.data_in = 2
    with pytest.raises(SourceError, match=r"found zeros.*offset=8458608\b"):
        await export(chain(tmp_path, 'read.synthetic; size = "64 MiB"'), catalog=changing_catalog())
    assert list(tmp_path.glob("*qcow2*")) == []


async def test_zeros_where_the_map_found_data_are_written_as_zeros(tmp_path: Path) -> None:
    Changing.data_in = 1
    outcome = await export(chain(tmp_path, 'read.synthetic; size = "64 MiB"'), catalog=changing_catalog())
    assert outcome.state == "identical"
    assert outcome.image_size == (1 + 1 + 1 + 1 + 1 + 2) * 64 * KiB  # header, four tables, two clusters


async def test_source_that_knows_its_holes_is_not_read_for_the_map(tmp_path: Path) -> None:
    source = write_disk(tmp_path / "disk.raw", "A-B" + "-" * 20)
    outcome = await export(chain(tmp_path, f'read.disk; path = "{source}"'))
    assert outcome.state == "identical"
    assert outcome.read_bytes <= 4 * MiB
    assert outcome.manifest.image.size < 3 * MiB


async def test_compressed_clusters_in_sequence_are_refused_with_what_would_work(tmp_path: Path) -> None:
    toml = write_toml(
        tmp_path / "export.toml", 'read.synthetic; size = "64 MiB"', "encode.qcow2", 'write.pipe; command = ["cat"]'
    )
    with pytest.raises(ConfigError) as caught:
        await export(toml)
    told = str(caught.value)
    assert 'write.pipe takes pieces "sequential", and encode.qcow2 gives them "head last"' in told
    assert 'set compression to "none"' in told
    assert "encode.raw" in told
