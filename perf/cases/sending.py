"""Disk as it is to a web server and to Azure's emulator, against what people use for that: curl and rclone."""

from __future__ import annotations

import sys
from pathlib import Path

from perf.case import Attempt, Case, Contender, Goal, Ground, StoredFile
from perf.export import MEMORY, export_toml
from perf.measure import one

_SERVED = str(Path(__file__).parents[1] / "served.py")


def _beside(kind: str, ground: Ground, *command: str) -> Attempt:
    """A command with its server; what nginx stored is compared with the disk."""
    folder = ground.folder / kind
    stored = StoredFile(path=folder / "data" / "open" / "image", format="raw") if kind == "nginx" else None
    return Attempt(
        steps=(one(sys.executable, _SERVED, kind, str(folder), "--", *command),),
        image=stored,
        environment={"XDG_STATE_HOME": str(ground.folder / "state")},
    )


def ours(name: str, kind: str, writer: str, url: str) -> Contender:
    """Return the contender that exports the disk there."""

    def prepare(ground: Ground) -> Attempt:
        config = ground.folder / "export.toml"
        stages = ("read.disk", "checksum.guest", "sparse.zeros", "encode.raw")
        tables = [{"use": use, **({"path": str(ground.disk)} if use == "read.disk" else {})} for use in stages]
        config.write_text(export_toml([*tables, {"use": writer, "url": "changed below"}], MEMORY))
        return _beside(kind, ground, *ground.product, str(config), "--set", f"{writer}.url={url}")

    return Contender(name, prepare)


def curl(ground: Ground) -> Attempt:
    """`curl -T`, in chunks as from a pipe: the disk may be a device, whose length curl does not see."""
    text = f"dd if='{ground.disk}' bs=4M iflag=direct status=none | curl --silent --fail -T - '{{url}}'"
    return _beside("nginx", ground, "sh", "-c", text)


def rclone(ground: Ground) -> Attempt:
    """`rclone rcat`, which stages blocks of 4 MiB, 16 at once."""
    text = f"dd if='{ground.disk}' bs=4M iflag=direct status=none | rclone rcat 'AZ:{{url}}'"
    return _beside("azurite", ground, "sh", "-c", text)


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
)
