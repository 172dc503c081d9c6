"""Systems made of a few lines: a `View` over files written down in a test, alone or laid over a real tree."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipeline.units import GiB
from stages.disk.paths import LINKS_MAX, failure, split
from stages.disk.tree import READ_LIMIT, Entry, Kind, Node, Space, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One file as a test wants it. `content` of a link is where it points to."""

    content: bytes = b""
    kind: Kind = Kind.FILE
    mode: int = 0o644
    uid: int = 0
    size: int | None = None
    immutable: bool | None = False
    append_only: bool | None = False
    fails: int = 0


def link(target: str) -> Made:
    """A symbolic link."""
    return Made(content=target.encode(), kind=Kind.LINK, mode=0o777)


def folder() -> Made:
    """An empty folder."""
    return Made(kind=Kind.DIRECTORY, mode=0o755)


Content = str | bytes | Made | None


class MadeView:
    """A tree of files in memory; what it does not have comes from `below`. None in `files` removes what is there.

    Attributes:
        reads: bytes that were read, by path.
    """

    def __init__(
        self,
        files: Mapping[str, Content],
        below: View | None = None,
        *,
        total: int = 20 * GiB,
        free: int = 10 * GiB,
        inodes_free: int = 100_000,
    ) -> None:
        self._below = below
        self._nodes: dict[str, Made] = {"/": folder()} if below is None else {}
        self._removed: set[str] = set()
        self._space = Space(total=total, free=free, inodes=1_000_000, inodes_free=inodes_free)
        self.reads: dict[str, int] = {}
        for path, content in files.items():
            if content is None:
                self._removed.add(path)
                continue
            made = content if isinstance(content, Made) else Made(content=_bytes(content))
            self._nodes[path] = made
            parent = os.path.dirname(path)
            while parent not in self._nodes and parent != "/":
                if below is None:
                    self._nodes[parent] = folder()
                parent = os.path.dirname(parent)

    @property
    def is_live(self) -> bool:
        """Never."""
        return False

    async def stat(self, path: str, *, follow: bool = True) -> Node:
        """As the kernel would."""
        return await self._node(await self._walk(path, follow))

    async def list(self, path: str) -> tuple[Entry, ...]:
        """Names of both layers."""
        real = await self._walk(path, True)
        if (await self._node(real)).kind is not Kind.DIRECTORY:
            raise failure(errno.ENOTDIR, path)
        found: dict[str, Entry] = {}
        if self._below is not None and not self._is_gone(real):
            try:
                found = {one.name: one for one in await self._below.list(real)}
            except FileNotFoundError:
                pass
        prefix = real.rstrip("/") + "/"
        for name in list(found):
            if self._is_gone(prefix + name):
                del found[name]
        for made in self._nodes:
            if made.startswith(prefix) and made != "/":
                name = made[len(prefix) :].split("/")[0]
                if name and not self._is_gone(prefix + name):
                    here = self._nodes.get(prefix + name)
                    found[name] = Entry(name, 1, here.kind if here else Kind.DIRECTORY)
        return tuple(found.values())

    async def read(self, path: str, *, limit: int = READ_LIMIT) -> bytes:
        """A whole file."""
        real = await self._walk(path, True)
        node = await self._node(real)
        self._may_read(real, node)
        if node.size > limit:
            raise failure(errno.EFBIG, path)
        if real not in self._nodes and self._below is not None:
            data = await self._below.read(real, limit=limit)
        else:
            data = self._nodes[real].content
        self.reads[real] = self.reads.get(real, 0) + len(data)
        return data

    async def read_at(self, path: str, offset: int, length: int) -> bytes:
        """A part of a file."""
        real = await self._walk(path, True)
        self._may_read(real, await self._node(real))
        if real not in self._nodes and self._below is not None:
            data = await self._below.read_at(real, offset, length)
        else:
            data = self._nodes[real].content[offset : offset + length]
        self.reads[real] = self.reads.get(real, 0) + len(data)
        return data

    async def target(self, path: str) -> str:
        """What a link says."""
        real = await self._walk(path, False)
        if (await self._node(real)).kind is not Kind.LINK:
            raise failure(errno.EINVAL, path)
        return await self._link(real)

    async def resolve(self, path: str) -> str:
        """Without links."""
        return await self._walk(path, True)

    async def space(self, path: str) -> Space:
        """Of the one filesystem."""
        await self._walk(path, True)
        return self._space

    def _may_read(self, path: str, node: Node) -> None:
        if node.kind is Kind.DIRECTORY:
            raise failure(errno.EISDIR, path)
        if node.kind is not Kind.FILE:
            raise failure(errno.EINVAL, path)
        made = self._nodes.get(path)
        if made is not None and made.fails:
            raise failure(made.fails, path)

    def _is_gone(self, path: str) -> bool:
        return any(path == one or path.startswith(one + "/") for one in self._removed)

    async def _node(self, path: str) -> Node:
        made = self._nodes.get(path)
        if made is None:
            if self._is_gone(path):
                raise failure(errno.ENOENT, path)
            if self._below is not None:
                try:
                    return await self._below.stat(path, follow=False)
                except FileNotFoundError:
                    pass
            if any(one.startswith(path.rstrip("/") + "/") for one in self._nodes):
                made = folder()
            else:
                raise failure(errno.ENOENT, path)
        return Node(
            kind=made.kind,
            number=1,
            mode=made.mode,
            uid=made.uid,
            gid=0,
            size=made.size if made.size is not None else len(made.content),
            modified_s=0,
            immutable=made.immutable,
            append_only=made.append_only,
        )

    async def _link(self, path: str) -> str:
        made = self._nodes.get(path)
        if made is not None:
            return made.content.decode("utf-8", "surrogateescape")
        assert self._below is not None
        return await self._below.target(path)

    async def _walk(self, path: str, follow: bool) -> str:
        waiting = split(path)[0][::-1]
        here: list[str] = []
        links = 0
        while waiting:
            name = waiting.pop()
            if name == "..":
                here = here[:-1]
                continue
            at = "/" + "/".join([*here, name])
            node = await self._node(at)
            if node.kind is Kind.LINK and (waiting or follow):
                links += 1
                if links > LINKS_MAX:
                    raise failure(errno.ELOOP, path)
                said = await self._link(at)
                if said.startswith("/"):
                    here = []
                waiting += split(said)[0][::-1]
                continue
            if waiting and node.kind is not Kind.DIRECTORY:
                raise failure(errno.ENOTDIR, path)
            here.append(name)
        return "/" + "/".join(here)


def changed(view: View, files: Mapping[str, Content], **space: int) -> MadeView:
    """A system with some files other than they are, or gone."""
    return MadeView(files, below=view, **space)


def _bytes(content: str | bytes) -> bytes:
    return content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content


def with_mode(content: str, mode: int, **more: int) -> Made:
    """A file with permissions."""
    return replace(Made(content=content.encode()), mode=mode, **more)  # type: ignore[arg-type]  # uid only
