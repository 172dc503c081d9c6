"""Which certificates are trusted over TLS."""

from __future__ import annotations

import ssl
from pathlib import Path

from pipeline.errors import PlanError


def trusting(ca_file: Path | None) -> ssl.SSLContext:
    """A client's TLS that trusts the certificates in a PEM file, else the system's.

    Raises:
        PlanError: the file can't be read, or holds none.
    """
    if ca_file is None:
        return ssl.create_default_context()
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except ssl.SSLError:
        reason = "holds no certificate that is understood"
    except OSError as error:
        reason = f"can't be read: {(error.strerror or str(error)).lower()}"
    raise PlanError(
        f"the CA file {reason}",
        operation="plan",
        path=ca_file,
        hint="A PEM file with the certificate of the authority is wanted.",
    )
