"""verify.receipt: only a checksum that agrees proves anything."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from pipeline.errors import StoreError
from pipeline.flow.items import RangeReader, Receipt, StoredImage, Verdict
from stages.verify.receipt import SPEC, Options, ReceiptCheck, judge, receipt_of
from tests.decode.images import BytesReader
from tests.verify.context import make_context


@asynccontextmanager
async def no_reader() -> AsyncIterator[RangeReader]:
    raise AssertionError("a receipt reads nothing")
    yield  # type: ignore[unreachable]  # makes it a generator


async def verdict_on(receipt: Receipt | StoreError | None, *, size: int = 100) -> Verdict:
    @asynccontextmanager
    async def fetch() -> AsyncIterator[Receipt]:
        assert receipt is not None
        if isinstance(receipt, StoreError):
            raise receipt
        yield receipt

    image = StoredImage("memory:image", size, no_reader, fetch if receipt is not None else None)
    return await ReceiptCheck(Options(), make_context(SPEC.name, disk_size=0)).verify(image)


async def test_equal_checksums_over_the_right_size_are_identical() -> None:
    verdict = await verdict_on(Receipt(100, (("CRC64NVME", "a", "a"), ("ETag (MD5)", "b", "b"))))
    assert (verdict.level, verdict.state, verdict.coverage) == ("receipt", "identical", 1.0)
    assert verdict.evidence == {"CRC64NVME": "a", "ETag (MD5)": "b"}


async def test_one_checksum_that_differs_outweighs_those_that_agree() -> None:
    verdict = await verdict_on(Receipt(100, (("CRC64NVME", "a", "a"), ("ETag (MD5)", "b", "c"))))
    assert verdict.state == "differs"
    assert "ETag (MD5) is c, ours is b" in verdict.detail


async def test_another_size_differs_whatever_the_checksums_say() -> None:
    verdict = await verdict_on(Receipt(99, (("CRC64NVME", "a", "a"),)))
    assert verdict.state == "differs"
    assert "99 bytes, 100 were sent" in verdict.detail


@pytest.mark.parametrize("receipt", [None, Receipt(100), Receipt(100, note="a filesystem keeps no checksum")])
async def test_without_a_checksum_it_is_unproven_and_says_what_would_prove_it(receipt: Receipt | None) -> None:
    verdict = await verdict_on(receipt)
    assert (verdict.state, verdict.coverage) == ("unproven", 0.0)
    assert "verify.readback" in verdict.detail
    if receipt is not None:
        assert receipt.note in verdict.detail


async def test_a_store_that_can_not_be_asked_is_no_verdict() -> None:
    with pytest.raises(StoreError, match="away"):
        await verdict_on(StoreError("the store went away", temporary=True))


class Attested(BytesReader):
    attested: Mapping[str, str] = {"CRC64NVME": "a", "CRC32C": ""}


RECORDED = (("CRC64NVME", "a", "a"), ("CRC32C", "b", "b"), ("ETag (MD5)", "c", "c"))


def test_a_later_receipt_compares_what_was_recorded_with_what_the_store_says_now() -> None:
    receipt = receipt_of(Attested(bytes(100)), RECORDED)
    assert receipt.proofs == (("CRC64NVME", "a", "a"),)
    assert judge(receipt, size=100).state == "identical"
    assert judge(receipt_of(Attested(bytes(100)), (("CRC64NVME", "x", "x"),)), size=100).state == "differs"
    assert judge(receipt_of(BytesReader(bytes(100)), RECORDED), size=100).state == "unproven"
    assert judge(receipt_of(Attested(bytes(99)), RECORDED), size=100).state == "differs"
