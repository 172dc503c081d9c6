"""The one list of SPECs, in the order data passes. A new stage is one line here."""

from __future__ import annotations

from pipeline.flow.stage import Catalog
from stages.checksum import guest, image
from stages.compress import gzip, lz4, zstd
from stages.encode import gce, ova, qcow2, raw, vhd, vhdx, vmdk
from stages.read import disk, synthetic
from stages.read import image as image_source
from stages.sparse import zeros
from stages.verify import prove, readback, receipt, sample
from stages.write import azure_block, azure_page, device, file, gcs, http, nbd, null, pipe, s3, sftp

CATALOG = Catalog(
    (
        disk.SPEC,
        image_source.SPEC,
        synthetic.SPEC,
        guest.SPEC,
        zeros.SPEC,
        raw.SPEC,
        qcow2.SPEC,
        vhd.SPEC,
        vmdk.SPEC,
        vhdx.SPEC,
        gce.SPEC,
        ova.SPEC,
        lz4.SPEC,
        zstd.SPEC,
        gzip.SPEC,
        image.SPEC,
        file.SPEC,
        s3.SPEC,
        sftp.SPEC,
        http.SPEC,
        nbd.SPEC,
        device.SPEC,
        azure_block.SPEC,
        azure_page.SPEC,
        gcs.SPEC,
        pipe.SPEC,
        null.SPEC,
        receipt.SPEC,
        sample.SPEC,
        readback.SPEC,
        prove.SPEC,
    )
)
