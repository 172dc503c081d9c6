"""Write the image into a file: temporary name, fsync, atomic rename.

A mounted network share is a file too. Bytes that are never written read as zero (the file is new), so zero pieces cost
nothing. Aligned pieces go out with O_DIRECT straight from the buffers they were read into; the rest is packed into
aligned buffers first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio.from_thread

from pipeline.errors import LeftBehindError, PlanError, StoreError
from pipeline.events import FallbackTaken, LeftoverFound, UploadRemoved
from pipeline.flow.buffers import Pool
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Piece, Receipt, StoredImage
from pipeline.flow.manifest import MANIFEST_SUFFIX
from pipeline.flow.orders import SPARSE_SINK, Order
from pipeline.flow.pacing import RATE_MIN, RateLimit
from pipeline.flow.parallel import in_thread
from pipeline.flow.placement import lies_on_disk
from pipeline.flow.stage import (
    STORED_IMAGE,
    SinkPlan,
    SinkRequest,
    StageContext,
    StageSpec,
    UploadJournal,
    option,
    pieces,
)
from pipeline.units import MiB, Size, format_size
from stages.store.file import FileReader, open_file_reader
from stages.write.packing import UNIT
from stages.write.partial import partial_name
from stages.write.ranges import RangeDriver

_STAGING = 4 * MiB
_STAGINGS = 3  # one is filled while two are written
_ALONE_S = 10.0  # how long another run's renames are waited for
_IN_FLIGHT = 3  # windows or staging buffers being written at once; a disk gains nothing from more


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of write.file."""

    path: Path = option(doc="Where the image goes; its folder must exist.", example="/mnt/share/web01.qcow2")
    overwrite: bool = option(
        False, doc="Replace an image that is there already, at the end and in one step.", may_change=True
    )
    rate_limit: Size | None = option(
        None, doc='Write at most this much a second, as in "200 MiB".', may_change=True, minimum=RATE_MIN
    )


class FileWriter:
    """One new file, written at any offset, renamed when it is published."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._options = options
        self._context = context
        self._path = options.path.absolute()
        self._journal = context.journal
        self._fd = -1
        self._direct_fd = -1
        self._staging = Pool(_STAGING, _STAGINGS)
        self._limit = RateLimit(context.clock, options.rate_limit)
        self._ours: tuple[int, int] | None = None  # (device, inode) of the file that this export made
        self._manifest_begun = False  # this run made the temporary manifest

    @property
    def _partial(self) -> Path:
        """The file's temporary name: the same for every process of one export."""
        run = self._journal.id if self._journal is not None else str(os.getpid())
        return self._path.with_name(partial_name(self._path.name, self._context.export_name, run))

    # -- planning --------------------------------------------------------------------------------------------------

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """Look at folder, target and free space. Raises PlanError."""
        resume_at = self._go_on(self._journal) if self._journal is not None and self._journal.upload else 0
        try:
            free = await in_thread(self._context.threads, lambda: self._look(request))
        except OSError as error:  # a folder on the way may not be entered, a name is too long, a share is gone
            raise PlanError(
                f"can't look at the target: {os.strerror(error.errno or 0)}",
                path=self._path,
                hint=_HINTS.get(error.errno or 0, ""),
            ) from None
        return SinkPlan(
            own_bytes=_STAGING * _STAGINGS,
            summary=(("free space", f"{format_size(free)} in {self._path.parent}"),),
            resume_at=resume_at,
        )

    async def find_leftovers(self) -> Sequence[LeftoverFound]:
        """Temporary files of the same target. Raises StoreError."""
        from stages.write.leftovers import Folder, found_beside

        return await found_beside(Folder(str(self._path)), str(self._path))

    def _go_on(self, journal: UploadJournal) -> int:
        """Find the file that an earlier process wrote, and take it over or remove it; returns how far it is durable.

        Raises:
            StoreError: it can't be removed, or not be given its temporary name back.
        """
        inode = journal.upload["inode"]
        found: os.stat_result | None = None
        try:
            if inode and self._path.exists() and self._path.stat().st_ino == inode:
                # The process ended between renaming the image and its manifest, which is what publishes it.
                if self._partial.exists():
                    self._path.unlink()
                else:
                    os.rename(self._path, self._partial)
            self._partial_manifest.unlink(missing_ok=True)
            found = self._partial.stat() if self._partial.exists() else None
            if found is not None and found.st_ino == inode and not journal.discards:
                self._ours = (found.st_dev, found.st_ino)
                return journal.mark
            self._partial.unlink(missing_ok=True)  # nobody else's has the id of our journal in its name
        except OSError as error:
            raise self._store_error(error, "resume") from None
        journal.begin_anew(
            "what was written before has been removed" if found else "the file that was begun is not there any more"
        )
        return 0

    def _look(self, request: SinkRequest) -> int:
        folder = self._path.parent
        if not folder.is_dir():
            raise PlanError("the target's folder does not exist", path=folder, hint=f"Make it: mkdir -p {folder}")
        room, longest = os.pathconf(folder, "PC_NAME_MAX"), os.fsencode(self._partial_manifest.name)
        if len(longest) > room:
            raise PlanError(
                f"the target's name is too long by {len(longest) - room} bytes",
                path=self._path,
                hint="Shorten it, or the name in [export]: both stand in the name that the file has until the end.",
            )
        if self._path.is_dir():
            raise PlanError("the target is a folder", path=self._path, hint="Name the image file itself.")
        if self._path.exists() and not self._path.is_file():
            # Renaming over it would put a file in the place of the device, in the memory behind /dev.
            raise PlanError(
                "the target is a device or pipe, and write.file makes a file",
                path=self._path,
                hint="Name a file in a folder, overwrite or not.",
            )
        for path in (self._path, self._manifest_path):
            if path.exists() and not self._options.overwrite:
                raise PlanError(
                    "the target exists", path=path, hint="Choose another name, or set overwrite = true in write.file."
                )
        if not os.access(folder, os.W_OK):
            raise PlanError("the target's folder can't be written", path=folder)
        if request.source_path and lies_on_disk(folder, Path(request.source_path)):
            raise PlanError(
                "the target lies on the disk that is exported",
                path=self._path,
                disk=request.source_path,
                hint="Write to another disk, a network share or an object store.",
            )
        if request.source_path and self._path.exists() and self._path.samefile(request.source_path):
            raise PlanError("the target is the source", path=self._path, hint="Choose another name for the image.")
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    @property
    def _partial_manifest(self) -> Path:
        return self._partial.with_name(self._partial.name + MANIFEST_SUFFIX)

    @property
    def _manifest_path(self) -> Path:
        return self._path.with_name(self._path.name + MANIFEST_SUFFIX)

    # -- writing ---------------------------------------------------------------------------------------------------

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
        """Write every piece, make the file complete and durable, hand it on.

        Raises:
            StoreError: the disk is full, or the file can't be written; the temporary file is gone.
        """
        driver = RangeDriver(
            self,
            self._context,
            staging=self._staging,
            in_flight=_IN_FLIGHT,
            limit=self._limit,
            journal=self._journal,
            make_durable=self._make_durable,
        )
        size = await driver.store(inlet)
        await outlet.send(StoredImage(str(self._path), size, self._open_reader, self._fetch_receipt))

    @property
    def partial_uri(self) -> str:
        """The temporary file."""
        return str(self._partial)

    @property
    def in_order(self) -> bool:
        """A file takes writes at any offset."""
        return False

    async def can_rewrite(self) -> bool:
        """Always."""
        return True

    async def create(self) -> None:
        """Make the temporary file. Raises StoreError."""
        self._create()

    async def seal(self, size: int) -> None:
        """Full length, on stable storage, and out of the page cache so that verification reads the medium."""
        await in_thread(self._context.threads, lambda: self._seal(size))

    async def _make_durable(self) -> bool:
        """Bring what was written to stable storage."""
        try:
            await in_thread(self._context.threads, lambda: os.fdatasync(self._fd))
        except OSError as error:
            raise self._store_error(error, "write") from None
        return True

    async def abort(self, cause: BaseException) -> None:
        """Remove the temporary file. Raises LeftBehindError."""
        self._take_back(cause)

    def _create(self) -> None:
        try:
            is_new = self._ours is None
            if self._journal is not None and is_new:
                self._note(self._journal, inode=0)  # first: a file that nobody knows of would stay
            flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if is_new else 0)
            self._fd = os.open(self._partial, flags, 0o644)
            status = os.fstat(self._fd)
            self._ours = (status.st_dev, status.st_ino)
            if self._journal is not None:
                if not is_new:
                    self._journal.note_mark(self._journal.start.position)
                self._note(self._journal, inode=status.st_ino)
                if not is_new:
                    # What lies behind is written again, except for zeros, which are left out.
                    os.ftruncate(self._fd, self._journal.start.position)
        except OSError as error:
            raise self._store_error(error, "create") from None
        self._make_room()
        try:
            self._direct_fd = os.open(self._partial, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            self._use_buffered(os.strerror(error.errno or 0))

    def _note(self, journal: UploadJournal, *, inode: int) -> None:
        journal.note_upload({"inode": inode, "commands": [shlex.join(["rm", "-f", str(self._partial)])]})

    def _note_moved(self, journal: UploadJournal) -> None:
        """From here on, what has to be removed where the rest fails has the image's own name."""
        assert self._ours is not None  # it was written
        command = shlex.join(["rm", "-f", str(self._path), str(self._partial_manifest)])
        journal.note_upload({"inode": self._ours[1], "commands": [command]})

    def _make_room(self) -> None:
        """Give the file its longest length at once: writes that extend a file wait for each other, others do not."""
        if self._context.layout is None:
            return
        try:
            os.ftruncate(self._fd, self._context.layout.image_bytes_max)
        except OSError:
            pass  # this filesystem has no holes, or no files that long: it grows as it is written

    def _use_buffered(self, reason: str) -> None:
        self._context.emit(
            FallbackTaken(stage=self._context.name, what="buffered writes instead of O_DIRECT", reason=reason)
        )
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
        self._direct_fd = -1

    async def write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """One thread call for all of it. Raises StoreError."""
        await in_thread(self._context.threads, lambda: self._write(parts))

    def _write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        for offset, view in parts:
            self._write_at(offset, view)

    def _write_at(self, offset: int, view: memoryview) -> None:
        """Write all of it: whole units direct, what is around them through the page cache. Threads: any."""
        head = min(-offset % UNIT, view.nbytes)
        middle = head + (view.nbytes - head) // UNIT * UNIT
        if self._direct_fd < 0:
            head = middle = 0
        try:
            _write_fully(self._fd, view[:head], offset)
            try:
                _write_fully(self._direct_fd, view[head:middle], offset + head)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                _write_fully(self._fd, view[head:middle], offset + head)
            _write_fully(self._fd, view[middle:], offset + middle)
        except OSError as error:
            raise self._store_error(error, "write", offset=offset) from None

    def _seal(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._store_error(error, "seal") from None
        self._close_files()

    # -- verify, publish, withdraw ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def _open_reader(self) -> AsyncIterator[FileReader]:
        async with open_file_reader(self._current_path()) as reader:
            yield reader

    @asynccontextmanager
    async def _fetch_receipt(self) -> AsyncIterator[Receipt]:
        size = os.stat(self._current_path()).st_size
        yield Receipt(size, note="a filesystem keeps no checksum of a whole file")

    def _current_path(self) -> Path:
        return self._partial if self._partial.exists() else self._path

    async def fetch_manifest(self) -> bytes | None:
        """The manifest that stands beside the target; None where there is none."""
        try:
            return await in_thread(self._context.threads, self._manifest_path.read_bytes)
        except OSError:
            return None

    async def publish(self, manifest: bytes) -> str:
        """Rename the image into place, then the manifest. Raises StoreError when somebody took the name."""
        await in_thread(self._context.threads, lambda: self._publish(manifest))
        return str(self._manifest_path)

    def _publish(self, manifest: bytes) -> None:
        try:
            # All that needs room comes first: where it fails, an image that is to be replaced is still there.
            with open(self._partial_manifest, "xb") as file:
                self._manifest_begun = True
                file.write(manifest)
                file.flush()
                os.fsync(file.fileno())
            with _alone_in(self._path.parent):
                self._move(self._partial, self._path)
                if self._journal is not None:
                    anyio.from_thread.run_sync(self._note_moved, self._journal)
                self._move(self._partial_manifest, self._manifest_path)
            _sync_folder(self._path.parent)
        except OSError as error:
            raise self._store_error(error, "publish") from None

    def _move(self, source: Path, target: Path) -> None:
        """Rename; without `overwrite` never over a file that appeared meanwhile."""
        if self._options.overwrite:
            os.replace(source, target)
            return
        try:
            os.link(source, target)  # fails where the name is taken; rename would replace it
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise StoreError(
                    "the target appeared while the image was written",
                    operation="publish",
                    path=target,
                    hint="Somebody else wrote it; it was left alone. Choose another name.",
                ) from None
            if target.exists():
                raise
            os.rename(source, target)  # no hard links on this filesystem (FAT, some shares)
        else:
            os.unlink(source)

    async def withdraw(self) -> None:
        """Remove what this run wrote, under either name; never somebody else's file. Raises LeftBehindError."""
        self._take_back(None)

    def _take_back(self, cause: BaseException | None) -> None:
        """Remove what this run wrote; what can't be removed does not keep the rest."""
        left, failure = [], None
        for path, remove in (
            (self._partial, self._remove),
            (self._path, self._remove),
            (self._partial_manifest, self._remove_manifest),
        ):
            try:
                remove(path)
            except OSError as error:
                left.append(path)
                failure = error
        if failure is not None:
            raise LeftBehindError(
                f"removing what was written failed: {os.strerror(failure.errno or 0)}",
                cause=cause or failure,
                commands=(shlex.join(["rm", "-f", *map(str, left)]),),
            ) from cause

    def _remove_manifest(self, path: Path) -> None:
        if self._manifest_begun:
            path.unlink(missing_ok=True)

    def _remove(self, path: Path) -> None:
        try:
            status = path.lstat()
            if (status.st_dev, status.st_ino) == self._ours:
                path.unlink()
                self._context.emit(UploadRemoved(uri=str(path), how="removed"))
        except FileNotFoundError:
            return

    async def close(self) -> None:
        """Close the descriptors; idempotent."""
        self._close_files()
        self._staging.close()

    def _close_files(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1

    def _store_error(self, error: OSError, operation: str, *, offset: int | None = None) -> StoreError:
        return StoreError(
            f"the image file could not be written: {os.strerror(error.errno or 0)}",
            operation=operation,
            hint=_HINTS.get(error.errno or 0, ""),
            path=self._path,
            offset=offset,
        )


def _write_fully(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done:], offset + done)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While inside, no other run of ours renames in this folder.

    Two runs with `overwrite` that end in the same moment would leave the image of one beside the manifest of the other.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        ends = time.monotonic() + _ALONE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > ends:  # somebody else's lock; two renames take no time
                    break
                time.sleep(0.01)
            except OSError:
                break  # a share that knows no locks
        yield
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power loss."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_HINTS = {
    errno.ENOSPC: "The target is full. Free space there, compress (encode.qcow2), or choose another target.",
    errno.EDQUOT: "The quota is used up. Free space there, or choose another target.",
    errno.EFBIG: "The target's filesystem does not take files this large. Compress, or choose another target.",
    errno.EROFS: "The target's filesystem is read-only.",
    errno.EACCES: "The folder can't be written by this user.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EIO: "The target's medium or share failed; look at the kernel's log (dmesg).",
    errno.ESTALE: "The network share went away; mount it again.",
}


SPEC = StageSpec(
    name="write.file",
    summary="Write the image into a file: temporary name, fsync, atomic rename, sparse, O_DIRECT.",
    options=Options,
    takes=pieces(Order.SPARSE, Order.RANDOM, Order.HEAD_LAST, Order.SEQUENTIAL),
    gives=STORED_IMAGE,
    build=FileWriter,
    sink=SPARSE_SINK,
    resumable=True,
    schemes=("file",),
    open_reader=open_file_reader,
)
