"""An S3 server as its users see it: where it is, who may enter, and a plain client to arrange and look at things with.

The client here is botocore, and raw signed requests where botocore would not send or show a header. It is for the
tests' own needs (buckets, what is really stored, which uploads are open), so that a test never asks the code under test
about its own work.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, Self
from urllib.parse import quote, urlencode, urlsplit

import botocore.auth
import botocore.awsrequest
import botocore.config
import botocore.credentials
import botocore.session

_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """One identity of a store."""

    access_key: str
    secret_key: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server answered to a raw request; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The S3 error code in the body; empty where there is none."""
        _, found, rest = self.body.partition(b"<Code>")
        return rest.partition(b"</Code>")[0].decode() if found else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running S3 server.

    Attributes:
        limited: an identity that may read and not write (SeaweedFS), or may nothing (Swift): 403 either way on a write.
        ca_file: what a client must trust to reach `endpoint`; None for plain http.
    """

    name: Literal["swift", "seaweedfs"]
    endpoint: str
    region: str
    credentials: Credentials
    limited: Credentials
    ca_file: Path | None = None

    @property
    def port(self) -> int:
        """The port of `endpoint`, which a proxy forwards to."""
        port = urlsplit(self.endpoint).port
        assert port is not None
        return port

    def reached_at(self, endpoint: str) -> S3Server:
        """The same server through a proxy."""
        return replace(self, endpoint=endpoint)

    def as_limited(self) -> S3Server:
        """The same server, entered as the limited identity."""
        return replace(self, credentials=self.limited)

    def environment(self) -> dict[str, str]:
        """The variables of the standard AWS chain that lead a program to this server."""
        variables = {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret_key,
            "AWS_REGION": self.region,
        }
        if self.ca_file is not None:
            variables["AWS_CA_BUNDLE"] = str(self.ca_file)
        return variables

    def client(self, *, attempts: int = 1, timeout_s: float = _TIMEOUT_S) -> Any:
        """A botocore client: path style, no checksums of its own accord, one attempt unless told.

        Asked again it is the same one. The type is Any because botocore makes its clients' methods at run time.
        Threads: any.
        """
        return _client(self, attempts, timeout_s)

    def create_bucket(self, name: str) -> str:
        """Create a bucket, and give its name back; nothing happens where it is there already."""
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        except (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            pass
        return name

    def new_bucket(self) -> str:
        """Create a bucket that no other test has."""
        return self.create_bucket(f"test-{uuid.uuid4().hex[:16]}")

    def delete_bucket(self, name: str) -> None:
        """Remove a bucket with its objects and open uploads, so that the disk has room again."""
        client = self.client()
        for key, upload_id in self.open_uploads(name):
            client.abort_multipart_upload(Bucket=name, Key=key, UploadId=upload_id)
        for key in self.keys(name):
            client.delete_object(Bucket=name, Key=key)
        client.delete_bucket(Bucket=name)

    def put(self, bucket: str, key: str, body: bytes) -> str:
        """Store an object; returns its ETag with the quotes."""
        return str(self.client().put_object(Bucket=bucket, Key=key, Body=body)["ETag"])

    def get(self, bucket: str, key: str) -> bytes:
        """Read a whole object."""
        body: bytes = self.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return body

    def keys(self, bucket: str) -> list[str]:
        """The names of all the objects in a bucket, sorted."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", ()))

    def open_uploads(self, bucket: str) -> list[tuple[str, str]]:
        """Multipart uploads that are neither completed nor aborted, as (key, upload id)."""
        pages = self.client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket)
        return sorted((entry["Key"], entry["UploadId"]) for page in pages for entry in page.get("Uploads", ()))

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        *,
        payload_hash: str | None = None,
    ) -> Answer:
        """Send one signed request exactly as told, with no retry and no header that was not asked for.

        Args:
            path: `/bucket/key`, not yet quoted.
            payload_hash: for x-amz-content-sha256, the right one where none is given; `UNSIGNED-PAYLOAD` is allowed.
        """
        parts = urlsplit(self.endpoint)
        target = quote(path, safe="/~-_.") + (f"?{urlencode(query)}" if query else "")
        request = botocore.awsrequest.AWSRequest(
            method=method, url=f"{parts.scheme}://{parts.netloc}{target}", data=body, headers=dict(headers or {})
        )
        credentials = botocore.credentials.Credentials(self.credentials.access_key, self.credentials.secret_key)
        _Signer(credentials, self.region, payload_hash or hashlib.sha256(body).hexdigest()).add_auth(request)
        signed = {str(name): str(value) for name, value in request.headers.items()}
        if body or method in ("PUT", "POST"):
            signed["Content-Length"] = str(len(body))
        assert parts.hostname is not None
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=self.ca_file)
            connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S, context=context)
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
        try:
            connection.request(method, target, body=body or None, headers=signed)
            response = connection.getresponse()
            return Answer(
                status=response.status,
                headers={name.lower(): value for name, value in response.getheaders()},
                body=response.read(),
            )
        finally:
            connection.close()


@lru_cache(maxsize=32)  # Making one takes 60 ms.
def _client(server: S3Server, attempts: int, timeout_s: float) -> Any:
    session = botocore.session.Session()
    session.set_config_variable("credentials_file", os.devnull)
    session.set_config_variable("config_file", os.devnull)
    return session.create_client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=server.region,
        aws_access_key_id=server.credentials.access_key,
        aws_secret_access_key=server.credentials.secret_key,
        verify=str(server.ca_file) if server.ca_file else None,
        config=botocore.config.Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": attempts, "mode": "standard"},
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


class _Signer(botocore.auth.S3SigV4Auth):  # type: ignore[misc]  # The base has no types.
    """Signature version 4 with a payload hash that the caller chose, right or wrong."""

    def __init__(self, credentials: object, region: str, payload_hash: str) -> None:
        super().__init__(credentials, "s3", region)
        self._payload_hash = payload_hash

    def payload(self, request: object) -> str:
        return self._payload_hash


class StoreProcess(Protocol):
    """A store server that a test has for itself: it may be killed and started, same port, same data."""

    @property
    def server(self) -> S3Server: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    def restart(self) -> None: ...

    def is_running(self) -> bool: ...

    def resident_bytes(self) -> int: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
