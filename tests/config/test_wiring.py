"""Stages that fit together become a chain; the others are told why they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.parse import load_config
from pipeline.config.wiring import WiredChain, load_chain, wire
from pipeline.errors import ConfigError, Fault
from pipeline.flow.orders import Order
from tests.config.small_catalog import GOOD, SMALL_CATALOG, chain_text

ALL = ("read.disk", "checksum.guest", "sparse.zeros", "encode.qcow2", "write.s3", "verify.receipt", "verify.readback")


def wired(folder: Path, *names: str) -> WiredChain:
    file = folder / "export.toml"
    file.write_text(chain_text(*names))
    return wire(load_config(file, SMALL_CATALOG))


def faults(folder: Path, *names: str) -> list[Fault]:
    with pytest.raises(ConfigError) as raised:
        wired(folder, *names)
    return raised.value.faults


def reasons(folder: Path, *names: str) -> list[tuple[int, str]]:
    """Line and reason of each fault; the first stage stands in line 3."""
    return [(fault.line, fault.reason) for fault in faults(folder, *names)]


def test_a_whole_chain_is_sorted_into_its_parts(tmp_path: Path) -> None:
    chain = wired(tmp_path, *ALL)
    assert chain.names == ALL
    assert chain.source.name == "read.disk"
    assert [stage.name for stage in chain.functions] == ["checksum.guest", "sparse.zeros"]
    assert chain.encoder.name == "encode.qcow2"
    assert chain.compressors == ()
    assert chain.writer.name == "write.s3"
    assert [stage.name for stage in chain.verifiers] == ["verify.receipt", "verify.readback"]


def test_the_shortest_chain_reads_encodes_and_writes(tmp_path: Path) -> None:
    assert wired(tmp_path, "read.disk", "encode.raw", "write.pipe").names == ("read.disk", "encode.raw", "write.pipe")


@pytest.mark.parametrize(
    "names, order",
    [
        (("encode.raw", "write.file"), Order.SPARSE),
        (("encode.raw", "write.s3"), Order.SEQUENTIAL),
        (("encode.qcow2", "write.s3"), Order.HEAD_LAST),
        (("encode.qcow2", "write.file"), Order.HEAD_LAST),
        (("encode.raw", "compress.lz4", "write.file"), Order.SEQUENTIAL),
    ],
)
def test_pieces_travel_in_the_encoders_first_order_that_all_can_take(
    tmp_path: Path, names: tuple[str, ...], order: Order
) -> None:
    assert wired(tmp_path, "read.disk", *names).order is order


def test_orders_that_do_not_meet_come_with_what_would_work(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, "read.disk", "encode.qcow2", "write.pipe")
    assert fault.render().replace(f"{tmp_path}/", "") == (
        'export.toml:5:8: write.pipe takes pieces "sequential", and encode.qcow2 gives them "head last" or "random"\n'
        '    5 | {use = "write.pipe"},\n'
        "      |        ^^^^^^^^^^^^ "
        "write.pipe works with encode.raw; encode.qcow2 works with write.s3, write.file, write.null"
    )


def test_a_compressor_needs_pieces_in_sequence(tmp_path: Path) -> None:
    assert reasons(tmp_path, "read.disk", "encode.qcow2", "compress.lz4", "write.s3") == [
        (5, 'compress.lz4 takes pieces "sequential", and encode.qcow2 gives them "head last" or "random"')
    ]


def test_missing_parts_are_all_told_with_what_could_be_added(tmp_path: Path) -> None:
    found = faults(tmp_path, "sparse.zeros")
    assert [(fault.line, fault.reason, fault.hint) for fault in found] == [
        (0, "the chain has no source", "add one of read.disk, read.image"),
        (0, "the chain has no encoder", "add one of encode.qcow2, encode.raw"),
        (0, "the chain has no writer", "add one of write.s3, write.pipe, write.file, write.null"),
    ]


def test_a_second_source_encoder_or_writer_is_a_fault(tmp_path: Path) -> None:
    names = ("read.disk", "read.image", "encode.raw", "encode.qcow2", "write.file", "write.s3")
    assert reasons(tmp_path, *names) == [
        (4, "read.image is a second source"),
        (6, "encode.qcow2 is a second encoder"),
        (8, "write.s3 is a second writer"),
    ]


def test_a_stage_that_stands_there_twice_is_one_fault(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, "read.disk", "encode.raw", "encode.raw", "write.file")
    assert (fault.line, fault.reason) == (5, "encode.raw stands in the chain twice")
    assert fault.hint == "it is there in line 4"


def test_a_wrong_order_is_told_with_the_right_one(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, "read.disk", "write.file", "sparse.zeros", "encode.raw")
    assert (fault.line, fault.reason) == (4, "write.file stands in the wrong place")
    assert fault.hint == "the right order is read.disk -> sparse.zeros -> encode.raw -> write.file"


def test_the_fewest_stages_are_called_misplaced(tmp_path: Path) -> None:
    assert reasons(tmp_path, "verify.receipt", "read.disk", "encode.raw", "write.file") == [
        (3, "verify.receipt stands in the wrong place")
    ]


def test_a_digest_is_taken_before_any_zero_test(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, "read.disk", "sparse.zeros", "checksum.guest", "encode.raw", "write.file")
    assert (fault.line, fault.reason) == (
        5,
        "checksum.guest stands behind sparse.zeros: the digest is taken of what was read",
    )
    assert fault.hint == "the right order is read.disk -> checksum.guest -> sparse.zeros -> encode.raw -> write.file"


def test_a_stage_that_needs_a_fact_names_who_provides_it(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, "read.disk", "encode.raw", "write.file", "verify.readback")
    assert (fault.line, fault.reason, fault.hint) == (
        6,
        "verify.readback needs the guest digest, and no stage before it provides it",
        "add a checksum.guest stage before it",
    )


def test_a_fact_that_nobody_can_provide_has_no_hint(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, "read.disk", "encode.raw", "write.file", "verify.histogram")
    assert fault.hint == ""


def test_a_target_that_stores_nothing_cannot_be_verified(tmp_path: Path) -> None:
    assert reasons(tmp_path, "read.disk", "encode.raw", "write.null", "verify.receipt") == [
        (6, "verify.receipt takes a stored image, and write.null before it gives nothing")
    ]


def test_all_faults_of_a_chain_are_told_at_once(tmp_path: Path) -> None:
    names = ("read.disk", "verify.readback", "encode.qcow2", "encode.qcow2", "write.pipe", "read.image")
    assert reasons(tmp_path, *names) == [
        (4, "verify.readback stands in the wrong place"),
        (4, "verify.readback needs the guest digest, and no stage before it provides it"),
        (6, "encode.qcow2 stands in the chain twice"),
        (7, 'write.pipe takes pieces "sequential", and encode.qcow2 gives them "head last" or "random"'),
        (8, "read.image stands in the wrong place"),
        (8, "read.image is a second source"),
    ]


def test_faults_of_options_and_of_the_wiring_come_together(tmp_path: Path) -> None:
    file = tmp_path / "export.toml"
    file.write_text(
        GOOD.replace('"small"', '"smal"').replace('use = "checksum.guest"', 'use = "read.image"\npath = "x"')
    )
    with pytest.raises(ConfigError) as raised:
        load_chain(file, SMALL_CATALOG)
    assert [(fault.line, fault.reason) for fault in raised.value.faults] == [
        (10, "read.image is a second source"),
        (18, 'level: "smal" is not one of "fast", "small"'),
        (25, "verify.readback needs the guest digest, and no stage before it provides it"),
    ]


def test_a_misspelt_stage_is_not_also_a_missing_one(tmp_path: Path) -> None:
    file = tmp_path / "export.toml"
    file.write_text(GOOD.replace("encode.qcow2", "encode.qcow"))
    with pytest.raises(ConfigError) as raised:
        load_chain(file, SMALL_CATALOG)
    assert len(raised.value.faults) == 1


def test_a_good_file_gives_config_and_chain(tmp_path: Path) -> None:
    file = tmp_path / "export.toml"
    file.write_text(GOOD)
    config, chain = load_chain(file, SMALL_CATALOG, ["export.name=other"])
    assert config.export.name == "other"
    assert chain.stages == config.stages
