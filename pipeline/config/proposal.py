"""The text of a new export file: what is known of the disk and the target, with the reason of every choice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from urllib.parse import unquote

from pipeline.config.options import option_fields
from pipeline.config.wiring import accepted_by, option_for
from pipeline.flow.stage import Catalog, StageSpec
from pipeline.units import MiB, format_size

# Suffix of the target: the encoder that makes it.
_ENCODERS = {
    ".raw": "encode.raw",
    ".img": "encode.raw",
    ".vhd": "encode.vhd",
    ".vhdx": "encode.vhdx",
    ".vmdk": "encode.vmdk",
    ".ova": "encode.ova",
}
_DEFAULT_ENCODER = "encode.qcow2"
_WHY = {
    "encode.qcow2": "compressed, and imported by every cloud",
    "encode.raw": "byte for byte; as long as the disk",
}
# An encoder, and the option (name, value) that it needs.
Encoding = tuple[str, tuple[str, str] | None]
_FIXED_VHD = ("encode.vhd", ("variant", "fixed"))
# Below this much free memory the default would make a small machine swap.
_SCARCE = 320 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the image goes.

    Attributes:
        writer: the SPEC that stores there.
        options: its option values.
        is_guess: nobody named it: a person has to look at it before the run.
    """

    writer: StageSpec
    options: dict[str, str]
    is_guess: bool = False

    @property
    def address(self) -> str:
        """The path or URL."""
        return self.options.get("url") or self.options.get("path") or self.writer.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What the file is about.

    Attributes:
        disk_title: size and model of the disk, for a comment.
        is_device: a block device, no image file.
        mounted: where the disk is mounted so that it can be written; empty for a disk that holds still.
        whole_disk: the disk that `disk` is only a partition of, else nothing.
        memory: bytes of memory that the machine has left; 0 where unknown.
        profile: the cloud that the image is for, as [target] names it; empty for none.
        encoder: the stage that the profile wants, with its option (name, value); empty: as the target's name asks.
        journal: where it has to be because its usual place lies on the disk; else nothing.
    """

    name: str
    disk: str
    disk_title: str
    target: Target
    is_device: bool = True
    mounted: tuple[str, ...] = ()
    whole_disk: str = ""
    memory: int = 0
    profile: str = ""
    encoder: str = ""
    encoder_option: tuple[str, str] | None = None
    journal: str = ""


def path_of_file_url(url: str) -> str:
    """The path that it names, without its quoting."""
    return unquote(url.removeprefix("file://"))


def target_of(url: str, catalog: Catalog, endpoint: str = "") -> Target:
    """The writer for a path or URL.

    Raises:
        ValueError: nothing is stored under this scheme, or the writer refuses the address; with the way out.
    """
    scheme = url.partition("://")[0] if "://" in url else "file"
    writer = next((spec for spec in catalog if spec.role == "write" and scheme in spec.schemes), None)
    if writer is None:
        known = sorted({f"{one}://" for spec in catalog if spec.role == "write" for one in spec.schemes})
        raise ValueError(f"nothing is stored under {scheme}:// here; a path, or a URL with {', '.join(known)}")
    names = {item.name for item in option_fields(writer.options)}
    options = {"url": url} if "url" in names else {"path": path_of_file_url(url) if url.startswith("file://") else url}
    if endpoint and "endpoint" not in names:
        raise ValueError(f"{writer.name} has no endpoint")
    if endpoint:
        options["endpoint"] = endpoint
    names_folder = not PurePosixPath(url.rpartition("://")[2]).name or url.endswith("/")
    if names_folder and not scheme.startswith("nbd"):  # an export may have no name
        raise ValueError(f'"{url}" names a folder; name the image itself, for example {url.rstrip("/")}/web01.qcow2')
    return Target(writer=writer, options=options)


def encoder_of(target: Target, catalog: Catalog) -> Encoding:
    """The image format that the target's name asks for; where the target can't take it, a plain qcow2 or raw."""
    wanted = _named_encoder(target)
    first = _FIXED_VHD if wanted == "encode.vhd" and target.writer.name == "write.azure_block" else (wanted, None)
    for encoding in (first, (_DEFAULT_ENCODER, None)):
        found = fitting(encoding, target, catalog)
        if found:
            return found
    return "encode.raw", None


def _named_encoder(target: Target) -> str:
    return _ENCODERS.get(PurePosixPath(target.address).suffix.lower(), _DEFAULT_ENCODER)


def fitting(encoding: Encoding, target: Target, catalog: Catalog) -> Encoding | None:
    """The encoder, with the option that the target needs where the caller names none; None: it can't go there."""
    name, option = encoding
    spec = catalog.find(name)
    if spec is None or (_is_disk(target) and name != "encode.raw"):
        return None
    options, accepted = spec.options(**dict([option] if option else [])), accepted_by(target.writer)
    if set(accepted) & set(spec.orders_of(options)):
        return encoding
    found = option_for(spec, options, accepted) if option is None else None
    return (name, found) if found else None


def _is_disk(target: Target) -> bool:
    """Whether it is written in place, as a disk: an image file has no place there."""
    return target.writer.name == "write.nbd"


def writer_for(target: Target, encoder: str, options: Mapping[str, object], catalog: Catalog) -> Target:
    """The target with the writer that this format wants: Azure makes disks of fixed VHDs in page blobs only."""
    page = catalog.find("write.azure_page")
    is_fixed = encoder == "encode.vhd" and options.get("variant") == "fixed"
    if target.writer.name != "write.azure_block" or not is_fixed or page is None:
        return target
    return replace(target, writer=page)


def _settled(proposal: Proposal, catalog: Catalog) -> Proposal:
    """The proposal with encoder and writer that fit each other."""
    encoder, option = proposal.encoder, proposal.encoder_option
    if not encoder:
        encoder, option = encoder_of(proposal.target, catalog)
    target = writer_for(proposal.target, encoder, dict([option] if option else []), catalog)
    journal = proposal.journal if target.writer.resumable else ""
    return replace(proposal, target=target, encoder=encoder, encoder_option=option, journal=journal)


def proposal_text(proposal: Proposal, catalog: Catalog) -> str:
    """The export file. It passes `pipeline check`."""
    proposal = _settled(proposal, catalog)
    parts = [
        _head(proposal),
        _export(proposal),
        *([_target(proposal)] if proposal.profile else []),
        _source(proposal),
        _stage("checksum.guest", note="a digest of what was read, before anything else looks at it"),
        _stage("sparse.zeros", note="zeros that are stored on the disk need not be stored again"),
        _encoder(proposal),
        _writer(proposal.target),
        *_verifiers(proposal.target, catalog),
    ]
    return "\n\n".join(parts) + "\n"


def _head(proposal: Proposal) -> str:
    what = _printable(f"{proposal.disk} -> {proposal.target.address}")
    lines = [
        f"# {what}, written by `pipeline init`. Every option of every stage: `pipeline stages NAME`.",
        "# Completion and help in an editor: pipeline stages --schema > export.schema.json, and as the first line here",
        "# #:schema ./export.schema.json",
    ]
    return "\n".join(lines)


def _export(proposal: Proposal) -> str:
    scarce = 0 < proposal.memory < _SCARCE
    memory, why = ("32 MiB", "the least: little memory is free here") if scarce else ("96 MiB", "")
    free = f"; {format_size(proposal.memory)} are free here" if proposal.memory and not scarce else ""
    why = why or f"everything that holds disk bytes; the program takes up to 128 MiB more{free}"
    journal = []
    if proposal.journal:
        journal = [
            "# What --resume needs. Its usual place lies on the disk that is exported; this one is memory, and lasts",
            "# until the machine starts anew. On another disk it outlives that, too.",
            _line("journal", proposal.journal, 6),
        ]
    return "\n".join(
        [
            "[export]",
            _line("name", proposal.name, 6, "names the run in messages, logs and the manifest"),
            _line("memory", memory, 6, why),
            *journal,
            "",
            "[observe]",
            _line("report", f"{proposal.name}.html", 6, "a page about the run, for a browser"),
            _note('# log_file = "export.log"', "one JSON object a line"),
            f'# prometheus = "/var/lib/node_exporter/{proposal.name}.prom"',
        ]
    )


def _source(proposal: Proposal) -> str:
    comments = []
    if proposal.mounted:
        points = _printable(", ".join(proposal.mounted[:4])) + (" ..." if len(proposal.mounted) > 4 else "")
        comments = [
            f"# THIS DISK IS IN USE: {points} can be written while it is read. The image then holds many moments of",
            "# the disk at once; a filesystem in it may need repair, a database may be lost. Better: boot a rescue",
            "# system, export a snapshot (LVM, hypervisor, cloud), or let its filesystems hold still meanwhile:",
            '# consistency = "freeze", with the journal and the log on another disk or in /run.',
        ]
    if proposal.whole_disk:
        comments += [
            f"# This is one partition of {_printable(proposal.whole_disk)}. An image of it does not boot: boot code",
            "# and partition table lie before the first partition. Name the whole disk for a system disk.",
        ]
    if not proposal.is_device:
        comments += ["# An image file: taken for raw, byte for byte what the disk holds."]
    lines = [
        "[[stage]]",
        *comments,
        'use  = "read.disk"',
        _line("path", proposal.disk, 4, _printable(proposal.disk_title)),
    ]
    return "\n".join(lines)


def _target(proposal: Proposal) -> str:
    lines = [
        "[target]",
        _line("profile", proposal.profile, 7, "its rules are asked before anything is sent: pipeline preflight"),
        _note('# kind = "data"', "a disk that boots nothing: only disk, size and format are looked at"),
    ]
    return "\n".join(lines)


def _encoder(proposal: Proposal) -> str:
    name, option = proposal.encoder, proposal.encoder_option
    text = _stage(name, note=_why(proposal))
    if option is not None:
        return f"{text}\n{_line(*option, 3)}"
    if name != "encode.qcow2":
        return text
    return "\n".join(
        [
            text,
            _note(
                '# compression = "zlib"',
                "zlib is read everywhere; zstd is smaller and faster, not in every cloud; or none",
            ),
            _note('# level = "fast"', "small: a tenth smaller, three times the time"),
        ]
    )


def _why(proposal: Proposal) -> str:
    """The reason for the encoder."""
    if proposal.profile and proposal.encoder_option:
        return "what the profile of [target] takes"
    if proposal.target.writer.name == "write.azure_page":
        return "a fixed VHD, the one that Azure makes disks of"
    if _is_disk(proposal.target):
        return "the target is a disk: byte for byte"
    if proposal.encoder_option or (not proposal.profile and proposal.encoder != _named_encoder(proposal.target)):
        return "the target wants an image from its first byte to its last"
    return _WHY.get(proposal.encoder, "as the name of the target asks")


def _writer(target: Target) -> str:
    width = max(len(name) for name in ("use", *target.options))
    lines = ["[[stage]]"]
    if target.is_guess:
        lines.append(
            "# LOOK AT THIS: nobody said where the image goes. Another disk, a mounted share, or s3://BUCKET/NAME with"
        )
        lines.append('# use = "write.s3". Never the disk that is exported: that is refused.')
    if target.writer.name == "write.s3":
        lines.append("# Credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or an instance role.")
    lines.append(_line("use", target.writer.name, width))
    lines += [_line(name, value, width) for name, value in target.options.items()]
    if target.writer.name == "write.s3" and "endpoint" not in target.options:
        lines.append(_note('# endpoint = "https://s3.example.com"', "any S3-compatible store; without it, AWS"))
    if any(field.name == "overwrite" for field in dataclasses.fields(target.writer.options)):
        lines.append(_note("# overwrite = true", "else an image that is there already is never touched"))
    return "\n".join(lines)


def _verifiers(target: Target, catalog: Catalog) -> list[str]:
    found = []
    if target.writer.name == "write.s3" and catalog.find("verify.receipt"):
        found.append(_stage("verify.receipt", note="the store's own checksums against ours: nothing is fetched"))
    note = "every byte, fetched and decoded; leave it out where egress is what costs" if found else ""
    found.append(_stage("verify.readback", note=note or "read it again, decode it, compare every byte with the disk"))
    return found


def _stage(name: str, *, note: str) -> str:
    return "[[stage]]\n" + _line("use", name, 3, note)


def _line(name: str, value: str, width: int, note: str = "") -> str:
    text = f"{name:<{width}} = {toml_text(value)}"
    return _note(text, note) if note else text


def _note(text: str, note: str) -> str:
    return f"{text:<30} # {note}"


def toml_text(value: str) -> str:
    """A TOML basic string. JSON's strings are some, but for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _printable(text: str) -> str:
    """Without control characters, for a comment: the name of a model or a file may hold anything, line ends too."""
    return "".join(char for char in text if char.isprintable())
