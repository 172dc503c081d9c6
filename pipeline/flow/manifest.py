"""The manifest: what was exported, how, and what proves it. Written last; it is the publish signal.

Its name is `<object or file name>.manifest.json`, beside the image in the store and as a local copy. `pipeline verify`
needs the manifest and the image only.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import FormatError
from pipeline.flow.items import Run, Why, tiles

MANIFEST_SUFFIX = ".manifest.json"
VERSION = 1


def manifest_uri(image_uri: str) -> str:
    """Where the manifest of an image is."""
    return image_uri + MANIFEST_SUFFIX


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRecord:
    """The source. Bytes."""

    size: int
    identity: dict[str, str]
    totals: dict[str, int]
    runs: str  # see pack_runs
    runs_exact: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """The stored image. Bytes.

    Attributes:
        order: how its pieces were placed (a file and an object may differ in where the body begins).
    """

    uri: str
    format: str
    size: int
    virtual_size: int
    window: int
    order: str
    head_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a run knows at its end.

    Attributes:
        facts: what the stages left for later readers, by fact name; "guest digest" has algorithm, root and leaves.
        options: TOML name of each stage, and "export", to its option values; secrets are masked.
        receipt: (what, ours, theirs) values that the store confirmed.
        verdicts: what the verifications found; empty means "stored, not verified".
        versions: of this program, of Python, and of every codec and library that shapes bytes.
        timings: per stage, seconds working / waiting for input / for output / for a buffer; of the last attempt.
        series: how it went over time, see `pipeline.flow.series.Series.to_json`; for the report.
        attempts: processes that the export took.
        preflight: what the rules of [target] said before the start: profile, boot_mode, verdict, ignored, findings.
    """

    name: str
    created: str
    disk: DiskRecord
    image: ImageRecord
    state: str
    facts: dict[str, Any]
    options: dict[str, dict[str, Any]]
    receipt: tuple[tuple[str, str, str], ...] = ()
    verdicts: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    timings: dict[str, dict[str, float]] = field(default_factory=dict)
    bottleneck: str = ""
    elapsed_s: float = 0.0
    series: dict[str, Any] = field(default_factory=dict)
    attempts: int = 1
    preflight: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @property
    def digest(self) -> dict[str, Any] | None:
        """The guest digest as its stage wrote it; None where the chain had no checksum.guest."""
        found: dict[str, Any] | None = self.facts.get("guest digest")
        return found

    def to_json(self) -> bytes:
        """UTF-8 JSON, keys in a fixed order, ending in a newline."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes | str, *, where: str) -> Manifest:
        """Read a manifest; a stranger's or a newer one is a FormatError that names `where`."""
        try:
            raw = json.loads(text)
            if raw["version"] > VERSION:
                raise FormatError(
                    f"the manifest has version {raw['version']}, this program reads up to {VERSION}",
                    hint="Use the version of this program that wrote it, or a newer one.",
                    manifest=where,
                )
            raw["disk"] = DiskRecord(**raw["disk"])
            raw["image"] = ImageRecord(**raw["image"])
            raw["receipt"] = tuple(tuple(proof) for proof in raw["receipt"])
            raw["verdicts"] = tuple(raw["verdicts"])
            return cls(**raw)
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                "this is not a manifest of an export",
                hint=f"Its name must end in {MANIFEST_SUFFIX} and `pipeline run` must have written it.",
                manifest=where,
                reason=str(error),
            ) from None


def pack_runs(runs: list[Run]) -> str:
    """The map as text: base64 of the zlib of lines `<length> <why>`, in guest order from 0."""
    lines = "\n".join(f"{run.length} {run.why.value}" for run in runs)
    return base64.b64encode(zlib.compress(lines.encode(), 9)).decode()


def unpack_runs(text: str, size: int) -> list[Run]:
    """The map again; FormatError when it does not tile a disk of `size` bytes."""
    from pipeline.flow.items import Content

    try:
        inflater = zlib.decompressobj()
        lines = inflater.decompress(base64.b64decode(text), 64 << 20).decode().splitlines()
        runs, offset = [], 0
        for line in lines:
            length, why = line.split()
            content = Content.DATA if why == Why.READ.value else Content.ZERO
            runs.append(Run(offset, int(length), content, Why(why)))
            offset += int(length)
    except (ValueError, zlib.error) as error:
        raise FormatError("the manifest's map can't be read", reason=str(error)) from None
    if not tiles(tuple(runs), 0, size):
        raise FormatError("the manifest's map does not cover the disk", size=size)
    return runs
