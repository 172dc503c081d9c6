"""Disk to an S3 store as compressed qcow2, against the usual two steps: convert into a local file, then upload it."""

from __future__ import annotations

from perf.case import Attempt, Case, Contender, Goal, Ground, StoredObject
from perf.cases.images import CONVERT, OUR_ZLIB
from perf.export import export_to_store
from perf.measure import one


def convert_then_upload(ground: Ground) -> Attempt:
    """The usual two steps."""
    if ground.store is None:
        raise ValueError("the upload needs a store")
    image, key = ground.folder / "image.qcow2", "rival.qcow2"
    upload = (ground.store.client, "s3", "cp", "--no-progress", "--endpoint-url", ground.store.endpoint)
    return Attempt(
        steps=(
            one(*CONVERT, "-c", "-O", "qcow2", str(ground.disk), str(image)),
            one(*upload, str(image), f"s3://{ground.store.bucket}/{key}"),
        ),
        image=StoredObject(key=key, format="qcow2"),
        environment=ground.store.environment,
    )


CASES = (
    Case(
        name="s3-zlib",
        summary="qcow2 with zlib clusters into an S3 store on this machine",
        disk="system",
        ours=export_to_store("pipeline qcow2 zlib fast to S3", "qcow2", OUR_ZLIB),
        rival=Contender("qemu-img -c, then aws s3 cp", convert_then_upload, needs_store=True),
        goals=(Goal("wall ratio", 6.0),),
    ),
)
