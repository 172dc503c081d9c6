"""A catalog of stages that only declare themselves, for tests of parsing, wiring and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from pipeline.config.options import Secret
from pipeline.flow.facts import Fact
from pipeline.flow.orders import HEAD_LAST_SINK, SEQUENTIAL_SINK, SPARSE_SINK, Order
from pipeline.flow.stage import (
    BLOCKS,
    DISK_SIZE,
    NOTHING,
    PIECES_IN_SEQUENCE,
    STORED_IMAGE,
    VERDICT,
    Catalog,
    Port,
    StageContext,
    StageSpec,
    option,
    pieces,
)
from pipeline.units import Duration, KiB, Size

DIGEST: Fact[str] = Fact("guest digest", str, hint="add a checksum.guest stage before it")
HISTOGRAM: Fact[str] = Fact("histogram", str)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOptions:
    """Nothing to choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """Options of read.disk."""

    path: Path = option(doc="Block device or raw image file.", example='"/dev/sda"')
    partitions: tuple[int, ...] | Literal["all", "needed"] = option("all", doc="Which partitions travel.")
    rate_limit: Size | None = option(None, doc="Bytes a second, at most.", minimum=KiB)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChecksumOptions:
    """Options of checksum.guest."""

    algorithm: Literal["xxh3-128", "blake3"] = option("xxh3-128", doc="blake3 where proof against tampering is wanted.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """Options of encode.qcow2."""

    level: Literal["fast", "small"] = option("fast", doc="small takes longer.")
    cluster_size: Size = option(Size(64 * KiB), doc="Bytes a cluster.")

    def __post_init__(self) -> None:
        if self.cluster_size & (self.cluster_size - 1):
            raise ValueError("cluster_size must be a power of two")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """Options of write.s3."""

    url: str = option(doc="Where the image goes.", example='"s3://images/web01.qcow2"')
    secret_key: Secret | None = option(None, doc="Instead of the credential chain.")
    deadline: Duration = option(Duration(120), doc="How long a dead store is tried.")
    headers: dict[str, str] | None = option(None, doc="Sent with every request.")
    overwrite: bool = option(False, doc="Replace an existing object.")
    attempts: int = option(6, doc="How often a request is sent.", minimum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """Options of write.file."""

    path: Path = option(doc="The file.", example="/images/web01.qcow2")


def not_built(options: object, context: StageContext) -> NoReturn:
    """These stages are never built."""
    raise AssertionError("a test of declarations built a stage")


def _spec(
    name: str, options: type, takes: Port, gives: Port, *, summary: str = "A declaration.", **more: object
) -> StageSpec:
    return StageSpec(name=name, summary=summary, options=options, takes=takes, gives=gives, build=not_built, **more)  # type: ignore[arg-type]  # passed on


ANY_ORDER = pieces(Order.SPARSE, Order.RANDOM, Order.HEAD_LAST, Order.SEQUENTIAL)

SMALL_CATALOG = Catalog(
    (
        _spec("read.disk", ReadOptions, NOTHING, BLOCKS, provides=(DISK_SIZE,), summary="Read a disk."),
        _spec("read.image", ReadOptions, NOTHING, BLOCKS, provides=(DISK_SIZE,)),
        _spec("checksum.guest", ChecksumOptions, BLOCKS, BLOCKS, provides=(DIGEST,)),
        _spec("sparse.zeros", NoOptions, BLOCKS, BLOCKS, needs=(DISK_SIZE,)),
        _spec("encode.qcow2", EncodeOptions, BLOCKS, pieces(Order.HEAD_LAST, Order.RANDOM)),
        _spec("encode.raw", NoOptions, BLOCKS, pieces(Order.SPARSE, Order.SEQUENTIAL)),
        _spec("compress.lz4", NoOptions, PIECES_IN_SEQUENCE, PIECES_IN_SEQUENCE),
        _spec("write.s3", StoreOptions, Port("pieces"), STORED_IMAGE, sink=HEAD_LAST_SINK),
        _spec("write.pipe", NoOptions, Port("pieces"), STORED_IMAGE, sink=SEQUENTIAL_SINK),
        _spec("write.file", FileOptions, ANY_ORDER, STORED_IMAGE, sink=SPARSE_SINK),
        _spec("write.null", NoOptions, ANY_ORDER, NOTHING, sink=SPARSE_SINK),
        _spec("verify.readback", NoOptions, STORED_IMAGE, VERDICT, needs=(DIGEST,)),
        _spec("verify.receipt", NoOptions, STORED_IMAGE, VERDICT),
        _spec("verify.histogram", NoOptions, STORED_IMAGE, VERDICT, needs=(HISTOGRAM,)),
    )
)

GOOD = """\
[export]
name   = "web01"
memory = "64 MiB"

[[stage]]
use  = "read.disk"
path = "/dev/sda"

[[stage]]
use = "checksum.guest"

[[stage]]
use = "sparse.zeros"

[[stage]]
use   = "encode.qcow2"
level = "small"

[[stage]]
use = "write.s3"
url = "s3://images/web01.qcow2"

[[stage]]
use = "verify.readback"
"""


def chain_text(*names: str) -> str:
    """An export file with these stages, one a line from line 3 on, each with what it requires."""
    required = {
        "read.disk": 'path = "/dev/sda"',
        "read.image": 'path = "a.raw"',
        "write.s3": 'url = "s3://a/b"',
        "write.file": 'path = "b"',
    }
    stages = [f'{{use = "{name}"' + (f", {required[name]}" if name in required else "") + "}," for name in names]
    return "\n".join(['export.name = "web01"', "stage = [", *stages, "]", ""])
