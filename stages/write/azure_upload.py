"""One block blob being written: blocks in any order and a list of them at the end, or one request.

Source: Azure Storage REST API: Put Block, Put Block List, Get Block List, Put Blob.

An upload needs no opening: a block is stored under a name of ours, and is invisible until a list names it. Each name
holds the upload's token, the part's number, and where it was known before the first byte, the MD5 that Azure compares
the block with: so the list of a finished blob says what is in it. The blob carries the token as metadata, by which it
is known as ours when an answer was lost.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import anyio

from pipeline.errors import StoreError
from pipeline.events import Event, FallbackTaken
from pipeline.flow.grace import with_grace
from pipeline.flow.items import Receipt
from stages.store.azure import TOKEN, AzureClient, AzureError, BlobState, attested_of, block_list_digest
from stages.store.digests import Algorithm, Sums
from stages.store.http import Reply
from stages.write.s3_upload import GRACE_S
from stages.write.shapes import Body, Sealed, StoredPart

Checksum = Literal["md5", "crc64"]

_TOKEN_BYTES = 8
_NO_MD5 = bytes(16)
# How often, and how far apart, blocks are looked for that were on their way when an upload was aborted.
_LOOKS = 4
_LOOK_EVERY_S = 0.25


class AzureUpload:
    """Has the shape PartUpload, and knows afterwards what the store should say of the blob."""

    def __init__(
        self,
        client: AzureClient,
        name: str,
        *,
        overwrite: bool,
        checksum: Checksum,
        emit: Callable[[Event], None],
        stage: str,
    ) -> None:
        """Prepare it; nothing is sent."""
        self._client = client
        self._name = name
        self._overwrite = overwrite
        self._emit = emit
        self._stage = stage
        self._algorithms = {"md5": Algorithm.MD5, "crc64": Algorithm.CRC64NVME}[checksum]
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._has_blocks = False
        self._unanswered = 0  # blocks whose requests ended without an answer: they may come any time
        self._maybe_visible = False
        self.replaced: BlobState | None = None
        self.sealed_state: Sealed | None = None
        self._proof: tuple[str, str] | None = None

    @property
    def uri(self) -> str:
        """`az://container/name`."""
        return self._client.uri(self._name)

    @property
    def algorithms(self) -> Algorithm:
        """One: it does not depend on the store."""
        return self._algorithms

    # -- in a journal ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a later process needs to find this upload again."""
        return {
            "container": self._client.container,
            "name": self._name,
            "endpoint": self._client.access.endpoint,
            "token": self._token.hex(),
            "commands": self.leftovers(),
        }

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Take over the upload of an earlier process."""
        self._token = bytes.fromhex(state["token"])
        self._has_blocks = True
        self._maybe_visible = True

    # -- parts -------------------------------------------------------------------------------------------------------

    async def open(self) -> str:
        """Nothing is asked of the store; blocks may be there from now on."""
        self._has_blocks = True
        return self._token.hex()

    async def put_part(self, number: int, body: Body) -> StoredPart:
        """Put Block. Raises StoreError."""
        before = body.sums
        block_id = self._block_id(number, before)
        self._unanswered += 1
        try:
            reply = await self._client.put_block(self._name, block_id, body, _sum_headers(before))
        except AzureError:
            self._unanswered -= 1  # refused
            raise
        self._unanswered -= 1
        sums = body.sums
        assert sums is not None  # every byte was sent
        _compare(reply, sums, number)
        return StoredPart(number=number, length=sums.length, tag=block_id, sums=sums)

    def _block_id(self, number: int, sums: Sums | None) -> str:
        md5 = sums.md5 if sums is not None and sums.md5 else _NO_MD5
        return base64.b64encode(self._token + number.to_bytes(4, "big") + md5).decode()

    # -- making it visible -------------------------------------------------------------------------------------------

    async def put_whole(self, body: Body) -> Sealed:
        """Put Blob. Raises StoreError."""
        sums = body.sums
        assert sums is not None  # it was kept
        if sums.md5:
            self._proof = ("Content-MD5", sums.md5.hex())
        headers = {**self._headers(), **_sum_headers(sums)}
        return await self._publish(
            lambda: self._client.put_blob(self._name, body, headers, "put_whole"), "put_whole", sums.length
        )

    async def seal(self, parts: Sequence[StoredPart]) -> Sealed:
        """Put Block List. Raises StoreError."""
        ids = [part.tag for part in parts]
        self._proof = ("block list", block_list_digest([(part.tag, part.length) for part in parts]))
        headers = {"x-ms-blob-content-type": "application/octet-stream", **self._headers()}
        return await self._publish(
            lambda: self._client.commit(self._name, ids, headers), "seal", sum(part.length for part in parts)
        )

    def _headers(self) -> dict[str, str]:
        headers = {f"x-ms-meta-{TOKEN}": self._token.hex()}
        return headers if self._overwrite else {**headers, "If-None-Match": "*"}

    async def _publish(self, request: Callable[[], Awaitable[Reply]], operation: str, size: int) -> Sealed:
        """Send the request that makes the blob visible, and find out what became of it when that is not clear."""
        if self._maybe_visible and (found := await self._ours()) is not None:
            return self._remember(found.size, found.etag)
        was_visible, self._maybe_visible = self._maybe_visible, True
        try:
            reply = await with_grace(request, GRACE_S)
        except StoreError as error:
            if isinstance(error, AzureError) and not error.temporary and error.status not in (409, 412):
                self._maybe_visible = was_visible  # refused
                raise
            with contextlib.suppress(StoreError):  # the first error is the one to tell, and to retry on
                found = await self._ours()
                if found is not None:
                    return self._remember(found.size, found.etag)
            if error.status in (409, 412):
                self._maybe_visible = False
                raise StoreError(
                    "the target appeared while the image was written",
                    operation=operation,
                    uri=self.uri,
                    hint="Somebody else wrote it; it was left alone. Choose another name.",
                ) from None
            raise
        return self._remember(size, reply.header("etag"))

    async def _ours(self) -> BlobState | None:
        """The blob, if it is the one that this upload made."""
        found = await self._client.head(self._name)
        return found if found is not None and self.is_ours(found) else None

    def is_ours(self, found: BlobState) -> bool:
        """Whether a blob carries our token."""
        return found.metadata.get(TOKEN) == self._token.hex()

    def _remember(self, size: int, etag: str) -> Sealed:
        self._has_blocks = False  # they have become the blob
        self.sealed_state = Sealed(size=size, tag=etag)
        return self.sealed_state

    # -- afterwards --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def fetch_receipt(self) -> AsyncIterator[Receipt]:
        """What the store says of the sealed blob. Raises StoreError."""
        found = await self._client.head(self._name)
        if found is None:
            raise StoreError("the stored image is gone", operation="receipt", uri=self.uri)
        told = await attested_of(self._client, self._name, found)
        what, ours = self._proof or ("", "")
        proofs = ((what, ours, told[what]),) if what in told else ()
        yield Receipt(found.size, proofs, "" if proofs else "the store keeps no checksum that can be compared")

    async def abort(self) -> None:
        """Remove the blob if it is ours, and blocks that no list names. Raises StoreError."""
        if self._maybe_visible and (found := await self._ours()) is not None:
            await self._client.delete(self._name, found.etag)
        if self._has_blocks:
            await self._drop_blocks()
        self._has_blocks = self._maybe_visible = False
        self.sealed_state = None

    async def _drop_blocks(self) -> None:
        if await discard_blocks(self._client, self._name, more_may_come=self._unanswered > 0):
            return
        self._emit(
            FallbackTaken(
                stage=self._stage,
                what="what was sent stays, invisible, for a week at most",
                reason="Azure removes blocks that no list names only with the blob, and this blob was there before",
            )
        )

    def leftovers(self) -> tuple[str, ...]:
        """Commands for whatever may be left."""
        endpoint = shlex.quote(self._client.access.endpoint)
        ours = f"AZURE_STORAGE_SERVICE_ENDPOINT={endpoint} {shlex.join(['pipeline', 'uploads', 'abort', self.uri])}"
        commands = (ours,) if self._has_blocks else ()
        return commands + ((self._client.command("delete", self._name),) if self._maybe_visible else ())


async def discard_blocks(client: AzureClient, name: str, *, more_may_come: bool = False) -> bool:
    """Remove the blocks under a name that no list names. Returns False where a blob has the name, which keeps them.

    There is no request for it: a list that names none of them makes an empty blob and discards them (Put Block List),
    and the blob is removed again. A block that was on its way meanwhile comes after that: it is looked for again.

    Args:
        more_may_come: requests were cut off, so blocks are looked for although there are none.
    """
    for look in range(_LOOKS):
        if await client.blocks(name, committed=False):
            try:
                reply = await client.commit(name, (), {"If-None-Match": "*"})
            except AzureError as error:
                if error.status in (409, 412):
                    return False
                raise
            await client.delete(name, reply.header("etag"))
        elif not more_may_come:
            break
        if look < _LOOKS - 1:
            await anyio.sleep(_LOOK_EVERY_S)
    return True


def _sum_headers(sums: Sums | None) -> dict[str, str]:
    if sums is None:
        return {}
    headers = {"Content-MD5": sums.md5_text, "x-ms-content-crc64": _crc64_text(sums)}
    return {name: value for name, value in headers.items() if value}


def _crc64_text(sums: Sums) -> str:
    """Azure's CRC64 has the polynomial of CRC64NVME; its bytes go the other way round."""
    return "" if sums.crc64nvme is None else base64.b64encode(sums.crc64nvme.to_bytes(8, "little")).decode()


def _compare(reply: Reply, sums: Sums, number: int) -> None:
    """Look at what the store says that it got. Raises StoreError where that is not what was sent."""
    pairs = (
        ("MD5", sums.md5_text, reply.header("content-md5")),
        ("CRC64", _crc64_text(sums), reply.header("x-ms-content-crc64")),
    )
    for what, ours, theirs in pairs:
        if ours and theirs and ours != theirs:
            raise StoreError(
                f"the store got other bytes than were sent: its {what} is {theirs}, ours is {ours}",
                operation="put_part",
                number=number,
                hint="Suspect memory or network of this machine, or a proxy in between.",
            )
