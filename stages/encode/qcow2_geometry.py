"""The numbers of a qcow2 image that follow from its size and cluster size, and which of them cannot work.

Source: QCOW2 image format, "Header", "Host cluster management", "Cluster mapping", "Compressed Clusters Descriptor";
the limits on tables are those of QEMU's own reader.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import PlanError
from pipeline.units import KiB, MiB, format_exact, format_size, round_up

SECTOR = 512
CLUSTER_MIN = 512
CLUSTER_MAX = 2 * MiB

L1_MAX = 32 * MiB
REFCOUNT_TABLE_MAX = 8 * MiB
HOST_BITS_MAX = 56

# The shortest stream that a cluster can become: a zstd frame of one repeated byte takes 11 bytes, raw deflate more.
# 2 KiB / 11 streams and one that straddles are the most that can touch a cluster while 8 bits still count them.
_EIGHT_BIT_CLUSTER_MAX = 2 * KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Sizes of an image and its tables. Bytes, unless the name says otherwise.

    Attributes:
        head_length: the header's cluster and those kept free behind it; the body begins here.
        refcount_bits: width of a reference count.
    """

    cluster_size: int
    virtual_size: int
    head_length: int
    refcount_bits: int = 16

    @property
    def cluster_bits(self) -> int:
        """Binary logarithm of the cluster size."""
        return self.cluster_size.bit_length() - 1

    @property
    def clusters(self) -> int:
        """How many guest clusters there are."""
        return -(-self.virtual_size // self.cluster_size)

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table."""
        return self.cluster_size // 8

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table, one an L2 table."""
        return max(1, -(-self.clusters // self.l2_entries))

    @property
    def counts_per_block(self) -> int:
        """How many host clusters one refcount block counts."""
        return self.cluster_size * 8 // self.refcount_bits

    @property
    def offset_bits(self) -> int:
        """Width of the host offset in the descriptor of a compressed cluster."""
        return 62 - (self.cluster_bits - 8)

    def close(self, used: int, written: int) -> tuple[int, int]:
        """How many refcount blocks an image has in all, and how many clusters its refcount table takes.

        The blocks and the table count themselves, hence the search for numbers that agree.

        Args:
            used: host clusters before the remaining blocks and the table.
            written: refcount blocks among them.
        """
        blocks, table = written, 0
        while True:
            total = used + blocks - written + table
            wanted = -(-total // self.counts_per_block), -(-8 * blocks // self.cluster_size)
            if wanted == (blocks, table):
                return blocks, table
            blocks, table = wanted

    @property
    def worst_case(self) -> tuple[int, int]:
        """Length of the image that stores every cluster plain, and of its refcount table.

        Compressing never makes it longer: the streams between two aligned places are shorter than their clusters, so
        with the pad behind them they take at most as many host clusters as there were guest clusters.
        """
        size = self.cluster_size
        used = self.head_length // size + self.clusters + self.l1_entries + round_up(8 * self.l1_entries, size) // size
        blocks, table = self.close(used, 0)
        return (used + blocks + table) * size, table * size


def plan_geometry(*, cluster_size: int, compressed: bool, disk_size: int, window: int, head_minimum: int) -> Geometry:
    """The geometry for a disk.

    Raises:
        PlanError: no such image can be read; the hint names the smallest cluster size that works.
    """
    if window % cluster_size:
        raise PlanError(
            "a cluster is longer than the window that is read at once",
            operation="plan",
            cluster_size=format_size(cluster_size),
            window=format_size(window),
            hint=f'Set cluster_size to "{format_size(window & -window)}" or less.',
        )
    geometry, reason = _try(cluster_size, compressed, disk_size, head_minimum)
    if not reason:
        return geometry
    larger = cluster_size * 2
    while larger <= CLUSTER_MAX and _try(larger, compressed, disk_size, head_minimum)[1]:
        larger *= 2
    raise PlanError(
        f"clusters of {format_size(cluster_size)} can't address a disk of {format_exact(disk_size)}: {reason}",
        operation="plan",
        hint=(
            f'Set cluster_size to "{format_size(larger)}" or more, or write another format, such as encode.raw.'
            if larger <= CLUSTER_MAX
            else "The disk is too large for qcow2; write another format, such as encode.raw."
        ),
    )


def _try(cluster_size: int, compressed: bool, disk_size: int, head_minimum: int) -> tuple[Geometry, str]:
    """The geometry, and why it does not work."""
    geometry = Geometry(
        cluster_size=cluster_size,
        virtual_size=round_up(disk_size, SECTOR),
        head_length=round_up(max(cluster_size, head_minimum), cluster_size),
    )
    if geometry.l1_entries * 8 > L1_MAX:
        return geometry, f"the L1 table would be longer than {format_size(L1_MAX)}"
    length, table = geometry.worst_case
    if table > REFCOUNT_TABLE_MAX and (not compressed or cluster_size <= _EIGHT_BIT_CLUSTER_MAX):
        # Within one percent of the largest disk that an L1 table addresses, 16-bit counts need more than the largest
        # refcount table. Narrow counts suffice where few streams fit into a cluster, and plain clusters count to 1.
        geometry = Geometry(
            cluster_size=cluster_size,
            virtual_size=geometry.virtual_size,
            head_length=geometry.head_length,
            refcount_bits=8,
        )
        length, table = geometry.worst_case
    if table > REFCOUNT_TABLE_MAX:
        return geometry, f"the refcount table would be longer than {format_size(REFCOUNT_TABLE_MAX)}"
    bits = min(geometry.offset_bits, HOST_BITS_MAX) if compressed else HOST_BITS_MAX
    if length > 1 << bits:
        return geometry, f"the image could outgrow the {bits} bits of an offset in it"
    return geometry, ""
