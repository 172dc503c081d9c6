"""Images and manifests that are stored already, by path or URL."""

from __future__ import annotations

import os
import stat
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from pipeline.config.options import without_secrets
from pipeline.errors import FormatError, PlanError, StoreError
from pipeline.units import MiB
from stages.store.file import local_path, open_file_reader

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.flow.items import RangeReader
    from pipeline.flow.manifest import Manifest

# A manifest has 22 bytes for each MiB of a full disk: this is one of 10 TiB.
_MANIFEST_MAX = 256 * MiB


def open_stored(
    url: str, endpoint: str = "", *, ca_file: Path | None = None
) -> AbstractAsyncContextManager[RangeReader]:
    """Open a path or URL for reading, by the stage of the catalog that answers for its scheme.

    Args:
        ca_file: PEM certificates to trust instead of the system's, where the scheme has any.
    Raises:
        PlanError: no stage does. Entering it raises StoreError where it can't be read.
    """
    scheme = scheme_of(url)
    if scheme == "file":
        return open_file_reader(url)  # the catalog's own, without importing every stage there is
    from stages.catalog import CATALOG

    for spec in CATALOG:
        if scheme in spec.schemes and spec.open_reader is not None:
            opened: AbstractAsyncContextManager[RangeReader] = spec.open_reader(url, endpoint=endpoint, ca_file=ca_file)
            return opened
    known = sorted({scheme for spec in CATALOG for scheme in spec.schemes if spec.open_reader is not None})
    raise PlanError(
        f"nothing is stored under {scheme}: URLs here",
        operation="open",
        url=without_secrets(url),
        hint=f"A path, or a URL that begins with {', '.join(f'{one}://' for one in known)}.",
    )


def scheme_of(url: str) -> str:
    """The scheme of a URL; `file` for a path."""
    return url.partition("://")[0] if "://" in url else "file"


def image_of(reader: RangeReader, image: str, manifest: Manifest) -> RangeReader:
    """The image as its manifest has it: on a disk, which may be larger, only its first bytes."""
    from stages.store.first_bytes import FirstBytes

    if is_disk(image) and reader.size > manifest.image.size:
        return FirstBytes(reader, manifest.image.size)
    return reader


def is_disk(place: str) -> bool:
    """Whether a path or URL names a disk that is written in place: an NBD export, or a block device."""
    if scheme_of(place) != "file":
        return scheme_of(place).startswith("nbd")
    try:
        return stat.S_ISBLK(os.stat(local_path(place)).st_mode)
    except OSError:
        return False


async def read_manifest(image: str, endpoint: str, told: str = "", *, ca_file: Path | None = None) -> Manifest:
    """The manifest of the image at a path or URL.

    Args:
        ca_file: as for `open_stored`.
        told: where it is, if not beside the image.
    Raises:
        FormatError: it is none, or contradicts itself. StoreError: it can't be read.
    """
    from pipeline.flow.manifest import Manifest, manifest_uri

    if not told and is_disk(image):
        raise StoreError(
            "there is no place for a manifest beside a disk",
            operation="read manifest",
            image=without_secrets(image),
            hint="Name the one that the export left on its machine: --manifest FILE.",
        )
    where = told or manifest_uri(image)
    shown = without_secrets(where)
    try:
        async with open_stored(where, endpoint, ca_file=ca_file) as reader:
            if reader.size > _MANIFEST_MAX:
                raise FormatError(
                    "this is too large for a manifest",
                    operation="read manifest",
                    size=reader.size,
                    limit=_MANIFEST_MAX,
                    manifest=shown,
                )
            text = await reader.read(0, reader.size)
    except StoreError as error:
        raise StoreError(
            f"the manifest can't be read: {error}",
            temporary=error.temporary,
            status=error.status,
            hint=f"{error.hint} It belongs beside the image, as {shown}.".lstrip(),
        ) from error
    made = Manifest.from_json(text, where=shown)
    if not _is_usable(made):
        raise FormatError(
            "the manifest does not say what the image is",
            operation="read manifest",
            manifest=shown,
            hint="It was damaged or changed by hand; fetch it again.",
        )
    return made


def _is_usable(manifest: Manifest) -> bool:
    """Whether what is used here has the types that it should have: the file may come from anywhere."""
    numbers = (manifest.disk.size, manifest.image.size, manifest.image.virtual_size)
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and isinstance(manifest.image.format, str)
        and isinstance(manifest.facts, dict)
        and all(len(proof) == 3 and all(isinstance(text, str) for text in proof) for proof in manifest.receipt)
    )
