"""Exports in processes of their own that are killed, and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from pipeline.flow.journal import parse
from pipeline.flow.resume import _MARK, _PART
from pipeline.units import MiB
from stages.store.sftp import SftpUrl
from tests.chains import write_toml
from tests.disks.letters import letter_bytes
from tests.stores.openssh import SftpServer
from tests.stores.proxy import FaultProxy
from tests.stores.s3 import S3Server

# 6 parts of 5 MiB behind the head, with a hole and zeros; every window of 2 MiB is a point.
LETTERS = "ABCDEFGHIJKLMNOP--00QRSTUVWXYZ!"


def write_large_letters(path: Path, letters: str = LETTERS) -> Path:
    """A disk of a MiB for each letter, and a bit more."""
    with path.open("wb") as file:
        for index, letter in enumerate(letters):
            if letter != "-":
                file.seek(index * MiB)
                file.write(letter_bytes(letter, MiB))
        file.truncate(len(letters) * MiB + 512)
    return path


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def was_killed(self) -> bool:
        """By SIGKILL."""
        return self.code == -9


@dataclass(slots=True)
class Victim:
    """One export of one disk, over and over.

    Attributes:
        server: for S3, through `proxy` where there is one.
        sftp: for SFTP. With neither it writes a file.
        chain: stages between the encoder and the writer.
    """

    folder: Path
    encoder: str
    server: S3Server | None = None
    sftp: SftpServer | None = None
    proxy: FaultProxy | None = None
    bucket: str = ""
    name: str = "victim"
    options: str = ""
    chain: tuple[str, ...] = ()
    verifiers: tuple[str, ...] = ("verify.readback",)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.server is not None:
            reached = self.server.reached_at(self.proxy.url) if self.proxy else self.server
            self.environment |= reached.environment()
            self.bucket = self.bucket or self.server.new_bucket()
        self.write()

    @property
    def disk(self) -> Path:
        """The source."""
        return self.folder / "disk.raw"

    @property
    def toml(self) -> Path:
        """The export file."""
        return self.folder / f"{self.name}.toml"

    @property
    def image(self) -> Path:
        """Where a file goes."""
        return (self.sftp.data if self.sftp else self.folder) / f"images of {self.folder.name}" / self.name

    @property
    def sent(self) -> Path:
        """What the last process wrote into a file, on a server or here: offset and length of each write."""
        return self.folder / f"{self.name}.sent"

    def sent_below(self, position: int) -> int:
        """Image bytes that the last process wrote below this offset, but for the first MiB, where a head may be."""
        if not self.sent.exists():
            return 0
        writes = [tuple(map(int, line.split())) for line in self.sent.read_text().splitlines()]
        return sum(max(0, min(offset + length, position) - max(offset, MiB)) for offset, length in writes)

    @property
    def journal(self) -> Path:
        """Its journal."""
        return Path(os.environ["XDG_STATE_HOME"]) / "disk-pipeline" / f"{self.name}.journal"

    def write(self, *, checksum: str = "checksum.guest", encoder: str = "", more: str = "") -> None:
        """Write disk, where there is none, and export file."""
        if not self.disk.exists():
            write_large_letters(self.disk)
        self.image.parent.mkdir(exist_ok=True)
        if self.server is not None:
            target = f'write.s3; url = "s3://{self.bucket}/{self.name}"'
        elif self.sftp is not None:
            url = SftpUrl.parse(self.sftp.url("x")).at(f"{self.sftp.remote}/{self.image.parent.name}/{self.name}")
            keys = f'identity_files = ["{self.sftp.identity}"]; known_hosts = "{self.sftp.known_hosts}"'
            target = f'write.sftp; url = "{url}"; {keys}'
        else:
            target = f'write.file; path = "{self.image}"'
        stages = [
            f'read.disk; path = "{self.disk}"; block_size = "2 MiB"',
            *([checksum] if checksum else []),
            "sparse.zeros",
            encoder or self.encoder,
            *self.chain,
            target + self.options + more,
            *(self.verifiers if checksum else ()),
        ]
        write_toml(self.toml, *stages, name=self.name)

    async def run(self, *arguments: str, kill_at: int = 0) -> Ended:
        """Run the export; SIGKILL strikes after the kill_at-th record of its journal."""
        command = [sys.executable, "-m", "tests.end_to_end.killed_run", str(kill_at), "run", str(self.toml), *arguments]
        self.sent.unlink(missing_ok=True)
        env = {**os.environ, **self.environment, "TEST_SENT": str(self.sent)}
        done = await anyio.run_process(command, check=False, env=env, cwd=Path(__file__).parents[2])
        return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())

    def stored(self) -> bytes:
        """The image as it is in the target."""
        return self.server.get(self.bucket, self.name) if self.server else self.image.read_bytes()

    def digest(self) -> str:
        """Of the image as it is in the target."""
        return hashlib.sha256(self.stored()).hexdigest()

    def told_digests(self) -> dict[str, Any]:
        """What the manifest says of disk and image."""
        name = f"{self.name}.manifest.json"
        text = self.server.get(self.bucket, name) if self.server else self.image.with_name(name).read_bytes()
        facts: dict[str, Any] = json.loads(text)["facts"]
        return facts

    def left(self) -> list[str]:
        """Everything in target and state folder but the image and its manifest."""
        wanted = {self.name, f"{self.name}.manifest.json"}
        if self.server is not None:
            found = {*self.server.keys(self.bucket), *(str(one) for one in self.server.open_uploads(self.bucket))}
        else:
            found = {one.name for one in self.image.parent.iterdir()}
        state = self.journal.parent
        return sorted(found - wanted) + ([one.name for one in state.iterdir()] if state.exists() else [])

    def clear(self) -> None:
        """Remove the image."""
        if self.server is not None:
            for key in self.server.keys(self.bucket):
                self.server.client().delete_object(Bucket=self.bucket, Key=key)
        else:
            for one in self.image.parent.iterdir():
                one.unlink()

    def journaled_parts(self) -> set[int]:
        """Parts that the journal knows of."""
        records, _ = parse(self.journal.read_bytes())
        return {json.loads(record.payload)["number"] for record in records if record.kind == _PART}

    def journaled_mark(self) -> int:
        """How far the journal knows a file to be durable."""
        records, _ = parse(self.journal.read_bytes())
        return max((int.from_bytes(one.payload, "little") for one in records if one.kind == _MARK), default=0)
