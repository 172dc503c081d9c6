"""Disk to an S3 store over real lines and into a store that is busy, against the usual two steps.

A line of 100 Mbit/s and 50 ms (round trip), one of 1 Gbit/s and 10 ms; and a store that answers 503 above a rate, where
the rival is our own export that was told the store's rate by hand: as good as can be.
"""

from __future__ import annotations

from dataclasses import replace

from perf.case import Case, Contender, Goal, Line
from perf.cases.images import OUR_ZLIB
from perf.cases.storing import convert_then_upload
from perf.export import export_to_store

_MBIT = 1_000_000 / 8
FAR = Line(latency_s=0.025, bytes_per_s=100 * _MBIT)
NEAR = Line(latency_s=0.005, bytes_per_s=1000 * _MBIT)
# Of 8 MiB each: 20 MiB/s, a few times less than an idle store on this machine takes.
BUSY = Line(parts_per_s=2.5)


def _ours(name: str, line: Line) -> Contender:
    return replace(export_to_store(f"pipeline qcow2 zlib fast to S3, {name}", "qcow2", OUR_ZLIB), line=line)


def _rival(name: str, line: Line) -> Contender:
    return Contender(f"qemu-img -c, then aws s3 cp, {name}", convert_then_upload, needs_store=True, line=line)


CASES = (
    Case(
        name="s3-50ms-100mbit",
        summary="qcow2 with zlib clusters over 100 Mbit/s with a round trip of 50 ms",
        disk="system",
        ours=_ours("100 Mbit/s", FAR),
        rival=_rival("100 Mbit/s", FAR),
        goals=(Goal("wall ratio", 1.6),),
    ),
    Case(
        name="s3-10ms-1gbit",
        summary="qcow2 with zlib clusters over 1 Gbit/s with a round trip of 10 ms",
        disk="system",
        ours=_ours("1 Gbit/s", NEAR),
        rival=_rival("1 Gbit/s", NEAR),
        goals=(Goal("wall ratio", 3.0),),
    ),
    Case(
        name="s3-busy",
        summary="raw into a store that answers 503 to more than 2.5 parts a second, against one that was told so",
        disk="incompressible",
        ours=replace(export_to_store("pipeline raw to a busy S3", "raw", {"use": "encode.raw"}), line=BUSY),
        rival=replace(
            export_to_store("pipeline raw to a busy S3, told", "raw", {"use": "encode.raw"}, rate_limit="19 MiB"),
            line=BUSY,
        ),
        goals=(Goal("wall ratio", 0.9),),
    ),
)
