"""Who we are for Google Cloud Storage: HMAC keys, or a service account, whose key is exchanged for tokens.

Source: Google Cloud, "HMAC keys"; "Using OAuth 2.0 for server to server applications" (RFC 7523 assertions, RS256).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import anyio

from pipeline.errors import PlanError, StoreError
from stages.store.http import BytesBody, HttpClient

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
# A token is asked for anew this long before it ends.
_EARLY_S = 300.0
_HINT = (
    "Set GS_ACCESS_KEY_ID and GS_SECRET_ACCESS_KEY (an HMAC key), or GOOGLE_APPLICATION_CREDENTIALS (the key file of a "
    "service account), or the options of the stage."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GcsAccess:
    """What opens a bucket.

    Attributes:
        endpoint: of the XML and JSON interfaces, without a slash at the end.
        hmac: access key and secret; None where there is none.
        account: a service account; None where there is none, as at an emulator.
        source: for people; never a secret.
    """

    endpoint: str
    hmac: tuple[str, str] | None = field(default=None, repr=False)
    account: ServiceAccount | None = None
    source: str = "nobody: an emulator"


def find_access(
    *, hmac_key: str = "", hmac_secret: str = "", key_file: Path | None = None, endpoint: str = ""
) -> GcsAccess:
    """What was given, else what the environment says.

    Raises:
        PlanError: nothing opens a bucket, or the key file can't be used.
    """
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    where = (endpoint or emulator or "https://storage.googleapis.com").rstrip("/")
    parts = urlsplit(where)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.path:
        raise PlanError(f'"{where}" is not the URL of a store', operation="credentials", hint="Write https://HOST.")
    given = "the options" if hmac_key or key_file else "environment variables"
    if not hmac_key and not key_file:
        hmac_key, hmac_secret = os.environ.get("GS_ACCESS_KEY_ID", ""), os.environ.get("GS_SECRET_ACCESS_KEY", "")
        told = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
        key_file = Path(told) if told and not hmac_key else None
    if hmac_key and hmac_secret:
        return GcsAccess(endpoint=where, hmac=(hmac_key, hmac_secret), source=f"{given}, HMAC key {hmac_key}")
    if key_file is not None:
        account = ServiceAccount.read(key_file)
        return GcsAccess(endpoint=where, account=account, source=f"{given}, service account {account.email}")
    if emulator:
        return GcsAccess(endpoint=where)
    if hmac_key or hmac_secret:
        half, missing = "GS_ACCESS_KEY_ID", "GS_SECRET_ACCESS_KEY"
        if hmac_secret:
            half, missing = missing, half
        raise PlanError(
            f"half of the HMAC key is missing: {half} is set, and {missing} is not",
            operation="credentials",
            hint=f"Set {missing} too.",
        )
    raise PlanError("there are no credentials for the store", operation="credentials", hint=_HINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceAccount:
    """A service account's key, as its JSON file has it."""

    email: str
    key_id: str
    private_key: str = field(repr=False)
    token_uri: str = "https://oauth2.googleapis.com/token"

    @classmethod
    def read(cls, path: Path) -> ServiceAccount:
        """Read a key file. Raises PlanError."""
        try:
            told: Mapping[str, Any] = json.loads(path.read_text())
            if told["type"] != "service_account":
                raise PlanError(
                    f'the key file is of the type "{told["type"]}", and a service account\'s is wanted',
                    operation="credentials",
                    path=path,
                    hint=_HINT,
                )
            return cls(
                email=str(told["client_email"]),
                key_id=str(told.get("private_key_id", "")),
                private_key=str(told["private_key"]),
                token_uri=str(told.get("token_uri", cls.__dataclass_fields__["token_uri"].default)),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not the key file of a service account"
            raise PlanError(f"the key file can't be used: {reason}", operation="credentials", path=path) from None

    def assertion(self, now: float) -> str:
        """The signed claim that is exchanged for a token. Raises PlanError without the package for it."""
        try:
            from cryptography.hazmat.primitives import hashes, serialization
            from cryptography.hazmat.primitives.asymmetric import padding, rsa
        except ModuleNotFoundError:
            raise PlanError(
                "a service account needs the package cryptography, which is not installed",
                operation="credentials",
                hint="pip install 'disk-pipeline[gcs]', or use an HMAC key.",
            ) from None
        claim = {"iss": self.email, "scope": _SCOPE, "aud": self.token_uri, "iat": int(now), "exp": int(now) + 3600}
        header = {"alg": "RS256", "typ": "JWT", "kid": self.key_id}
        text = ".".join(_encoded(json.dumps(part).encode()) for part in (header, claim))
        try:
            key = serialization.load_pem_private_key(self.private_key.encode(), password=None)
        except ValueError:
            key = None
        if not isinstance(key, rsa.RSAPrivateKey):
            raise PlanError("the private key in the key file can't be used", operation="credentials")
        return f"{text}.{_encoded(key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def lock_session(access: GcsAccess, session: str) -> str:
    """A session's URL as a journal may have it: whoever has the URL itself may finish the upload, without any login.

    Only the service account's key opens it again. An emulator asks nobody who he is, and its URLs stay as they are.
    """
    return (
        session if access.account is None or not session else _cipher(access.account).encrypt(session.encode()).decode()
    )


def unlock_session(access: GcsAccess, locked: str) -> str:
    """What `lock_session` was given; empty where another account's key locked it."""
    if access.account is None or not locked:
        return locked
    from cryptography.fernet import InvalidToken

    try:
        return str(_cipher(access.account).decrypt(locked.encode()).decode())
    except InvalidToken:
        return ""


def _cipher(account: ServiceAccount) -> Any:
    from cryptography.fernet import Fernet

    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(b"upload session " + account.private_key.encode()).digest()))


class BearerSigner:
    """Puts a token of a service account on every request, and gets a new one before it ends. One event loop."""

    def __init__(self, access: GcsAccess, ca_file: Path | None = None) -> None:
        """Use the account of `access`; without one, requests go out as they are."""
        self._account = access.account
        self._ca_file = ca_file
        self._token, self._ends = "", 0.0
        self._lock = anyio.Lock()
        self.region = "auto"
        self.source = access.source

    async def sign(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> dict[str, str]:
        """The headers with a token. Raises StoreError, PlanError where none can be had."""
        if self._account is None:
            return dict(headers)
        async with self._lock:
            if time.time() > self._ends - _EARLY_S:
                await self._refresh(self._account)
        return {**headers, "Authorization": f"Bearer {self._token}"}

    async def renew(self, used: Mapping[str, str]) -> bool:
        """Tokens are got anew before they end."""
        return False

    async def _refresh(self, account: ServiceAccount) -> None:
        now = time.time()
        form = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": account.assertion(now)}
        parts = urlsplit(account.token_uri)
        client = HttpClient(
            f"{parts.scheme}://{parts.netloc}",
            connections=1,
            ca_file=self._ca_file,
            told_by='"token_uri" in the key file of the service account',
        )
        try:
            reply = await client.request(
                "POST",
                account.token_uri,
                {"Content-Type": "application/x-www-form-urlencoded"},
                BytesBody(urlencode(form).encode()),
                operation="credentials",
            )
        finally:
            await client.close()
        try:
            told: Mapping[str, Any] = json.loads(reply.body)
            self._token, self._ends = str(told["access_token"]), now + float(told.get("expires_in", 3600))
        except (ValueError, KeyError, TypeError):
            raise StoreError(
                f"no token for {account.email}: the server answered {reply.status}",
                temporary=reply.status >= 500 or reply.status == 429,
                status=reply.status,
                operation="credentials",
                hint="Is the key of the service account still valid, and this machine's clock right?",
            ) from None


def _encoded(data: bytes) -> str:
    """Source: RFC 7515, section 2: base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
