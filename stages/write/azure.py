"""What the writers of Azure blobs share: options, credentials, the target and the manifest beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.options import Secret
from pipeline.errors import PlanError, StoreError
from pipeline.flow.manifest import MANIFEST_SUFFIX
from pipeline.flow.pacing import RATE_MIN
from pipeline.flow.stage import StageContext, option
from pipeline.units import Size

# aiohttp is imported where a store is really talked to.
if TYPE_CHECKING:
    from pipeline.flow.items import RangeReader
    from pipeline.flow.retry import Retry, RetryPolicy
    from stages.store.azure import AzureClient, BlobState
    from stages.store.http import Timeouts


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureOptions:
    """Where a blob goes, and as whom."""

    url: str = option(
        doc="Where the image goes: az://CONTAINER/NAME, in the account of the credentials.",
        example='"az://images/web01.vhd"',
    )
    account: str = option("", doc="The storage account; else as the credentials say.", may_change=True)
    key: Secret | None = option(None, doc='The account key, as { env = "NAME" }.', may_change=True)
    sas: Secret | None = option(None, doc='A shared access signature, as { env = "NAME" }.', may_change=True)
    connection_string: Secret | None = option(
        None,
        doc='A connection string, as { env = "NAME" }. Without any of these: AZURE_STORAGE_CONNECTION_STRING, or '
        "AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN.",
        may_change=True,
    )
    endpoint: str = option(
        "", doc="The Blob service's address, for other clouds and emulators; else the account's own.", may_change=True
    )
    ca_file: Path | None = option(None, doc="PEM certificates to trust instead of the system's.", may_change=True)
    attempts: int = option(
        6, doc="How often a request is sent when the store fails for a moment.", may_change=True, minimum=1
    )
    rate_limit: Size | None = option(
        None, doc='Send at most this much a second, as in "40 MiB".', may_change=True, minimum=RATE_MIN
    )


class BlobPlace:
    """One target blob and its manifest, with the connections to their container."""

    def __init__(
        self,
        options: AzureOptions,
        context: StageContext,
        *,
        overwrite: bool,
        connections: int,
        timeouts: Timeouts | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        """Find credentials; sends nothing. Raises PlanError."""
        from pipeline.flow.retry import Retry, RetryPolicy
        from stages.store.azure import AzureClient, AzureUrl
        from stages.store.azure_access import find_access

        where = AzureUrl.parse(options.url)
        access = find_access(
            connection_string=_revealed(options.connection_string),
            account=options.account,
            key=_revealed(options.key),
            sas=_revealed(options.sas),
            endpoint=options.endpoint,
        )
        self.retry: Retry = Retry(
            policy or RetryPolicy(attempts=options.attempts),
            clock=context.clock,
            emit=context.emit,
            stage=context.name,
        )
        self.client: AzureClient = AzureClient.connect(
            where.container,
            access,
            ca_file=options.ca_file,
            connections=connections,
            timeouts=timeouts,
            on_alive=self.retry.alive,
        )
        self.name = where.name
        self._overwrite = overwrite
        self._stage = context.name
        self._manifest: bytes | None = None

    @property
    def manifest_name(self) -> str:
        return self.name + MANIFEST_SUFFIX

    async def look_at_target(self) -> BlobState | None:
        """What is there now. Raises PlanError where that is not to be replaced, or the store refuses us."""
        from stages.store.azure import AzureError

        replaced = None
        try:
            for name in (self.name, self.manifest_name):
                found = await self.retry.call("head", lambda name=name: self.client.head(name))  # type: ignore[misc]
                if found is not None and not self._overwrite:
                    raise PlanError(
                        "the target exists",
                        operation="plan",
                        uri=self.client.uri(name),
                        size=found.size,
                        hint=f"Choose another name, or set overwrite = true in {self._stage}.",
                    )
                replaced = replaced or found if name == self.name else replaced
        except AzureError as error:
            if error.temporary:
                raise
            raise PlanError(
                f"the store refuses: {error.message}", operation="plan", hint=error.hint, **error.context
            ) from None
        return replaced

    @asynccontextmanager
    async def reader(self) -> AsyncIterator[RangeReader]:
        """The blob as it is now."""
        from stages.store.azure import read_state

        yield await read_state(self.client, self.name, self.retry)

    async def publish(self, manifest: bytes) -> str:
        """Put the manifest beside the image. Raises StoreError, also where somebody else put one meanwhile."""
        self._manifest = manifest
        await self.retry.call("put_manifest", lambda: self._put_manifest(manifest))
        return self.client.uri(self.manifest_name)

    async def _put_manifest(self, manifest: bytes) -> None:
        from stages.store.azure import AzureError

        headers = {"Content-Type": "application/json"} | ({} if self._overwrite else {"If-None-Match": "*"})
        try:
            await self.client.put_blob(self.manifest_name, manifest, headers, "put_manifest")
        except AzureError as error:
            # Also an earlier attempt of ours, whose answer was lost.
            if error.status not in (409, 412) or not self._is_ours(await self.client.head(self.manifest_name)):
                raise

    def _is_ours(self, found: BlobState | None) -> bool:
        import hashlib

        ours = hashlib.md5(self._manifest or b"", usedforsecurity=False).hexdigest()
        return found is not None and self._manifest is not None and found.md5 == ours

    async def remove_manifest(self) -> None:
        """Delete the manifest that this run put. Raises StoreError."""
        found = await self.client.head(self.manifest_name)
        if found is not None and self._is_ours(found):
            await self.client.delete(self.manifest_name, found.etag)
        self._manifest = None

    @property
    def manifest_commands(self) -> tuple[str, ...]:
        """What removes a manifest of ours."""
        return () if self._manifest is None else (self.client.command("delete", self.manifest_name),)

    async def close(self) -> None:
        """Close connections; idempotent."""
        await self.client.close()


def gone_meanwhile(uri: str) -> StoreError:
    """What was stored is not there any more."""
    return StoreError("the stored image is gone", operation="read", uri=uri)


def _revealed(secret: Secret | None) -> str:
    return secret.reveal() if secret is not None else ""
