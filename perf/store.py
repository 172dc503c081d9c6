"""A real S3 server for the cases that need one: the test suite's SeaweedFS, empty at the start of each run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perf.case import Line
    from tests.stores.s3 import S3Server

BUCKET = "perf"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Store:
    """One bucket of a running server."""

    server: S3Server
    client: str
    """The usual client's command, `aws`."""
    environment: Mapping[str, str]
    bucket: str = field(default=BUCKET)
    port: int = 0
    """Of what lies in between, where something does."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}" if self.port else self.server.endpoint

    def size(self, key: str) -> int:
        return int(self.server.client().head_object(Bucket=self.bucket, Key=key)["ContentLength"])

    def fetch(self, key: str, path: Path) -> None:
        body = self.server.client().get_object(Bucket=self.bucket, Key=key)["Body"]
        with path.open("xb") as file:
            for chunk in body.iter_chunks(_CHUNK):
                file.write(chunk)


@contextmanager
def running_store(folder: Path, line: Line | None = None) -> Iterator[S3Store]:
    """Start a server with an empty bucket in `folder`, which is made and removed; it is reached over the line."""
    # Here and not at the top: most cases need no store, and its server comes from the test suite's own packages.
    from tests.stores.seaweedfs import SeaweedFs

    folder.mkdir(parents=True)
    try:
        with SeaweedFs(folder, with_tls=False) as process:
            process.server.create_bucket(BUCKET)
            # The usual client finds its credentials here, and nothing of this machine's own configuration.
            alone = {"AWS_CONFIG_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true"}
            environment = {**process.server.environment(), **alone}
            with _reached(process.server.port, line) as port:
                yield S3Store(server=process.server, client=aws_client(), environment=environment, port=port)
    finally:
        shutil.rmtree(folder)


@contextmanager
def _reached(port: int, line: Line | None) -> Iterator[int]:
    """Put the line in front of a port; 0 where there is none."""
    if line is None:
        yield 0
    elif line.parts_per_s is not None:
        from tests.stores.busy import running_busy_proxy

        with running_busy_proxy(port, line.parts_per_s) as busy:
            yield busy
    else:
        from tests.stores.link import Network, running_link

        network = Network(latency_s=line.latency_s, up_bytes_per_s=line.bytes_per_s, down_bytes_per_s=line.bytes_per_s)
        with running_link(port, network) as link:
            yield link


def aws_client() -> str:
    """Find the `aws` command: the program itself, not a version manager's wrapper, which adds its own time."""
    found = shutil.which("aws")
    if found is None:
        raise SystemExit("the rival needs the command `aws`: install awscli (apt or pip)")
    if Path(found).parent.name == "shims" and shutil.which("pyenv"):
        answer = subprocess.run(["pyenv", "which", "aws"], stdout=subprocess.PIPE, text=True, check=False)
        return answer.stdout.strip() or found
    return found
