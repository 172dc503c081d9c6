"""Disk as it is to servers of each kind, against what people use for that: curl, rclone, nbdcopy, scp."""

from __future__ import annotations

import sys
from pathlib import Path

from perf.case import Attempt, Case, Contender, Goal, Ground, StoredFile
from perf.export import MEMORY, export_toml
from perf.measure import one

_SERVED = str(Path(__file__).parents[1] / "served.py")


def _beside(kind: str, ground: Ground, *command: str) -> Attempt:
    """A command with its server; what was stored is compared with the disk, but for what the emulator has."""
    folder = ground.folder / kind
    path = folder / "data" / "open" / "image"
    if kind == "nbdkit":
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(ground.disk.stat().st_size)
    stored = StoredFile(path=path, format="raw") if kind != "azurite" else None
    return Attempt(
        steps=(one(sys.executable, _SERVED, kind, str(folder), "--", *command),),
        image=stored,
        environment={"XDG_STATE_HOME": str(ground.folder / "state")},
    )


def ours(name: str, kind: str, writer: str, url: str, *options: str) -> Contender:
    """Return the contender that exports the disk there; options are `name=value` of the writer."""

    def prepare(ground: Ground) -> Attempt:
        config = ground.folder / "export.toml"
        stages = ("read.disk", "checksum.guest", "sparse.zeros", "encode.raw")
        tables = [{"use": use, **({"path": str(ground.disk)} if use == "read.disk" else {})} for use in stages]
        config.write_text(export_toml([*tables, {"use": writer, "url": "changed below"}], MEMORY))
        given = [word for option in (f"url={url}", *options) for word in ("--set", f"{writer}.{option}")]
        return _beside(kind, ground, *ground.product, str(config), *given)

    return Contender(name, prepare)


def curl(ground: Ground) -> Attempt:
    """`curl -T`, in chunks as from a pipe: the disk may be a device, whose length curl does not see."""
    text = f"dd if='{ground.disk}' bs=4M iflag=direct status=none | curl --silent --fail -T - '{{url}}'"
    return _beside("nginx", ground, "sh", "-c", text)


def rclone(ground: Ground) -> Attempt:
    """`rclone rcat`, which stages blocks of 4 MiB, 16 at once."""
    text = f"dd if='{ground.disk}' bs=4M iflag=direct status=none | rclone rcat 'AZ:{{url}}'"
    return _beside("azurite", ground, "sh", "-c", text)


def nbdcopy(ground: Ground) -> Attempt:
    """`nbdcopy`, with as many connections and requests as it chooses, flushed at the end as ours is."""
    return _beside("nbdkit", ground, "nbdcopy", "--destination-is-zero", "--flush", str(ground.disk), "{url}")


def scp(ground: Ground) -> Attempt:
    """`scp`, which speaks SFTP since OpenSSH 9; the disk has to be a file."""
    known = ("-o", "UserKnownHostsFile={known_hosts}", "-o", "IdentitiesOnly=yes", "-i", "{identity}")
    return _beside("openssh", ground, "scp", "-q", "-F", "none", *known, str(ground.disk), "{scp}")


CASES = (
    Case(
        name="http-raw",
        summary="raw image into a web server on this machine",
        disk="system",
        ours=ours("pipeline raw to http", "nginx", "write.http", "{url}"),
        rival=Contender("dd | curl -T -", curl),
        goals=(Goal("wall ratio", 0.9),),
    ),
    Case(
        name="azure-raw",
        summary="raw image as block blob into the Azure emulator on this machine",
        disk="system",
        ours=ours("pipeline raw to Azure", "azurite", "write.azure_block", "az://{url}"),
        rival=Contender("dd | rclone rcat", rclone),
        goals=(Goal("wall ratio", 1.0),),
    ),
    Case(
        name="nbd-raw",
        summary="raw disk into an NBD server on this machine",
        disk="system",
        ours=ours("pipeline raw to NBD", "nbdkit", "write.nbd", "{url}"),
        rival=Contender("nbdcopy", nbdcopy),
        goals=(Goal("wall ratio", 0.9),),
    ),
    Case(
        name="sftp-raw",
        summary="raw image to an OpenSSH server on this machine",
        disk="system",
        ours=ours(
            "pipeline raw to SFTP",
            "openssh",
            "write.sftp",
            "{url}",
            'identity_files=["{identity}"]',
            "known_hosts={known_hosts}",
            "agent=false",
        ),
        rival=Contender("scp", scp),
        goals=(Goal("wall ratio", 1.0),),
    ),
)
