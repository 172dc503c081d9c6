"""Which windows of a disk a sample looks at, and what may be claimed afterwards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.flow.items import Verdict
from pipeline.units import format_size
from stages.checksum.leaves import LEAF, GuestDigest

# Windows of zeros that are looked at too: what should be zero and is not would go unnoticed otherwise.
ZERO_WINDOWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A seeded choice of windows. The same seed, share and disk give the same choice.

    Attributes:
        share: of the windows that hold data, 0.0 to 1.0.
        at_least: bytes of data that are compared even where the share is less.
    """

    seed: str
    share: float
    at_least: int = 0

    def windows(self, digest: GuestDigest, window: int) -> Sequence[range]:
        """Guest ranges, ascending: first and last window (boot code, partition tables), data, and a few zeros.

        Args:
            window: guest bytes, whole leaves.
        """
        count = max(1, -(-digest.size // window))
        per_window = window // LEAF
        data: set[int] = set()
        for found in digest.leaves.nonzero(0, digest.leaves.total):
            data.update(range(found.start // per_window, -(-found.stop // per_window)))
        draw = random.Random(self.seed)
        wanted = max(round(self.share * len(data)), -(-self.at_least // window))
        chosen = {0, count - 1, *draw.sample(sorted(data), min(len(data), wanted))}
        zeros = {number for number in (draw.randrange(count) for _ in range(4 * ZERO_WINDOWS)) if number not in data}
        chosen.update(draw.sample(sorted(zeros), min(len(zeros), ZERO_WINDOWS)))
        return [range(number * window, min((number + 1) * window, digest.size)) for number in sorted(chosen)]

    def judge(self, verdict: Verdict, digest: GuestDigest) -> Verdict:
        """The verdict of a comparison of these windows, which claims no more than it knows."""
        compared = int(verdict.evidence["compared_bytes"])
        data = sum(len(found) for found in digest.leaves.nonzero(0, digest.leaves.total)) * LEAF
        detail = verdict.detail
        if verdict.state == "identical":
            detail = (
                f"{compared} of {digest.size} bytes of the disk ({verdict.coverage:.2%}) were read back and are what "
                f"was read ({digest.algorithm}); {format_size(data)} of it hold data"
            )
            if compared < digest.size:
                detail += "; the rest was not looked at"
        evidence = {**verdict.evidence, "seed": self.seed, "share": f"{self.share:g}"}
        return replace(verdict, level="sample", detail=detail, evidence=evidence)
