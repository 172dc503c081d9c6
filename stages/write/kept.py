"""What the driver of parts notes in a run's journal, and what it finds there of an earlier process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.flow.stage import KeptPart, UploadJournal
from stages.store.digests import Sums
from stages.write.parts import PartPlan
from stages.write.shapes import StoredPart


def sums_to_text(sums: Sums) -> dict[str, str]:
    """Checksums by name, in hex."""
    found = {
        "crc64nvme": None if sums.crc64nvme is None else f"{sums.crc64nvme:016x}",
        "crc32c": None if sums.crc32c is None else f"{sums.crc32c:08x}",
        "md5": None if sums.md5 is None else sums.md5.hex(),
    }
    return {name: value for name, value in found.items() if value is not None}


def sums_from_text(length: int, text: Mapping[str, str]) -> Sums:
    """What `sums_to_text` wrote."""
    return Sums(
        length=length,
        crc64nvme=int(text["crc64nvme"], 16) if "crc64nvme" in text else None,
        crc32c=int(text["crc32c"], 16) if "crc32c" in text else None,
        md5=bytes.fromhex(text["md5"]) if "md5" in text else None,
    )


def stored_part(kept: KeptPart) -> StoredPart:
    """A part of an earlier process, as the upload's `seal` wants it."""
    return StoredPart(number=kept.number, length=kept.length, tag=kept.tag, sums=sums_from_text(kept.length, kept.sums))


def resume_offset(plan: PartPlan, parts: Mapping[int, KeptPart]) -> int:
    """The lowest image offset behind the head whose part is not stored."""
    reached = plan.head_length
    for part in plan.body:
        kept = parts.get(part.number)
        if kept is None:
            break
        reached = part.start + kept.length
    return reached


def fitting(plan: PartPlan, parts: Mapping[int, KeptPart]) -> dict[int, KeptPart]:
    """Those that lie where the plan has them; only the image's last part may be shorter than planned."""
    planned = {part.number: part for part in plan.parts}
    return {
        number: kept
        for number, kept in parts.items()
        if number in planned and planned[number].start == kept.start and kept.length <= planned[number].length
    }


class PartJournal:
    """Notes an upload in parts.

    Args:
        state: what is needed to find the upload again, at any moment.
    """

    def __init__(self, journal: UploadJournal, state: Callable[[], Mapping[str, Any]]) -> None:
        self._journal = journal
        self._state = state

    @property
    def start(self) -> int:
        """Image offset of the first piece that comes."""
        return self._journal.start.position

    @property
    def guest_bytes(self) -> int:
        """That the pieces before `start` accounted for."""
        return self._journal.start.guest_bytes

    @property
    def parts(self) -> Mapping[int, KeptPart]:
        """Parts that the store has, from this process or an earlier one."""
        return self._journal.parts

    @property
    def resends(self) -> bool:
        """Whether a part that holds other bytes now may be sent again."""
        return self._journal.resends

    @property
    def is_open(self) -> bool:
        """Whether an earlier process opened the upload."""
        return bool(self._journal.upload)

    def note_state(self, **more: Any) -> None:
        """The upload's state changed, or is about to."""
        self._journal.note_upload({**self._state(), **more})

    def note_part(self, start: int, guest_bytes: int, stored: StoredPart) -> None:
        """The store acknowledged a part."""
        self._journal.note_part(
            KeptPart(
                number=stored.number,
                start=start,
                length=stored.length,
                guest_bytes=guest_bytes,
                tag=stored.tag,
                sums=sums_to_text(stored.sums),
            )
        )

    def keeps(self, error: BaseException) -> bool:
        """Whether the upload stays after this failure."""
        return self._journal.keeps(error)


class OrderedJournal(PartJournal):
    """Notes an upload whose bytes come in order: no part can be sent again once the store has it."""

    @property
    def resends(self) -> bool:
        """Never."""
        return False
