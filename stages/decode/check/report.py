"""What a check tells: typed findings, counts, and what the image says about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import FormatError

Kind = Literal["corruption", "leak", "warning"]
Verdict = Literal["clean", "leaks", "corrupt"]

# Findings kept with their text; all are counted. A damaged table makes thousands of the same.
FINDINGS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or odd.

    Attributes:
        kind: `corruption` endangers data; a `leak` only wastes space; a `warning` is odd, or refused by some importer.
        image_offset: bytes of the image file, where it has a place there.
        guest_offset: bytes of the guest disk, where it concerns a place there.
    """

    kind: Kind
    message: str
    image_offset: int | None = None
    guest_offset: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What an image says about itself, in one shape for every format.

    Attributes:
        variant: subformat or version in the format's own words.
        virtual_size, file_size: bytes.
        block_size: bytes of a cluster, grain or block; 0 where the format has none.
        compression: `none` or the codec's name.
        flags: features that are set, in the format's own words.
        identity: UUID or content ID; empty where there is none.
        details: more fields of this format, as (name, value).
    """

    format: str
    variant: str
    virtual_size: int
    file_size: int
    block_size: int = 0
    compression: str = "none"
    flags: tuple[str, ...] = ()
    identity: str = ""
    details: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The result of a check.

    Attributes:
        info: None where the image is too damaged to tell.
        findings: in the order they were found; the first `FINDINGS_MAX`.
        corruptions, leaks, warnings: how many of each there are, told or not. Leaks count blocks (clusters).
        blocks: of the guest disk; `data_blocks` are stored as they are, `packed_blocks` compressed, `zero_blocks`
            marked as zeros; the rest is not allocated.
        metadata_bytes: of headers and tables.
        is_deep: every stored block was read and unpacked.
        is_complete: False where damage stopped the check early.
    """

    format: str
    info: ImageInfo | None
    findings: tuple[Finding, ...]
    corruptions: int
    leaks: int
    warnings: int
    blocks: int = 0
    data_blocks: int = 0
    packed_blocks: int = 0
    zero_blocks: int = 0
    metadata_bytes: int = 0
    is_deep: bool = False
    is_complete: bool = True

    @property
    def verdict(self) -> Verdict:
        """`corrupt` with any corruption, `leaks` with leaks only, else `clean`, also with warnings."""
        return "corrupt" if self.corruptions else "leaks" if self.leaks else "clean"


@dataclass(slots=True)
class Tally:
    """A report in the making."""

    format: str
    info: ImageInfo | None = None
    blocks: int = 0
    data_blocks: int = 0
    packed_blocks: int = 0
    zero_blocks: int = 0
    metadata_bytes: int = 0
    is_complete: bool = True
    _findings: list[Finding] = field(default_factory=list)
    _counts: dict[Kind, int] = field(default_factory=dict)

    def corruption(self, message: str, at: int | None = None, guest: int | None = None, *, count: int = 1) -> None:
        """Note damage; `count` of the same, of which this is the first."""
        self._note(Finding("corruption", message, at, guest), count)

    def leak(self, message: str, at: int | None = None, *, blocks: int = 1) -> None:
        """Note wasted space of so many blocks."""
        self._note(Finding("leak", message, at), blocks)

    def warning(self, message: str, at: int | None = None, guest: int | None = None, *, count: int = 1) -> None:
        """Note something odd."""
        self._note(Finding("warning", message, at, guest), count)

    def count_more_corruptions(self, count: int) -> None:
        """Count damage without a text of its own."""
        self._counts["corruption"] = self._counts.get("corruption", 0) + count

    def error(self, error: FormatError, *, base: int = 0, guest_base: int = 0) -> None:
        """Note what a reader refused as corruption.

        Args:
            base, guest_base: added to the offsets of the error.
        """
        at, guest = error.context.get("offset"), error.context.get("guest_offset")
        self.corruption(
            error.message,
            at + base if isinstance(at, int) else None,
            guest + guest_base if isinstance(guest, int) else None,
        )

    def stop(self, error: FormatError) -> None:
        """Note damage that ends the check."""
        self.error(error)
        self.is_complete = False

    def adopt(self, other: Tally, *, base: int = 0, guest_base: int = 0) -> None:
        """Take over findings and counts of a part: an extent, or a disk inside an archive."""
        for one in other._findings:
            at = None if one.image_offset is None else one.image_offset + base
            guest = None if one.guest_offset is None else one.guest_offset + guest_base
            if len(self._findings) < FINDINGS_MAX:
                self._findings.append(Finding(one.kind, one.message, at, guest))
        for kind, count in other._counts.items():
            self._counts[kind] = self._counts.get(kind, 0) + count
        self.blocks += other.blocks
        self.data_blocks += other.data_blocks
        self.packed_blocks += other.packed_blocks
        self.zero_blocks += other.zero_blocks
        self.metadata_bytes += other.metadata_bytes
        self.is_complete = self.is_complete and other.is_complete

    def report(self, *, deep: bool) -> CheckReport:
        """The finished report."""
        return CheckReport(
            format=self.format,
            info=self.info,
            findings=tuple(self._findings),
            corruptions=self._counts.get("corruption", 0),
            leaks=self._counts.get("leak", 0),
            warnings=self._counts.get("warning", 0),
            blocks=self.blocks,
            data_blocks=self.data_blocks,
            packed_blocks=self.packed_blocks,
            zero_blocks=self.zero_blocks,
            metadata_bytes=self.metadata_bytes,
            is_deep=deep,
            is_complete=self.is_complete,
        )

    def _note(self, finding: Finding, count: int) -> None:
        self._counts[finding.kind] = self._counts.get(finding.kind, 0) + count
        if len(self._findings) < FINDINGS_MAX:
            self._findings.append(finding)
