"""What an encoder's state looks like on paper: a note and byte strings, bound to all that shapes the image."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from typing import Any

from pipeline.errors import PlanError


def identify(**shape: object) -> str:
    """A digest of all that shapes an image besides the disk: options, geometry, window, what a codec makes."""
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def pack_state(identity: str, note: dict[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    """The state as bytes, compressed."""
    full = {**note, "identity": identity, "lengths": [len(part) for part in parts]}
    return zlib.compress(b"\n".join((json.dumps(full).encode(), b"".join(parts))), 1)


def unpack_state(identity: str, state: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The note and the parts.

    Raises:
        PlanError: it is damaged, or was made with other options, for another disk, or by a codec that gives other
            bytes.
    """
    try:
        head, _, body = zlib.decompress(state).partition(b"\n")
        note: dict[str, Any] = json.loads(head)
        parts = []
        for length in note["lengths"]:
            parts.append(body[:length])
            body = body[length:]
        known = note["identity"] == identity
    except (zlib.error, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise PlanError(
            "the checkpoint belongs to another export",
            operation="restore",
            hint="Resume with the same program version, options and disk on the same kind of machine, "
            "or start the export again.",
        )
    return note, parts
