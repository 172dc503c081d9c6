"""Where an export goes in these tests, and what it left there."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chains import write_toml
from tests.stores.s3 import S3Server

CHAIN = ("checksum.guest", "sparse.zeros")


@dataclass(slots=True, kw_only=True)
class Place:
    """A folder with a disk and an export file, and a bucket of its own.

    Attributes:
        env: what leads the program to the store.
    """

    folder: Path
    disk: Path
    server: S3Server
    bucket: str
    env: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The target."""
        return f"s3://{self.bucket}/disk.image"

    def through(self, endpoint: str) -> Mapping[str, str]:
        """The environment with another way to the store."""
        return {**self.env, "AWS_ENDPOINT_URL_S3": endpoint}

    def toml(
        self,
        encoder: str = 'encode.qcow2; compression = "none"',
        *,
        disk: Path | None = None,
        options: str = "",
        verifiers: Sequence[str] = ("verify.readback",),
        memory: str = "96 MiB",
    ) -> Path:
        """An export file to the bucket; a run that fails leaves nothing."""
        return write_toml(
            self.folder / "export.toml",
            f'read.disk; path = "{disk or self.disk}"; blocks = "all"',
            *CHAIN,
            encoder,
            f'write.s3; url = "{self.url}"' + (f"; {options}" if options else ""),
            *verifiers,
            memory=memory,
            on_failure="abort",
        )

    def nothing_is_left(self) -> bool:
        """No object, no open upload, no file but the disk and the export file."""
        assert self.server.keys(self.bucket) == []
        assert self.server.open_uploads(self.bucket) == []
        return self.no_file_is_left()

    def no_file_is_left(self) -> bool:
        """No manifest, no partial file beside the export file."""
        left = {path.name for path in self.folder.iterdir()} - {"export.toml", "mnt", self.disk.name}
        assert not left
        return True


def new_place(server: S3Server, folder: Path, disk: Path) -> Place:
    """A place on a server, with a bucket that no other test has."""
    return Place(folder=folder, disk=disk, server=server, bucket=server.new_bucket(), env=server.environment())


def unused_name() -> str:
    """A name that nobody has."""
    return f"test-{uuid.uuid4().hex[:12]}"
