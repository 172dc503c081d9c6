"""Peak memory of every kind of export, on a disk that is compressed and on one that cannot be."""

from __future__ import annotations

from perf.case import Case, Contender, Goal
from perf.cases.images import OUR_PLAIN, OUR_RAW, OUR_ZLIB, OUR_ZLIB_SMALL, OUR_ZSTD, OUR_ZSTD_SMALL
from perf.export import BASE_MEMORY, MEMORY, MIB, export_to_file, export_to_nothing, export_to_store


def _case(kind: str, disk: str, ours: Contender, memory: int = MEMORY) -> Case:
    return Case(
        name=f"memory-{kind}-{disk}",
        summary=f"peak memory of {ours.name} with memory = {memory // MIB} MiB",
        disk=disk,
        ours=ours,
        goals=(Goal("peak memory", memory + BASE_MEMORY),),
    )


_LARGE = 512 * MIB

CASES = (
    *(
        _case(kind, disk, ours)
        for disk in ("system", "incompressible")
        for kind, ours in (
            ("zlib-fast", export_to_file("pipeline qcow2 zlib fast", "qcow2", OUR_ZLIB)),
            ("zlib-small", export_to_file("pipeline qcow2 zlib small", "qcow2", OUR_ZLIB_SMALL)),
            ("zstd", export_to_file("pipeline qcow2 zstd fast", "qcow2", OUR_ZSTD)),
            ("zstd-small", export_to_file("pipeline qcow2 zstd small", "qcow2", OUR_ZSTD_SMALL)),
            ("plain", export_to_file("pipeline qcow2 plain", "qcow2", OUR_PLAIN)),
            ("raw", export_to_file("pipeline raw", "raw", OUR_RAW)),
            ("read", export_to_nothing("pipeline read to null", OUR_RAW)),
            ("s3", export_to_store("pipeline qcow2 zlib fast to S3", "qcow2", OUR_ZLIB)),
        )
    ),
    # A larger budget moves the limit by as much and no more.
    _case(
        "large",
        "incompressible",
        export_to_file("pipeline qcow2 zlib fast, 512 MiB", "qcow2", OUR_ZLIB, memory=_LARGE),
        _LARGE,
    ),
)
