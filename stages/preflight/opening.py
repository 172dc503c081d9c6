"""Open what is to be looked at: the machine we run on, a system below a folder, or a disk or image, near or far."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.machine import Machine
from pipeline.config.options import without_secrets
from pipeline.errors import FormatError, PlanError, StoreError
from pipeline.flow.items import RangeReader
from stages.decode.image import DecodedImage
from stages.decode.named import AUTO, NamedImage, is_block_device, open_files
from stages.disk.live import LiveView
from stages.disk.paths import failure
from stages.disk.tables import PartitionTable
from stages.disk.tree import READ_LIMIT, Entry, Node, Space, View
from stages.disk.view import SYSTEM_MARKS, open_system
from stages.disk.volumes import open_volumes
from stages.preflight.findings import to_read_it
from stages.preflight.subject import LiveFacts, LiveMount, Subject, gather
from stages.preflight.volumes import Volume, Volumes, known_volumes

# How a refusal to open a disk ends, whoever told it.
_REFUSED = (os.strerror(errno.EACCES), os.strerror(errno.EPERM))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the user wants looked at.

    Attributes:
        place: disk, image or URL; empty for the disk that this machine runs from.
        root: the system's folder; `/` is this machine. None: what is on the disk at `place`.
        format, endpoint, ca_file: of an image, as `inspect` takes them.
    """

    place: str = ""
    root: Path | None = None
    format: str = "auto"
    endpoint: str = ""
    ca_file: Path | None = None


def is_of_this_machine(place: str) -> bool:
    """Whether a path is the disk that this machine runs from: then its files are read through its mounts."""
    if not is_block_device(place):
        return False
    running = {disk.name for disk in Machine().system_disk().disks}
    return Path(os.path.realpath(place)).name in running


@asynccontextmanager
async def open_subject(wanted: Wanted) -> AsyncIterator[Subject]:
    """Open it and gather all facts. Everything is opened read-only and closed at the end.

    Raises:
        PlanError: there is nothing to look at.
        StoreError, FormatError: the image can't be read.
    """
    root = wanted.root
    if root is None and wanted.place and os.path.isdir(wanted.place):
        raise PlanError(
            "this is a folder, neither a disk nor an image",
            operation="preflight",
            path=wanted.place,
            hint=f"For the system below it: pipeline preflight --root {wanted.place} [DISK].",
        )
    if root is None and (not wanted.place or is_of_this_machine(wanted.place)):
        root = Path("/")
    async with AsyncExitStack() as stack:
        if root is not None:
            yield await _live(root, wanted, stack)
        else:
            yield await _offline(wanted, stack)


async def _live(root: Path, wanted: Wanted, stack: AsyncExitStack) -> Subject:
    machine = Machine(root)
    name, place, problem, remedy = "", wanted.place, "", ""
    if not place and root != Path("/"):
        # Its /sys names a disk of another machine, or of this one by another name: never opened unasked.
        problem = "the disk was not looked at: none was named beside --root"
        remedy = f"Name it: pipeline preflight --root {root} DISK."
        name = next((one.name for one in machine.system_disk().disks), "")
    elif not place:
        system = machine.system_disk()
        problem, remedy = f"the disk was not looked at: {system.reason}", "Name it: pipeline preflight DISK."
        if system.disks:
            name, place = system.disks[0].name, system.disks[0].path
    elif is_block_device(place):
        name = Path(os.path.realpath(place)).name
    reader: RangeReader | None = None
    table: PartitionTable | None = None
    volumes = Volumes([], disk_name=name)
    if place:
        try:
            reader = await _reader_of(wanted, place, stack)
            disk = await open_volumes(reader, sector_size=machine.sector_size(name) if name else None)
            table = disk.table
            volumes = known_volumes(disk, disk_name=name)
        except (StoreError, FormatError) as error:
            reader, problem = None, f"{place} could not be opened: {error.message}"
            remedy = to_read_it() if error.message.endswith(_REFUSED) else error.hint
            volumes = _named_by_udev(machine, name)
    ours = {name} if name else set()
    elsewhere = {spec: ", ".join(sorted(disks)) for spec, disks in machine.known_by_udev().items() if not disks & ours}
    mounts = tuple(
        LiveMount(
            point=one.point,
            kind=one.kind,
            source=one.source,
            writable=one.writable,
            disks=frozenset(machine.disks_below(one)),
        )
        for one in machine.mounts()
    )
    live = LiveFacts(
        firmware=machine.firmware,
        mounts=mounts,
        elsewhere=elsewhere,
        nics=tuple(machine.network_cards()),
        written_per_s=machine.written_per_s(name) if name else None,
    )
    view = LiveView(root)
    return await gather(
        view,
        no_system="" if root == Path("/") else await _why_no_system(view, root),
        place=place or (str(root) if root != Path("/") else "this machine"),
        reader=reader,
        table=table,
        volumes=volumes,
        table_problem=problem,
        table_remedy=remedy,
        size=next((disk.size for disk in machine.disks() if disk.name == name), 0),
        live=live,
    )


async def _why_no_system(view: LiveView, root: Path) -> str:
    """Why a folder holds no system; empty where it does. What makes one is as `open_system` sees it."""
    for mark in SYSTEM_MARKS:
        try:
            await view.stat(mark, follow=False)
        except OSError:
            continue
        return ""
    return f"below {root} there is neither an /etc/os-release nor an init"


def _named_by_udev(machine: Machine, name: str) -> Volumes:
    """What udev says is on a disk that can't be opened: enough to look names of fstab up."""
    found = []
    for spec, disks in machine.known_by_udev().items():
        key, _, value = spec.partition("=")
        if name in disks:
            found.append(
                Volume(
                    names=(),
                    number=None,
                    kind="unknown",
                    size=0,
                    uuid=value if key == "UUID" else "",
                    label=value if key == "LABEL" else "",
                    part_uuid=value if key == "PARTUUID" else "",
                    part_label=value if key == "PARTLABEL" else "",
                )
            )
    return Volumes(found, disk_name=name, opaque=(f"/dev/{name}, which could not be opened",))


async def _reader_of(wanted: Wanted, place: str, stack: AsyncExitStack) -> DecodedImage:
    files = await stack.enter_async_context(
        open_files(NamedImage(place=place, format=wanted.format, endpoint=wanted.endpoint, ca_file=wanted.ca_file))
    )
    return await files.open_image()


async def _offline(wanted: Wanted, stack: AsyncExitStack) -> Subject:
    reader = await _reader_of(wanted, wanted.place, stack)
    disk = await open_volumes(reader)
    view: View
    problem = ""
    try:
        view = await open_system(disk)
    except FormatError as error:
        view, problem = NoFiles(), f"{error.message}. {error.hint}".rstrip()
        if wanted.format == AUTO and reader.format == "raw" and disk.table.kind == "none":
            problem += " It begins like no image format that is known here, and was taken for a raw disk."
    return await gather(
        view,
        place=without_secrets(wanted.place),
        reader=reader,
        table=disk.table,
        volumes=known_volumes(disk),
        no_system=problem,
    )


class NoFiles:
    """The view of a disk without a system: nothing is there."""

    @property
    def is_live(self) -> bool:
        """False."""
        return False

    async def stat(self, path: str, *, follow: bool = True) -> Node:
        """Nothing."""
        raise failure(errno.ENOENT, path)

    async def list(self, path: str) -> tuple[Entry, ...]:
        """Nothing."""
        raise failure(errno.ENOENT, path)

    async def read(self, path: str, *, limit: int = READ_LIMIT) -> bytes:
        """Nothing."""
        raise failure(errno.ENOENT, path)

    async def read_at(self, path: str, offset: int, length: int) -> bytes:
        """Nothing."""
        raise failure(errno.ENOENT, path)

    async def target(self, path: str) -> str:
        """Nothing."""
        raise failure(errno.ENOENT, path)

    async def resolve(self, path: str) -> str:
        """Nothing."""
        raise failure(errno.ENOENT, path)

    async def space(self, path: str) -> Space:
        """Nothing."""
        raise failure(errno.ENOENT, path)
