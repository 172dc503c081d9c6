"""A certificate authority and a certificate for a server on 127.0.0.1, made with the openssl program."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_DAYS = "30"
_NAMES = "subjectAltName=IP:127.0.0.1,DNS:localhost"
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")  # RSA keys take up to a second to make.


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCertificate:
    """Files of a server that speaks TLS.

    Attributes:
        ca: what clients must trust; a client that does not must refuse the server.
    """

    certificate: Path
    key: Path
    ca: Path


def make_certificate(folder: Path) -> ServerCertificate:
    """Make a certificate in this folder; the one that is there is kept, so that a restarted server is still trusted."""
    made = ServerCertificate(certificate=folder / "server.pem", key=folder / "server.key", ca=folder / "ca.pem")
    if made.certificate.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    ca_key = folder / "ca.key"
    _openssl("req", "-x509", *_KEY, "-keyout", ca_key, "-out", made.ca, "-days", _DAYS, "-subj", "/CN=test authority")
    _openssl(
        *(
            "req",
            "-x509",
            *_KEY,
            "-keyout",
            made.key,
            "-out",
            made.certificate,
            "-days",
            _DAYS,
            "-subj",
            "/CN=127.0.0.1",
        ),
        *("-CA", made.ca, "-CAkey", ca_key, "-addext", _NAMES, "-addext", "basicConstraints=critical,CA:FALSE"),
    )
    return made


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
