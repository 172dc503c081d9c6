"""Only the used blocks of a filesystem, against qemu-img, which copies what was ever written, and partclone."""

from __future__ import annotations

from perf.case import Attempt, Case, Contender, Goal, Ground, StoredFile
from perf.cases.images import OUR_PLAIN, OUR_RAW, QEMU_PLAIN
from perf.export import export_to_file
from perf.measure import one


def _partclone(ground: Ground) -> Attempt:
    """Partclone's own format; without checksums, which cost it time. It does not read with O_DIRECT."""
    image = ground.folder / "image.partclone"
    log = ground.folder / "partclone.log"
    words = ("-c", "-F", "-a", "0", "-f", "0", "-L", str(log), "-s", str(ground.disk), "-o", str(image))
    return Attempt(
        steps=(one("partclone.ext4", *words),),
        image=StoredFile(path=image, format="raw", is_proven=False),
        environment={"TERM": "dumb"},
    )


PARTCLONE = Contender("partclone", _partclone)
OUR_QCOW2_USED = export_to_file("pipeline qcow2 plain, used blocks", "qcow2", OUR_PLAIN, filesystem="ext4")
OUR_RAW_USED = export_to_file("pipeline raw, used blocks", "raw", OUR_RAW, filesystem="ext4")

CASES = (
    Case(
        name="used-deleted",
        summary="plain qcow2 of a filesystem with 30 % deleted data",
        disk="partly-deleted",
        ours=OUR_QCOW2_USED,
        rival=QEMU_PLAIN,
        goals=(Goal("wall ratio", 1.0), Goal("size ratio", 0.75), Goal("read ratio", 0.77)),
    ),
    Case(
        name="used-empty",
        summary="plain qcow2 of a mostly empty filesystem of 100 GiB",
        disk="empty-ext4",
        ours=OUR_QCOW2_USED,
        rival=QEMU_PLAIN,
        # All that was ever written is in use here, so qemu-img reads the used bytes.
        goals=(Goal("wall ratio", 1.0), Goal("size ratio", 1.0), Goal("read ratio", 1.02)),
    ),
    Case(
        name="used-partclone",
        summary="the same blocks as partclone, of a filesystem with 30 % deleted data",
        disk="partly-deleted",
        ours=OUR_RAW_USED,
        rival=PARTCLONE,
        # partclone reads each used block once: what is read with neighbours and over small gaps may add 2 %.
        goals=(Goal("wall ratio", 1.0), Goal("size ratio", 1.02), Goal("read ratio", 1.02)),
    ),
    Case(
        name="used-partclone-empty",
        summary="the same blocks as partclone, of a mostly empty filesystem of 100 GiB",
        disk="empty-ext4",
        ours=OUR_RAW_USED,
        rival=PARTCLONE,
        goals=(Goal("wall ratio", 1.0), Goal("size ratio", 1.02), Goal("read ratio", 1.02)),
    ),
)
