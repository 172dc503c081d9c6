"""Go on from encoder checkpoints in a new process, and say what came out.

One JSON object on stdin: the stage, its options, the disk, and checkpoints (blocks placed, state in base64). One JSON
list on stdout: the digest of all that each resumed encoder placed.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

from stages.catalog import CATALOG
from tests.encode.lettered import LetterDisk, export


def main() -> None:
    """Read the request, resume each checkpoint, print the digests."""
    request: dict[str, Any] = json.load(sys.stdin)
    spec = CATALOG.find(request["stage"])
    assert spec is not None
    options = spec.options(**request["options"])
    source = LetterDisk(tuple((letter, length) for letter, length in request["extents"]))
    digests = [
        export(
            spec,
            options,
            source,
            head_minimum=request["head_minimum"],
            resume=(placed, base64.b64decode(state)),
        ).digest()
        for placed, state in request["checkpoints"]
    ]
    json.dump(digests, sys.stdout)


if __name__ == "__main__":
    main()
