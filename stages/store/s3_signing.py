"""Who we are for an S3 store: the standard AWS chain of credentials, and signatures over request headers.

Source: AWS General Reference, "Signature Version 4 signing process"; Amazon S3 API Reference, "Unsigned payload".
botocore finds the credentials and signs; no service model of it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
import anyio.to_thread
import botocore.auth
import botocore.awsrequest
import botocore.config
import botocore.credentials
import botocore.exceptions
import botocore.session

from pipeline.errors import PlanError

_CREDENTIALS_HINT = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or write ~/.aws/credentials, "
    "or give the machine a role."
)
# Parts carry checksums of their own: hashing their bytes once more for the signature (0.65 s a GB) proves nothing new.
_UNSIGNED = botocore.config.Config(s3={"payload_signing_enabled": False})
_SIGNED = botocore.config.Config(s3={"payload_signing_enabled": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What environment and AWS configuration files say; empty where they say nothing."""

    endpoint: str
    region: str
    ca_file: str


class RequestSigner(Protocol):
    """Whoever makes requests ours: by a signature, or by a token."""

    @property
    def region(self) -> str:
        """That requests are signed for."""
        ...

    @property
    def source(self) -> str:
        """Where the credentials come from, for people: never a secret."""
        ...

    async def sign(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> dict[str, str]:
        """All the headers of a request; sign anew for each attempt. `body` is None for that of a part."""
        ...

    async def renew(self, used: Mapping[str, str]) -> bool:
        """The store says that the credentials of a request, by its signed headers, have ended: are there others now?"""
        ...


class Signer:
    """Signs requests as one identity of the standard AWS chain: looked up once, refreshed when it expires.

    Session tokens that a program outside writes anew into a file have no time of expiry: the chain is asked once more
    when the store says that they have ended.
    """

    def __init__(self, credentials: Any, region: str, *, is_of_chain: bool = False) -> None:
        """Use `credentials` of botocore for `region`; those of the AWS chain can be looked up again."""
        self._credentials = credentials
        self._is_of_chain = is_of_chain
        self._renewing = anyio.Lock()
        self.region = region

    @property
    def source(self) -> str:
        """Where the credentials come from, and which key: never the secret."""
        return f"{_METHODS.get(self._credentials.method, self._credentials.method)}, key {self._credentials.access_key}"

    async def sign(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> dict[str, str]:
        """All the headers of a request with its signature; sign anew for each attempt.

        Args:
            url: quoted already.
            body: of a short request, which is hashed into the signature; None for the unsigned body of a part.
        """
        frozen = await self._frozen()
        request = botocore.awsrequest.AWSRequest(method=method, url=url, headers=dict(headers), data=body or b"")
        request.context["client_config"] = _UNSIGNED if body is None else _SIGNED
        botocore.auth.S3SigV4Auth(frozen, "s3", self.region).add_auth(request)
        return {str(name): str(value) for name, value in request.headers.items()}

    async def renew(self, used: Mapping[str, str]) -> bool:
        """Look the credentials up again, unless another request did so meanwhile; True where there are others now."""
        if not self._is_of_chain:
            return False
        async with self._renewing:
            if await self._was_used(used):
                try:
                    found = await anyio.to_thread.run_sync(_find_credentials)
                except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError):
                    return False
                self._credentials = found or self._credentials
            return not await self._was_used(used)

    async def _frozen(self) -> Any:
        """What the credentials are now."""
        if isinstance(self._credentials, botocore.credentials.RefreshableCredentials):
            return await anyio.to_thread.run_sync(self._credentials.get_frozen_credentials)  # may ask the network
        return self._credentials.get_frozen_credentials()

    async def _was_used(self, signed: Mapping[str, str]) -> bool:
        """Whether a request was signed with what we have now."""
        now = await self._frozen()
        given = {name.lower(): value for name, value in signed.items()}
        is_same_key = f"Credential={now.access_key}/" in given.get("authorization", "")
        return is_same_key and given.get("x-amz-security-token", "") == (now.token or "")


def key_signer(access_key: str, secret_key: str, region: str, source: str) -> Signer:
    """Signs with one pair of keys; `source` says where they come from."""
    return Signer(botocore.credentials.Credentials(access_key, secret_key, method=source), region)


_METHODS = {
    "env": "environment variables",
    "shared-credentials-file": "~/.aws/credentials",
    "config-file": "~/.aws/config",
    "iam-role": "the role of this machine",
    "container-role": "the role of this container",
    "assume-role": "an assumed role",
    "assume-role-with-web-identity": "a web identity",
    "sso": "single sign-on",
}


async def look_around() -> Surroundings:
    """What the AWS environment says about endpoint, region and trust. Reads files in a thread."""
    return await anyio.to_thread.run_sync(_look_around)


def _look_around() -> Surroundings:
    session = botocore.session.Session()
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or ""
    return Surroundings(
        endpoint=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "",
        region=region,
        ca_file=os.environ.get("AWS_CA_BUNDLE") or session.get_config_variable("ca_bundle") or "",
    )


async def find_signer(region: str) -> Signer:
    """Look for credentials in the standard AWS chain.

    Raises:
        PlanError: there are none, or they can't be had now.
    """
    try:
        credentials = await anyio.to_thread.run_sync(_find_credentials)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError) as error:
        raise PlanError(
            f"the credentials for the store can't be had: {error}", operation="credentials", hint=_CREDENTIALS_HINT
        ) from None
    if credentials is None:
        raise PlanError("there are no credentials for the store", operation="credentials", hint=_CREDENTIALS_HINT)
    return Signer(credentials, region, is_of_chain=True)


def _find_credentials() -> Any:
    return botocore.session.Session().get_credentials()
