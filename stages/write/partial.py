"""The name under which an image is written before it is the result: `.NAME.EXPORT.TOKEN.partial`, beside the target."""

from __future__ import annotations

import re

from pipeline.flow.manifest import MANIFEST_SUFFIX

_PARTIAL = re.compile(rf"\.?(?P<target>.+)\.[^.]+\.[0-9a-z]+\.partial(?:{re.escape(MANIFEST_SUFFIX)})?")


def partial_name(target: str, export_name: str, token: str, *, hidden: bool = True) -> str:
    """The temporary name of the file `target`.

    Args:
        token: lower-case letters and digits that no other run has: a pid where the folder is this machine's alone.
        hidden: with a dot in front. Some web servers leave such names out of their listings, or refuse them.
    """
    export = (export_name or "export").replace("/", "-").replace(".", "-")  # no dot: or the target could not be told
    return f"{'.' if hidden else ''}{target}.{export}.{token}.partial"


def is_partial(name: str, target: str = "") -> bool:
    """Whether a run of ours made a file of this name, for this target or for any."""
    found = _PARTIAL.fullmatch(name)
    return found is not None and target in ("", found["target"])
