"""The export file of a conversion: `pipeline convert` is `pipeline run` of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipeline.config.options import OptionField, convert, option_fields, without_secrets
from pipeline.config.parse import suggest
from pipeline.config.proposal import path_of_file_url, target_of, toml_text, writer_for
from pipeline.errors import ConfigError, Fault
from pipeline.flow.stage import NOTHING, Catalog, StageSpec

STDOUT = "-"
# Other tools' names for formats and options.
FORMAT_ALIASES = {"vpc": "vhd"}
OPTION_ALIASES = {"subformat": "variant", "compression_type": "compression"}

_SUFFIXES = {
    ".raw": "raw",
    ".img": "raw",
    ".qcow2": "qcow2",
    ".vhd": "vhd",
    ".vhdx": "vhdx",
    ".vmdk": "vmdk",
    ".ova": "ova",
    ".tar.gz": "gce",
}
# Encoders without an option for it, whose images are compressed all the same.
_COMPRESSED = ("encode.vmdk", "encode.gce", "encode.ova")
_SIZE = re.compile(r"(\d+)([kKMGT])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was asked for.

    Attributes:
        is_disk: the source is read as it is (`read.disk`): a block device, or a local file that is raw.
        source_format: where it is an image.
        target: path, URL, or `-` for stdout.
        format: of the target; empty: as its name says.
        options: NAME=VALUE of the encoder, also several with commas between.
    """

    source: str
    target: str
    is_disk: bool = False
    source_format: str = "auto"
    extents: tuple[str, ...] = ()
    member: str = ""
    backing: tuple[str, ...] = ()
    backing_format: str = "auto"
    format: str = ""
    options: tuple[str, ...] = ()
    compress: bool = False
    endpoint: str = ""
    ca_file: str = ""
    overwrite: bool = False
    verify: bool = True


def conversion_text(asked: Conversion, catalog: Catalog, *, masked: bool = False) -> str:
    """The export file; copies all blocks.

    Args:
        masked: passwords and signatures in URLs are left out, for people to see.
    Raises:
        ConfigError: with every fault of what was asked for.
    """
    faults: list[Fault] = []
    shown: Callable[[str], str] = without_secrets if masked else str
    encoder = _encoder(asked, catalog, faults)
    encoder_options = _encoder_options(asked, encoder, faults) if encoder else {}
    writer, writer_options = _writer(asked, encoder.name if encoder else "", encoder_options, catalog, faults)
    if faults or encoder is None or writer is None:
        raise ConfigError(faults)
    stages: list[tuple[str, dict[str, Any]]] = [
        _source(asked),
        ("checksum.guest", {}),
        ("sparse.zeros", {}),
        (encoder.name, encoder_options),
        (writer.name, writer_options),
    ]
    if asked.verify and writer.gives.item != NOTHING.item:
        stages.append(("verify.readback", {}))
    lines = [f"# {_one_line(shown(asked.source))} -> {_one_line(shown(asked.target))}, as `pipeline convert` does it."]
    lines += ["", "[export]", f"name = {toml_text(_name(asked.target))}"]
    if asked.target == STDOUT or is_url(asked.target):
        lines += ['manifest = "off" # as with qemu-img, nothing is left in the current folder']
    for use, options in stages:
        lines += ["", "[[stage]]", *_lines({"use": use, **options}, shown)]
    return "\n".join(lines) + "\n"


def _encoder(asked: Conversion, catalog: Catalog, faults: list[Fault]) -> StageSpec | None:
    known = [name.removeprefix("encode.") for name in catalog.names if name.startswith("encode.")]
    format = FORMAT_ALIASES.get(asked.format, asked.format)
    if not format:
        name = asked.target.partition("?")[0].lower()
        format = next((format for suffix, format in _SUFFIXES.items() if name.endswith(suffix)), "")
        if not format:
            hint = f"name it with -O: {', '.join(known)}"
            faults.append(Fault(reason=f"the name {_one_line(asked.target)} says no format", hint=hint, file="convert"))
            return None
    if format not in known:
        faults.append(Fault(reason=f'no image is written as "{format}"', hint=suggest(format, known), file="-O"))
        return None
    return catalog.find(f"encode.{format}")


def _encoder_options(asked: Conversion, encoder: StageSpec, faults: list[Fault]) -> dict[str, Any]:
    declared = {item.name: item for item in option_fields(encoder.options)}
    chosen: dict[str, Any] = {}
    for text in ",".join(asked.options).split(",") if asked.options else ():
        asked_name, equals, value = text.strip().partition("=")
        name = OPTION_ALIASES.get(asked_name, asked_name)
        if not equals:
            faults.append(Fault(reason=f'"{text}" is not OPTION=VALUE', hint="for example variant=fixed", file="-o"))
        elif name not in declared:
            hint = suggest(asked_name, list(declared)) or "it has no options"
            faults.append(Fault(reason=f'unknown option "{asked_name}" for {encoder.name}', hint=hint, file="-o"))
        else:
            try:
                chosen[name] = _value(value, declared[name])
            except ValueError as error:
                faults.append(Fault(reason=f"{asked_name}: {error}", file="-o"))
    if "compression" in declared:
        # As with qemu-img: without being asked for, nothing is compressed.
        chosen.setdefault("compression", "zlib" if asked.compress else "none")
        if asked.compress and chosen["compression"] == "none":
            faults.append(Fault(reason="-c and compression=none contradict each other", file="-o"))
    elif asked.compress and (encoder.name not in _COMPRESSED or chosen.get("variant") == "monolithicSparse"):
        hint = "-O qcow2 does, and -O vmdk -o variant=streamOptimized"
        faults.append(Fault(reason=f"{encoder.name} does not compress with these options", hint=hint, file="-c"))
    return chosen


def _value(text: str, item: OptionField) -> Any:
    """The value in the type that the option wants. Raises ValueError."""
    size = _SIZE.fullmatch(text)
    readings: list[Any] = [f"{size[1]} {size[2].upper()}iB"] if size else []
    readings += [text]
    if text.isdigit():
        readings.append(int(text))
    if text in ("true", "false", "on", "off"):
        readings.append(text in ("true", "on"))
    reasons = []
    for reading in readings:
        try:
            convert(reading, item.kind)
            return reading
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0])


def _source(asked: Conversion) -> tuple[str, dict[str, Any]]:
    if asked.is_disk:
        return "read.disk", {"path": _path(asked.source), "blocks": "all"}
    options: dict[str, Any] = {"url" if is_url(asked.source) else "path": _path(asked.source)}
    options["format"] = FORMAT_ALIASES.get(asked.source_format, asked.source_format)
    optional = {
        "extents": list(asked.extents),
        "member": asked.member,
        "backing": list(asked.backing),
        "backing_format": asked.backing_format if asked.backing else "",
        "endpoint": asked.endpoint if asked.source.startswith("s3:") else "",
        "ca_file": asked.ca_file if is_url(asked.source) else "",
    }
    return "read.image", options | {name: value for name, value in optional.items() if value}


def _writer(
    asked: Conversion, encoder: str, encoder_options: dict[str, Any], catalog: Catalog, faults: list[Fault]
) -> tuple[StageSpec | None, dict[str, Any]]:
    if asked.target == STDOUT:
        return catalog.find("write.pipe"), {}
    try:
        target = target_of(asked.target, catalog, asked.endpoint if asked.target.startswith("s3:") else "")
    except ValueError as error:
        faults.append(Fault(reason=str(error), file="convert"))
        return None, {}
    target = writer_for(target, encoder, encoder_options, catalog)
    options: dict[str, Any] = dict(target.options)
    if asked.ca_file and "ca_file" in {item.name for item in option_fields(target.writer.options)}:
        options["ca_file"] = asked.ca_file
    if asked.overwrite:
        options["overwrite"] = True
    return target.writer, options


def _lines(options: dict[str, Any], shown: Callable[[str], str]) -> Iterator[str]:
    width = max(len(name) for name in options)
    for name, value in options.items():
        yield f"{name:<{width}} = {_toml(value, shown)}"


def _toml(value: Any, shown: Callable[[str], str]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_toml(one, shown) for one in value)}]"
    return toml_text(shown(value)) if isinstance(value, str) else str(value)


def _name(target: str) -> str:
    """Names the run in messages and the manifest."""
    name = PurePosixPath(target.partition("?")[0]).name.partition(".")[0]
    return name if name.strip(" -") and name.isprintable() else "convert"


def is_url(place: str) -> bool:
    """Whether it is not on this machine, or no file."""
    return "://" in place and not place.startswith("file://")


def _path(place: str) -> str:
    """A URL as it is; of a file its path."""
    return path_of_file_url(place) if place.startswith("file://") else place


def _one_line(text: str) -> str:
    return "".join(char for char in text if char.isprintable())
