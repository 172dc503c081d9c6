"""Target profiles: what a cloud takes, as data. Ours lie in `profiles/`; users add their own by path.

Every field that says something about a cloud has a source in `[told_by]`, and every source the month it was read.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipeline.config import locate
from pipeline.config.options import convert, option, option_fields
from pipeline.config.parse import suggest
from pipeline.errors import ConfigError, Fault
from pipeline.units import KiB, Size
from stages.preflight.findings import Severity

BootMode = Literal["bios", "uefi"]
Folder = Path(__file__).parent / "profiles"
_FILE_MAX = 256 * KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRule:
    """What an object or image may be called."""

    max: int = option(255, doc="Characters.")
    pattern: str = option("", doc="A regular expression that the whole name matches.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drivers:
    """What the kernel must be able to drive. Each list holds alternatives; of one of them everything is needed."""

    block: tuple[tuple[str, ...], ...] = option((), doc="For the disk: needed to find the root filesystem.")
    net: tuple[tuple[str, ...], ...] = option((), doc="For the network card.")
    extra: tuple[str, ...] = option((), doc="Others that its agent needs.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agents:
    """What must be installed to be set up by the cloud."""

    any_of: tuple[str, ...] = option((), doc="cloud-init, waagent: one of them.")
    version: str = option("", doc="The least version of cloud-init.")
    datasource: str = option("", doc="The source of cloud-init that answers there.")
    waiver: str = option("", doc="How one imports without.")
    remove: tuple[str, ...] = option((), doc="Agents of other clouds that disturb there.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """What the kernel's command line should say."""

    wants: tuple[str, ...] = option((), doc="Arguments that the vendor asks for.")
    forbids: tuple[str, ...] = option((), doc="Arguments that the vendor refuses.")
    console: str = option("", doc="The serial console that the vendor reads.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystems:
    """What may be on the disk."""

    allow: tuple[str, ...] = option((), doc="Filesystems that the import can read; none: any.")
    subvolumes: bool = option(True, doc="Whether btrfs may have its root in a subvolume.")
    discouraged: tuple[str, ...] = option((), doc="What the vendor asks to leave out: swap, lvm2.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What the machine over there looks like."""

    disk: str = option("", doc="Name of the first disk.")
    nic: str = option("", doc="Name of the first network card.")
    nics: int = option(0, doc="How many network cards there are; 0 for any number.")
    video: str = option("", doc="The video card.")
    processors: tuple[str, ...] = option((), doc="x86_64, x86, aarch64: what programs may be for; none: any.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """How much a rule counts there, where that differs."""

    id: str = option(doc="Of the rule.")
    level: Severity = option(doc="block, warn or info.")
    table: str = option("", doc="Only for disks with this partition table.")
    boot_mode: str = option("", doc="Only when it boots so.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where something was read."""

    title: str = option(doc="Of the page.")
    checked: str = option(doc="The month in which it was read, 2026-11.")
    url: str = option("", doc="Its address, where it is public.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One target. Sizes in bytes; 0 for no limit that is known."""

    name: str = option(doc="As it is written in [target].")
    title: str = option(doc="For people.")
    formats: tuple[str, ...] = option(
        (), doc="Images that it takes, format or format:variant; the first is the default."
    )
    max_virtual: Size = option(Size(0), doc="Of the disk; larger ones are refused.")
    max_virtual_safe: Size = option(Size(0), doc="Of the disk, where the vendor's unit is not clear.")
    max_file: Size = option(Size(0), doc="Of the image; larger ones are refused.")
    max_file_safe: Size = option(Size(0), doc="Of the image, where the vendor's unit is not clear.")
    align: Size = option(Size(1 << 20), doc="The disk's size is a multiple of it.")
    sector: int = option(512, doc="Bytes of a sector there.")
    disks_max: int = option(1, doc="Disks that one import takes.")
    boot_modes: tuple[BootMode, ...] = option(
        ("bios", "uefi"), doc="How machines start there; the first is the default."
    )
    adapts: bool = option(
        True, doc="Whether a machine there starts the way the disk is prepared for, unless told otherwise."
    )
    tables: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # by boot mode
    encryption: bool = option(True, doc="Whether disks that are encrypted inside are taken.")
    own_kernel: bool = option(True, doc="Whether kernels of one's own are taken.")
    steps: tuple[str, ...] = option((), doc="The provider's commands that import the object.")
    notes: tuple[str, ...] = option((), doc="What a person should know.")
    name_rule: NameRule = NameRule()
    drivers: Drivers = Drivers()
    agents: Agents = Agents()
    command_line: CommandLine = CommandLine()
    hardware: Hardware = Hardware()
    filesystems: Filesystems = Filesystems()
    severity: tuple[Weight, ...] = ()
    told_by: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    source: dict[str, Source] = dataclasses.field(default_factory=dict)

    @property
    def renames_disks(self) -> bool:
        """Whether the disk gets another name there than servers give it."""
        return bool(self.hardware.disk)

    @property
    def checked(self) -> str:
        """The oldest month in which one of its sources was read."""
        return min((one.checked for one in self.source.values()), default="")

    def tables_for(self, boot_mode: BootMode) -> tuple[str, ...]:
        """Partition tables that it boots from in a mode; none: nothing is known against any."""
        return self.tables.get(boot_mode, ())

    def weight(self, id: str, *, table: str, boot_mode: BootMode) -> Severity | None:
        """How much a failure of a rule counts there, where the profile has a word in it. The last that fits wins."""
        found: Severity | None = None
        for one in self.severity:
            fits = one.table in ("", table) and one.boot_mode in ("", boot_mode)
            if fits and (one.id == id or (one.id.endswith("*") and id.startswith(one.id[:-1]))):
                found = one.level
        return found


def names() -> tuple[str, ...]:
    """The profiles that come with the program."""
    return tuple(sorted(path.stem for path in Folder.glob("*.toml")))


def find_profile(name: str) -> Profile:
    """A profile by its name, or by the path of a file (which has a / in it or ends in .toml).

    Raises:
        ConfigError: there is none, or the file is faulty; with every fault and its place.
    """
    if "/" in name or name.endswith(".toml"):
        return load_profile(Path(name))
    if name not in names():
        hint = suggest(name, names()) or "`pipeline profiles` lists all."
        raise ConfigError(
            [
                Fault(
                    reason=f'there is no profile "{name}"',
                    hint=f"{hint}. A path means a file of yours.".replace("?.", "?").replace("..", "."),
                )
            ]
        )
    return _shipped(name)


@cache
def _shipped(name: str) -> Profile:
    return load_profile(Folder / f"{name}.toml")


def load_profile(file: Path) -> Profile:
    """Read a profile. Raises ConfigError with every fault."""
    try:
        with file.open("rb") as opened:
            raw = opened.read(_FILE_MAX + 1)
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
        raise ConfigError([Fault(reason=f"the profile can't be read: {reason}", file=str(file))]) from None
    if len(raw) > _FILE_MAX:
        raise ConfigError([Fault(reason="larger than any profile", file=str(file))])
    try:
        document = tomllib.loads(text)
    except ValueError as error:
        raise ConfigError([locate.syntax_fault(error, text, str(file))]) from None
    except RecursionError:
        raise ConfigError([Fault(reason="arrays or tables are nested too deeply", file=str(file))]) from None
    reader = _Reader(file, text)
    profile = reader.read(Profile, document, ())
    if reader.faults:
        raise ConfigError(sorted(reader.faults, key=lambda one: (one.line, one.column)))
    assert isinstance(profile, Profile)
    return profile


class _Reader:
    """Turns tables into dataclasses, collecting faults."""

    def __init__(self, file: Path, text: str) -> None:
        self.faults: list[Fault] = []
        self._file = file
        self._places = locate.locate(text)

    def read(self, kind: type[Any], table: dict[str, Any], path: locate.Path) -> Any:
        """An instance, or None after faults were noted."""
        fields = {one.name: one for one in option_fields(kind)}
        missing = dataclasses.MISSING
        required = {one.name for one in dataclasses.fields(kind) if one.default is one.default_factory is missing}
        for name in table:
            if name not in fields:
                self._fault((*path, name), f'unknown option "{name}"', suggest(name, list(fields)))
        values: dict[str, Any] = {}
        before = len(self.faults)
        for name, field in fields.items():
            if name in table:
                values[name] = self._value(field.kind, table[name], (*path, name))
            elif name in required:
                self._fault(path, f'missing option "{name}"', field.doc)
        return kind(**values) if len(self.faults) == before else None

    def _value(self, kind: Any, value: Any, path: locate.Path) -> Any:
        try:
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                return self.read(kind, _a_table(value), path)
            arguments = typing.get_args(kind)
            inner = arguments[-1] if arguments and arguments[-1] is not ... else arguments[0] if arguments else None
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                if typing.get_origin(kind) is dict:
                    return {key: self.read(inner, _a_table(one), (*path, key)) for key, one in _a_table(value).items()}
                if not isinstance(value, list):
                    raise ValueError("a list of tables is wanted")
                return tuple(self.read(inner, _a_table(one), (*path, at)) for at, one in enumerate(value))
            return convert(value, kind)
        except ValueError as error:
            self._fault(path, f"{path[-1]}: {error}", "")
            return None

    def _fault(self, path: locate.Path, reason: str, hint: str) -> None:
        place = self._places.find(path) or (self._places.header(path) if path else None)
        if place is None:
            self.faults.append(Fault(reason=reason, hint=hint, file=str(self._file)))
            return
        self.faults.append(
            Fault(
                reason=reason,
                hint=hint,
                file=str(self._file),
                line=place.line,
                column=place.column,
                width=place.width,
                text=self._places.line(place.line),
            )
        )


def _a_table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a table is wanted")
    return value
