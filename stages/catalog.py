"""The one list of SPECs, in the order data passes. A new stage is one line here."""

from __future__ import annotations

from pipeline.flow.stage import Catalog
from stages.checksum import guest
from stages.encode import qcow2, raw
from stages.read import disk, synthetic
from stages.sparse import zeros
from stages.verify import readback, receipt
from stages.write import file, null, s3

CATALOG = Catalog(
    (
        disk.SPEC,
        synthetic.SPEC,
        guest.SPEC,
        zeros.SPEC,
        raw.SPEC,
        qcow2.SPEC,
        file.SPEC,
        s3.SPEC,
        null.SPEC,
        receipt.SPEC,
        readback.SPEC,
    )
)
