"""The one list of stages, in the order data passes. A new one is one line here: its name, which its module has too."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from pipeline.flow.stage import Catalog, StageSpec

_NAMES = (
    "read.disk",
    "read.image",
    "read.synthetic",
    "checksum.guest",
    "sparse.zeros",
    "encode.raw",
    "encode.qcow2",
    "encode.vhd",
    "encode.vmdk",
    "encode.vhdx",
    "encode.gce",
    "encode.ova",
    "compress.lz4",
    "compress.zstd",
    "compress.gzip",
    "checksum.image",
    "write.file",
    "write.s3",
    "write.sftp",
    "write.http",
    "write.nbd",
    "write.device",
    "write.azure_block",
    "write.azure_page",
    "write.gcs",
    "write.pipe",
    "write.null",
    "verify.receipt",
    "verify.sample",
    "verify.readback",
    "verify.prove",
)


def _load(name: str) -> StageSpec:
    spec: StageSpec = import_module(f"stages.{name}").SPEC
    return spec


CATALOG = Catalog({name: partial(_load, name) for name in _NAMES})
