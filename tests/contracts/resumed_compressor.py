"""Go on from compressor checkpoints in a new process, and say what came out; see `resumed_encoder`."""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

from stages.catalog import CATALOG
from tests.compress.streams import compress, mixed_image


def main() -> None:
    """Read the request, resume each checkpoint, print the digests."""
    request: dict[str, Any] = json.load(sys.stdin)
    spec = CATALOG.find(request["stage"])
    assert spec is not None
    options = spec.options(**request["options"])
    digests = [
        compress(spec, options, mixed_image(), resume=(offset, base64.b64decode(state))).digest()
        for offset, state in request["checkpoints"]
    ]
    json.dump(digests, sys.stdout)


if __name__ == "__main__":
    main()
