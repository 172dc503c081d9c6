"""Compare the store's own account of the image (size, checksums) with ours. Reads no image byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pipeline.flow.items import RangeReader, Receipt, StoredImage, Verdict
from pipeline.flow.stage import STORED_IMAGE, VERDICT, StageContext, StageSpec

_PROPOSAL = "use verify.readback to compare the image itself"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    pass


class ReceiptCheck:
    """Believe the store when it can show checksums over every byte that it holds."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._context = context

    async def verify(self, image: StoredImage) -> Verdict:
        """Ask the store what it holds.

        Raises:
            StoreError: the store can't be asked.
        """
        if image.fetch_receipt is None:
            return _unproven("this store gives no receipt")
        async with image.fetch_receipt() as receipt:
            return judge(receipt, size=image.size)


@runtime_checkable
class Attesting(Protocol):
    """A RangeReader of a store that states checksums of the whole object."""

    @property
    def attested(self) -> Mapping[str, str]:
        """Checksums by the names that receipts use; only those that the store states now."""
        ...


def receipt_of(reader: RangeReader, recorded: Sequence[tuple[str, str, str]]) -> Receipt:
    """What the store says now, beside what was `recorded` as ours when the image was written."""
    attested = reader.attested if isinstance(reader, Attesting) else {}
    proofs = tuple((what, ours, attested[what]) for what, ours, _ in recorded if attested.get(what))
    return Receipt(reader.size, proofs, "" if proofs else "the store states no checksum that was recorded")


def judge(receipt: Receipt, *, size: int) -> Verdict:
    """What a receipt proves about an image of `size` bytes..

    "identical" needs a proof: sizes that agree prove nothing.
    """
    evidence = {what: theirs for what, _, theirs in receipt.proofs}
    if receipt.size != size:
        return Verdict(
            "receipt",
            "differs",
            0.0,
            detail=f"the store holds {receipt.size} bytes, {size} were sent",
            evidence=evidence,
        )
    wrong = [(what, ours, theirs) for what, ours, theirs in receipt.proofs if ours != theirs]
    if wrong:
        what, ours, theirs = wrong[0]
        return Verdict(
            "receipt", "differs", 1.0, detail=f"the store's {what} is {theirs}, ours is {ours}", evidence=evidence
        )
    if not receipt.proofs:
        return _unproven(receipt.note or "the store keeps no checksum of the image")
    names = ", ".join(what for what, _, _ in receipt.proofs)
    return Verdict(
        "receipt", "identical", 1.0, detail=f"the store confirms {size} bytes and {names}", evidence=evidence
    )


def _unproven(reason: str) -> Verdict:
    return Verdict("receipt", "unproven", 0.0, detail=f"{reason}; {_PROPOSAL}")


SPEC = StageSpec(
    name="verify.receipt",
    summary="Compare the store's checksums of the image with ours; reads nothing back.",
    options=Options,
    takes=STORED_IMAGE,
    gives=VERDICT,
    build=ReceiptCheck,
)
