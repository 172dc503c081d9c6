"""Who we are for Azure Blob Storage: an account key or a shared access signature, and how requests are signed.

Source: Azure Storage REST API, "Authorize with Shared Key" (Blob service, versions from 2015-02-21 on), "Create a
service SAS", "Configure Azure Storage connection strings".
"""

from __future__ import annotations

import base64
import binascii
import email.utils
import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from pipeline.errors import PlanError

# The newest version whose rules are used here: blocks of 4000 MiB came with 2019-12-12.
API_VERSION = "2021-12-02"
_HINT = (
    "Set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, "
    "or the options of the stage."
)
# In the order in which they are signed.
_SIGNED = (
    *("content-encoding", "content-language", "content-length", "content-md5", "content-type", "date"),
    *("if-modified-since", "if-match", "if-none-match", "if-unmodified-since", "range"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureAccess:
    """An account and what opens it.

    Attributes:
        endpoint: of its Blob service, without a slash at the end.
        key: of the account, decoded; empty where there is none.
        sas: a shared access signature, without "?"; empty where there is none.
        source: where it comes from, for people; never a secret.
    """

    account: str
    endpoint: str
    key: bytes
    sas: str
    source: str

    def __repr__(self) -> str:
        return f"AzureAccess({self.account}, {self.source})"

    def sign(self, method: str, url: str, headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """URL and all headers of a request, with what authorises it; sign anew for each attempt.

        Args:
            url: quoted already.
            headers: with Content-Length where there is a body.
        """
        signed = {**headers, "x-ms-version": API_VERSION}
        if not self.key:
            return (f"{url}{'&' if '?' in url else '?'}{self.sas}" if self.sas else url), signed
        signed["x-ms-date"] = email.utils.formatdate(usegmt=True)
        text = self._string_to_sign(method, url, signed)
        signature = base64.b64encode(hmac.new(self.key, text.encode(), hashlib.sha256).digest()).decode()
        signed["Authorization"] = f"SharedKey {self.account}:{signature}"
        return url, signed

    def _string_to_sign(self, method: str, url: str, headers: Mapping[str, str]) -> str:
        low = {name.lower(): value for name, value in headers.items()}
        values = ["" if name == "content-length" and low.get(name) == "0" else low.get(name, "") for name in _SIGNED]
        own = sorted(name for name in low if name.startswith("x-ms-"))
        parts = urlsplit(url)
        query = sorted(pair.partition("=")[::2] for pair in parts.query.split("&") if pair)
        resource = [f"/{self.account}{parts.path}", *(f"{name.lower()}:{unquote(value)}" for name, value in query)]
        return "\n".join([method, *values, *(f"{name}:{low[name].strip()}" for name in own), *resource])


def find_access(
    *, connection_string: str = "", account: str = "", key: str = "", sas: str = "", endpoint: str = ""
) -> AzureAccess:
    """What was given, else what the environment says.

    Args:
        endpoint: of the Blob service, instead of the account's own.
    Raises:
        PlanError: nothing opens an account, or what was given can't be used.
    """
    source = "the options"
    if not (connection_string or key or sas):
        connection_string = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
        account = account or os.environ.get("AZURE_STORAGE_ACCOUNT", "")
        source = "environment variables"
        if not connection_string:
            key, sas = os.environ.get("AZURE_STORAGE_KEY", ""), os.environ.get("AZURE_STORAGE_SAS_TOKEN", "")
    if connection_string:
        told = _connection(connection_string, source)
        account = told.get("accountname", account)
        key, sas = told.get("accountkey", ""), told.get("sharedaccesssignature", "")
        endpoint = endpoint or told.get("blobendpoint", "")
        if not endpoint and "endpointsuffix" in told:
            endpoint = f"{told.get('defaultendpointsprotocol', 'https')}://{account}.blob.{told['endpointsuffix']}"
        source += ", a connection string"
    endpoint = (endpoint or os.environ.get("AZURE_STORAGE_SERVICE_ENDPOINT", "")).rstrip("/")
    if not endpoint and account:
        endpoint = f"https://{account}.blob.core.windows.net"
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        wrong = f'"{endpoint}" is not the URL of a Blob service' if endpoint else "nobody says which storage account"
        raise PlanError(wrong, operation="credentials", hint=_HINT)
    # Behind an address, as of an emulator, the account is the first word of the path.
    account = account or parts.path.strip("/").partition("/")[0] or (parts.hostname or "").partition(".")[0]
    if not key and not sas:
        raise PlanError(f"there are no credentials for the account {account}", operation="credentials", hint=_HINT)
    return AzureAccess(
        account=account,
        endpoint=endpoint,
        key=_decoded(key),
        sas="" if key else sas.lstrip("?").strip(),
        source=f"{'account key' if key else 'shared access signature'} from {source}, account {account}",
    )


def _connection(text: str, source: str) -> dict[str, str]:
    """Its pairs, names in lower case. Raises PlanError, which never shows the text: a key may be in it."""
    pairs = [pair.partition("=") for pair in text.strip().split(";") if pair.strip()]
    if not all(equals and name.strip() for name, equals, _ in pairs):
        raise PlanError(
            "the connection string is malformed: it is not NAME=VALUE;NAME=VALUE",
            operation="credentials",
            source=source,
            hint="Copy all of it from the account's page of access keys: DefaultEndpointsProtocol=...;AccountName=...",
        )
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _decoded(key: str) -> bytes:
    try:
        return base64.b64decode(key, validate=True)
    except binascii.Error:
        raise PlanError(
            "the account key is not base64: it is not one, or was cut", operation="credentials", hint=_HINT
        ) from None
