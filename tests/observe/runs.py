"""Manifests of runs that look like real ones, without a run."""

from __future__ import annotations

import random
from typing import Any

from pipeline.events import ProgressSampled, RetryScheduled
from pipeline.flow.items import Content, Run, Why
from pipeline.flow.manifest import DiskRecord, ImageRecord, Manifest, pack_runs
from pipeline.flow.meter import StageMeter
from pipeline.flow.series import SeriesRecorder
from pipeline.units import GiB, MiB

SIZE = 40 * GiB
CHAIN = ("read.disk", "checksum.guest", "sparse.zeros", "encode.qcow2", "write.s3")

# The first half is data and free space in turns, then swap, holes to the end, padding last.
_HALVES = ((Why.READ, 700), (Why.SCANNED, 24), (Why.FREE, 300))


def disk_runs() -> list[Run]:
    """A map of SIZE bytes with every reason in it."""
    lengths: list[tuple[Why, int]] = []
    for _ in range(20):
        lengths += [(why, mib * MiB) for why, mib in _HALVES]
    lengths += [(Why.SWAP, 2 * GiB)]
    used = sum(length for _, length in lengths)
    lengths += [(Why.HOLE, SIZE - used - 8 * MiB), (Why.PAD, 8 * MiB)]
    runs, offset = [], 0
    for why, length in lengths:
        content = Content.DATA if why is Why.READ else Content.ZERO
        runs.append(Run(offset, length, content, why))
        offset += length
    return runs


def recorded(seconds: int = 60) -> SeriesRecorder:
    """A transfer with a bad quarter of a minute."""
    recorder, chance = SeriesRecorder(), random.Random(7)
    working = dict.fromkeys(CHAIN, 0.0)
    for quarter in range(1, 4 * seconds + 1):
        done = quarter / (4 * seconds)
        for name, share in zip(CHAIN, (0.8, 0.2, 0.1, 2.0, 7.4), strict=True):
            working[name] += share / 4 * chance.uniform(0.8, 1.2)
        if 80 < quarter < 120 and quarter % 8 == 0:
            recorder(
                RetryScheduled(stage="write.s3", operation="put_part", attempt=2, wait_s=1.0, reason="503 SlowDown")
            )
        recorder(
            ProgressSampled(
                elapsed_s=quarter / 4,
                disk_bytes=SIZE,
                read_bytes=round(14 * GiB * done),
                skipped_bytes=round(26 * GiB * done),
                acked_bytes=round(SIZE * done),
                stored_bytes=round(8 * GiB * done),
                waits={name: (seconds_, 0.01 * quarter, 0.02 * quarter, 0.0) for name, seconds_ in working.items()},
            )
        )
    return recorder


def manifest(**changes: Any) -> Manifest:
    """A verified export into an object store."""
    runs = disk_runs()
    totals: dict[str, int] = {}
    for run in runs:
        totals[run.why.value] = totals.get(run.why.value, 0) + run.length
    meters = [StageMeter(name, parallelism=8 if name == "write.s3" else 4) for name in CHAIN]
    series = recorded().series(meters)
    values: dict[str, Any] = {
        "name": "web01",
        "created": "2026-11-23T04:12:09+00:00",
        "disk": DiskRecord(
            size=SIZE,
            identity={"path": "/dev/sda", "kind": "block device", "serial": "S3Z9NB0K123456"},
            totals=totals,
            runs=pack_runs(runs),
        ),
        "image": ImageRecord(
            uri="s3://images/web01.qcow2",
            format="qcow2",
            size=8 * GiB,
            virtual_size=SIZE,
            window=2 * MiB,
            order="head last",
            head_length=5 * MiB,
        ),
        "state": "identical",
        "facts": {
            "guest digest": {"algorithm": "xxh3-128", "root": "9f86d081884c7d659a2feaa0c55ad015", "leaves": ""},
            "partitions": [
                {"number": 1, "start": MiB, "length": 20 * GiB - MiB, "filesystem": "ext4", "label": "root"},
                {"number": 2, "start": 20 * GiB, "length": 2 * GiB, "filesystem": "swap"},
            ],
        },
        "options": {
            "export": {"name": "web01", "memory": 96 * MiB, "manifest": None},
            **{name: {} for name in CHAIN},
            "encode.qcow2": {"compression": "zlib", "level": "fast"},
            "write.s3": {"url": "s3://images/web01.qcow2", "endpoint": "https://s3.example.com", "overwrite": False},
            "verify.readback": {"parallel": 4},
        },
        "receipt": (("crc64nvme", "q83vEjRWeJA=", "q83vEjRWeJA="),),
        "verdicts": (
            {
                "level": "readback",
                "state": "identical",
                "coverage": 1.0,
                "differing": [],
                "detail": "all 40960 leaves are the same",
                "evidence": {"root": "9f86d081884c7d659a2feaa0c55ad015"},
            },
        ),
        "versions": {"disk-pipeline": "0.1.0", "python": "3.11.7", "isal": "1.9.1"},
        "timings": {
            name: dict(zip(("working", "in", "out", "buffer"), series.stages[name][-1], strict=True)) for name in CHAIN
        },
        "bottleneck": "write.s3 was the bottleneck: busy 93% of the time.",
        "elapsed_s": 75.0,
        "series": series.to_json(),
        **changes,
    }
    return Manifest(**values)
