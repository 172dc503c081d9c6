"""The map of a run: which guest ranges were data, which were zero, and why."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from pipeline.flow.facts import Fact
from pipeline.flow.items import Block, Content, Run, Why

SKIPPED_RANGES: Fact[tuple[range, ...]] = Fact("skipped ranges", tuple)

# A run costs 9 bytes; a million of them cover the worst disks seen. Beyond it, runs are merged by window.
_RUNS_MAX = 1_000_000
_WHYS = tuple(Why)


class MapRecorder:
    """Collects the runs of every block, in order, merged where neighbours are alike."""

    def __init__(self) -> None:
        self._lengths = array("Q")
        self._whys = array("B")
        self.totals = dict.fromkeys(Why, 0)

    def observe(self, block: Block) -> None:
        """Add the runs of the next block."""
        for run in block.runs:
            self.totals[run.why] += run.length
            why = _WHYS.index(run.why)
            if self._whys and (self._whys[-1] == why or len(self._whys) >= _RUNS_MAX):
                self._lengths[-1] += run.length
            else:
                self._lengths.append(run.length)
                self._whys.append(why)

    @property
    def is_exact(self) -> bool:
        """False once runs had to be merged because there were too many."""
        return len(self._whys) < _RUNS_MAX

    @property
    def read_bytes(self) -> int:
        """Guest bytes that were read from the source."""
        return self.totals[Why.READ] + self.totals[Why.SCANNED]

    def runs(self) -> Iterator[Run]:
        """The merged runs, in guest order."""
        offset = 0
        for length, code in zip(self._lengths, self._whys, strict=True):
            why = _WHYS[code]
            yield Run(offset, length, Content.DATA if why is Why.READ else Content.ZERO, why)
            offset += length

    def skipped(self) -> tuple[range, ...]:
        """Ranges that were never read but should read as zero from the source too: holes."""
        return tuple(range(run.offset, run.end) for run in self.runs() if run.why is Why.HOLE)
