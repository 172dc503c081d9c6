"""From the text of an export file to typed options, or to every fault in it at once."""

from __future__ import annotations

import os
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config import locate
from pipeline.config.locate import Place, Places
from pipeline.config.options import BelowMinimumError, OptionField, Secret, option, option_fields
from pipeline.errors import ConfigError, Fault
from pipeline.flow.stage import Catalog, StageSpec
from pipeline.units import MiB, Size, format_size

# Below this not even one window a stage, one part and a table of a large disk fit beside each other.
MEMORY_MIN = Size(32 * MiB)
# A name stands in file names, beside the target's own; filesystems take 255 bytes.
_NAME_MAX = 100
# An export file is a page of text. Whoever names a disk image here should be told, not wait until it is read.
FILE_MAX = MiB
# From this likeness on a name is offered instead. Lower, and "target" is taken for "stage"; higher, and slips are lost.
MEANT = 0.75
# What somebody writes who takes a path for a switch. A file of that name is "./on".
_SWITCHES = ("on", "true", "yes", "default", "auto")
NAMES_SHOWN = 12  # a longer list of names is not read by anybody


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The `[export]` section."""

    name: str = option(doc="Names the run in messages, logs and the manifest.", example='"web01"')
    memory: Size = option(Size(96 * MiB), doc="Everything that holds disk bytes; at least 32 MiB.")
    manifest: Literal["off"] | Path | None = option(
        None, doc="Where the local copy of the manifest goes, or off; default: beside this file."
    )
    journal: Literal["off"] | Path | None = option(
        None,
        doc="Where the run notes what was sent, so that a killed one can be resumed; default: the user's state folder.",
    )
    on_failure: Literal["keep", "abort"] = option(
        "keep", doc="keep leaves what was sent, to be resumed; abort removes everything that was stored."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserveOptions:
    """The `[observe]` section."""

    report: Path | None = option(None, doc="Write a page about the run here, for a browser; also when it failed.")
    prometheus: Path | None = option(
        None, doc="Keep the run's metrics in this file, for node exporter's textfile collector; ends in .prom."
    )
    log_file: Path | None = option(None, doc="Append the log to this file, one JSON object a line.")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", doc="The least that is logged.")

    def __post_init__(self) -> None:
        if self.prometheus is not None and self.prometheus.suffix != ".prom":
            raise ValueError("prometheus must end in .prom: node exporter reads no other file of its folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """The `[target]` section: the cloud that the image is for."""

    profile: str | None = option(
        None, doc="Its rules: a name of `pipeline profiles`, or the path of a file of yours.", example='"tencent"'
    )
    boot_mode: Literal["bios", "uefi"] | None = option(
        None, doc="How machines start there; default: as the profile says."
    )
    kind: Literal["system", "data"] = option(
        "system", doc="A data disk boots nothing: only disk, size and format are checked."
    )
    ignore: tuple[str, ...] = option((), doc="Ids of rules of the preflight that do not stop the run; recorded.")

    def __post_init__(self) -> None:
        if self.profile is None and (self.boot_mode or self.ignore or self.kind != "system"):
            raise ValueError("[target] has no profile: without one nothing is checked")


SECTIONS: dict[str, type[Any]] = {"export": ExportOptions, "target": TargetOptions, "observe": ObserveOptions}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One `[[stage]]` of the file.

    Attributes:
        options: an instance of `spec.options`.
        place: (line, column) of the value of `use`, from 1.
        index: from 0, in file order.
    """

    spec: StageSpec
    options: Any
    place: tuple[int, int]
    index: int

    @property
    def name(self) -> str:
        """The TOML name."""
        return self.spec.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """An export file whose options are all right. Whether its stages fit together is for the wiring to say."""

    export: ExportOptions
    observe: ObserveOptions
    stages: tuple[StageConfig, ...]
    target: TargetOptions
    file: Path
    text: str = field(repr=False)
    catalog: Catalog = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What could be read of a file.

    Attributes:
        config: None where there are faults.
        stages: those whose `use` is known, faulty or not; the options of a faulty one are None.
        all_known: whether that is every stage of the file.
    """

    config: ExportConfig | None
    stages: tuple[StageConfig, ...]
    all_known: bool
    text: str
    faults: tuple[Fault, ...]


def load_config(file: Path, catalog: Catalog, overrides: Sequence[str] = ()) -> ExportConfig:
    """Read an export file. Nothing but the file and the environment is touched.

    Args:
        overrides: `stage.name.option=value` or `export.option=value`, as given to `--set`. The value is TOML where it
            parses as such, else a text.
    Raises:
        ConfigError: with every fault of the file and the overrides.
    """
    draft = read_draft(file, catalog, overrides)
    if draft.config is None:
        raise ConfigError(list(draft.faults))
    return draft.config


def read_draft(file: Path, catalog: Catalog, overrides: Sequence[str] = (), *, text: str | None = None) -> Draft:
    """Read as much of an export file as can be read, with all its faults.

    Args:
        text: of the file, where it is not to be read.
    Raises:
        ConfigError: the file can't be read, or is not TOML.
    """
    text = _read_text(file) if text is None else text
    document = _read_toml(text, str(file))
    return _Reader(file, text, document, catalog, overrides).read()


def sort_faults(faults: Iterable[Fault]) -> list[Fault]:
    """In the order of the file: what has no place first, the command line's last."""
    return sorted(faults, key=lambda fault: (fault.file == "--set", fault.line, fault.column))


def suggest(word: str, names: Sequence[str]) -> str:
    """A way out for a name that is not one of `names`: the one that was meant, or all of them where they are few."""
    best = max(names, key=lambda name: _closeness(word, name), default="")
    if best and _closeness(word, best) >= MEANT:
        return f'did you mean "{best}"?'
    return f"known are {', '.join(names)}" if 0 < len(names) <= NAMES_SHOWN else ""


def _closeness(word: str, name: str) -> float:
    """How alike two names are, 0 to 1. Both halves of a dotted name count: `verify.x` is not meant by `write.x`."""
    word, name = word.lower(), name.lower()
    halves = (word.partition("."), name.partition("."))
    if "." in name and "." not in word:
        pairs = [(word, halves[1][2])]  # "qcow2" for "encode.qcow2"
    else:
        pairs = [(halves[0][0], halves[1][0]), (halves[0][2], halves[1][2])]
    return min(_likeness(*pair) for pair in pairs)


def _likeness(one: str, other: str) -> float:
    from difflib import SequenceMatcher

    begins = min(len(one), len(other)) >= 3 and (one.startswith(other) or other.startswith(one))
    return max(SequenceMatcher(None, one, other).ratio(), MEANT if begins else 0.0)


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            content = opened.read(FILE_MAX + 1)
    except OSError as error:
        hint = "Give the path of an export file." if isinstance(error, FileNotFoundError) else ""
        reason = (error.strerror or str(error)).lower()
        raise ConfigError([Fault(reason=f"can't be read: {reason}", hint=hint, file=str(file))]) from None
    if len(content) > FILE_MAX:
        hint = 'The disk stands inside the export file: use = "read.disk", path = "...".'
        reason = f"larger than {format_size(FILE_MAX)}, which no export file is"
        raise ConfigError([Fault(reason=reason, hint=hint, file=str(file))])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        start = content.rfind(b"\n", 0, error.start) + 1
        end = content.find(b"\n", error.start)
        shown = locate.shown(content[start : len(content) if end < 0 else end].decode("utf-8", "replace"))
        column = len(content[start : error.start].decode("utf-8-sig")) + 1
        fault = Fault(
            reason="not UTF-8 text",
            hint="save the file as UTF-8",
            file=str(file),
            line=line,
            column=column,
            text=shown,
        )
        raise ConfigError([fault]) from None


def _read_toml(text: str, file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and numbers of thousands of digits
        raise ConfigError([locate.syntax_fault(error, text, file)]) from None
    except RecursionError:
        raise ConfigError([Fault(reason="arrays or tables are nested too deeply", file=file)]) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Override:
    """One `--set`: the readings of its value, the most likely first."""

    key: str
    readings: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """One section or stage of the document, and what the messages call it."""

    title: str
    path: locate.Path
    content: Mapping[str, Any]
    overrides: Mapping[str, _Override]
    place: Place | None  # where a missing option is told


class _Reader:
    """Reads one document, collecting faults instead of stopping at the first."""

    def __init__(
        self, file: Path, text: str, document: dict[str, Any], catalog: Catalog, overrides: Sequence[str]
    ) -> None:
        self._file = file
        self._text = text
        self._document = document
        self._catalog = catalog
        self._places: Places = locate.locate(text)
        self._faults: list[Fault] = []
        self._overrides = self._read_overrides(overrides)

    def read(self) -> Draft:
        export = self._section("export")
        observe = self._section("observe")
        target = self._section("target")
        stages, all_known = self._stages()
        self._unknown_sections()
        config = None
        if not self._faults:
            config = ExportConfig(
                export=export,
                observe=observe,
                target=target,
                stages=stages,
                file=self._file,
                text=self._text,
                catalog=self._catalog,
            )
        return Draft(
            config=config,
            stages=stages,
            all_known=all_known,
            text=self._text,
            faults=tuple(sort_faults(self._faults)),
        )

    # The parts of the document

    def _unknown_sections(self) -> None:
        for name, value in self._document.items():
            if name in SECTIONS or name == "stage":
                continue
            place = self._places.find((name,))
            if isinstance(value, (dict, list)):
                self._fault(place, f"unknown section [{name}]", suggest(name, [*SECTIONS, "stage"]))
                continue
            owner = next((title for title, kind in SECTIONS.items() if name in _names(kind)), "")
            hint = (
                f"it belongs below [{owner}]"
                if owner
                else "options stand below [export], [target], [observe] or a [[stage]]"
            )
            self._fault(place, f'option "{name}" stands outside of any section', hint)

    def _section(self, name: str) -> Any:
        content = self._document.get(name, {})
        if not isinstance(content, dict):
            self._fault(self._places.find((name,)), f'"{name}" is not a section', f"write it as [{name}]")
            return None
        if name == "export" and name not in self._document and (name, "name") not in self._overrides:
            self._fault(None, "there is no [export] section", 'start the file with [export] and name = "web01"')
            return None
        table = _Table(
            title=f"[{name}]",
            path=(name,),
            content=content,
            overrides={key: override for (owner, key), override in self._overrides.items() if owner == name},
            place=self._places.header((name,)),
        )
        options = self._options(SECTIONS[name], table)
        if isinstance(options, ExportOptions):
            self._check_export(options, table)
        return options

    def _check_export(self, options: ExportOptions, table: _Table) -> None:
        if options.memory < MEMORY_MIN:
            reason = f"memory: {format_size(options.memory)} is too little"
            self._value_fault(table, "memory", reason, f"at least {format_size(MEMORY_MIN)}")
        for key, value in (("journal", options.journal), ("manifest", options.manifest)):
            if str(value) in _SWITCHES:
                self._value_fault(table, key, f'{key}: "{value}" is no path', f"leave {key} out: then it is written")
        if options.journal == "off" and table.content.get("on_failure") == "keep":
            reason = "on_failure: nothing can be kept without a journal"
            self._value_fault(table, "on_failure", reason, 'remove journal = "off"')
        if not options.name.strip() or options.name.startswith(".") or not options.name.isprintable():
            self._value_fault(table, "name", "name: this can't name a run", 'a short word such as "web01"')
        elif "/" in options.name:
            self._value_fault(table, "name", "name: a / is not allowed", "it becomes part of file names")
        elif (length := len(os.fsencode(options.name))) > _NAME_MAX:
            reason = f"name: {length} bytes are too long; at most {_NAME_MAX}"
            self._value_fault(table, "name", reason, "it becomes part of file names")

    def _stages(self) -> tuple[tuple[StageConfig, ...], bool]:
        entries = self._document.get("stage", [])
        if isinstance(entries, dict):
            self._fault(self._places.header(("stage",)), "a stage is written [[stage]]", "with two brackets")
            entries = []
        elif not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            self._fault(self._places.find(("stage",)), '"stage" is not a list of stages', "write each as [[stage]]")
            entries = []
        elif not entries:
            hint = 'A chain reads, encodes and writes: [[stage]] use = "read.disk", then "encode.*", then "write.*".'
            self._fault(None, "there is no [[stage]]", hint)
        found = [self._stage(index, entry) for index, entry in enumerate(entries)]
        known = tuple(stage for stage in found if stage is not None)
        self._overrides_without_stage([str(entry.get("use")) for entry in entries])
        return known, bool(entries) and len(known) == len(entries)

    def _stage(self, index: int, entry: Mapping[str, Any]) -> StageConfig | None:
        path = ("stage", index)
        use = entry.get("use")
        if use is None:
            hint = 'name it: use = "read.disk"; `pipeline stages` lists all'
            self._fault(self._places.header(path), "this stage has no use", hint)
            return None
        place = self._places.value((*path, "use"))
        if not isinstance(use, str):
            self._fault(place, "use: the name of a stage is wanted", "`pipeline stages` lists all")
            return None
        spec = self._catalog.find(use)
        if spec is None:
            self._fault(place, f'unknown stage "{use}"', self._suggest_stage(use))
            return None
        table = _Table(
            title=use,
            path=path,
            content={name: value for name, value in entry.items() if name != "use"},
            overrides={key: override for (owner, key), override in self._overrides.items() if owner == use},
            place=place,
        )
        options = self._options(spec.options, table)
        at = (place.line, place.column) if place else (0, 0)
        return StageConfig(spec=spec, options=options, place=at, index=index)

    def _suggest_stage(self, use: str) -> str:
        role, dot, _ = use.partition(".")
        names = self._catalog.names
        same_role = [name for name in names if name.partition(".")[0] == role]
        hint = suggest(use, names) if dot or not same_role else ""
        if not hint.startswith("did you mean") and same_role:
            hint = f"known are {', '.join(same_role)}"
        return hint or "`pipeline stages` lists all"

    # Options

    def _options(self, kind: type[Any], table: _Table) -> Any:
        """An instance of `kind`, or None after the faults were noted."""
        before = len(self._faults)
        declared = {item.name: item for item in option_fields(kind)}
        for name in table.content:
            if name not in declared:
                place = self._places.find((*table.path, name))
                self._fault(place, f'unknown option "{name}" for {table.title}', _suggest_option(name, declared))
        for name, override in table.overrides.items():
            if name not in declared:
                reason = f'{override.key}: unknown option "{name}" for {table.title}'
                self._faults.append(Fault(reason=reason, hint=_suggest_option(name, declared), file="--set"))
        values: dict[str, Any] = {}
        for item in declared.values():
            if item.name in table.overrides or item.name in table.content:
                self._convert_into(values, item, table)
            elif item.required:
                reason = f'missing option "{item.name}" for {table.title}'
                self._fault(table.place, reason, f"add {item.name} = {example_text(item)}")
        if all(item.name in values for item in declared.values() if item.required):
            options = self._build(kind, values, table)
            return options if len(self._faults) == before else None
        return None

    def _convert_into(self, values: dict[str, Any], item: OptionField, table: _Table) -> None:
        override = table.overrides.get(item.name)
        readings = override.readings if override else (table.content[item.name],)
        reasons = []
        for reading in readings:
            try:
                values[item.name] = item.read(reading)
                return
            except BelowMinimumError as error:
                reasons = [str(error)]
                break  # it was understood: no other reading tells more
            except ValueError as error:
                reasons.append(str(error))
        hint = suggest(readings[-1], item.choices) if item.choices and isinstance(readings[-1], str) else ""
        self._value_fault(
            table, item.name, f"{item.name}: {reasons[-1]}", hint if hint.startswith("did you mean") else "", item
        )

    def _build(self, kind: type[Any], values: dict[str, Any], table: _Table) -> Any:
        """Make the options; what `__post_init__` refuses is told at the option that its message starts with.

        An option that is given and could not be read is not among `values`: what is said of it would be false.
        """
        try:
            return kind(**values)
        except ValueError as error:
            first = str(error).replace(":", " ").split(" ", 1)[0]
            unread = (set(table.content) | set(table.overrides)) & set(_names(kind)) - set(values)
            if unread & set(re.findall(r"\w+", str(error))):
                return None
            if first in values:
                self._value_fault(table, first, str(error), "")
            elif first not in _names(kind):
                self._fault(table.place, f"{table.title}: {error}", "")
            return None

    # Overrides

    def _read_overrides(self, texts: Sequence[str]) -> dict[tuple[str, str], _Override]:
        """By (section or stage name, option)."""
        found = {}
        for text in texts:
            key, equals, value = text.partition("=")
            key = key.strip()
            owner, _, name = key.rpartition(".")
            if not equals or not owner or not name:
                hint = "For example --set encode.qcow2.level=small or --set export.memory=1GiB."
                self._faults.append(Fault(reason=f'"{key}" is not stage.name.option=value', hint=hint, file="--set"))
                continue
            found[owner, name] = _Override(key=key, readings=_readings(value.strip()))
        return found

    def _overrides_without_stage(self, used: Sequence[str]) -> None:
        for (owner, _), override in self._overrides.items():
            if owner in SECTIONS or owner in used:
                continue
            reason = f'{override.key}: there is no stage or section "{owner}" in {self._file.name}'
            self._faults.append(Fault(reason=reason, hint=suggest(owner, [*SECTIONS, *used]), file="--set"))

    # Faults

    def _value_fault(self, table: _Table, name: str, reason: str, hint: str, item: OptionField | None = None) -> None:
        """A fault of an option's value, told where the value came from."""
        override = table.overrides.get(name)
        if override:
            told = f"{override.key.rpartition('.')[0]}.{reason}"
            self._faults.append(Fault(reason=told, hint=hint, file="--set"))
            return
        if name not in table.content:
            self._fault(table.place, reason, hint)
            return
        place = self._places.value((*table.path, name))
        self._fault(place, reason, hint, masked=item is not None and _is_secret(item.kind))

    def _fault(self, place: Place | None, reason: str, hint: str, *, masked: bool = False) -> None:
        fault = Fault(reason=reason, hint=hint, file=str(self._file))
        if place:
            text = self._places.line(place.line)
            if masked:
                # Somebody wrote a password into the file; it must not travel on into a build log.
                start = place.column - 1
                text = text[:start] + "*" * place.width + text[start + place.width :]
            fault = replace(fault, line=place.line, column=place.column, width=place.width, text=text)
        self._faults.append(fault)


def _readings(value: str) -> tuple[Any, ...]:
    """The value as TOML where it is some, and as the text that it is."""
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return (value,)
    if set(parsed) != {"value"}:
        return (value,)
    # A name or path of digits is meant as a text; a quoted text is not meant with its quotes.
    return (parsed["value"],) if isinstance(parsed["value"], (str, dict, list)) else (parsed["value"], value)


def _names(kind: type[Any]) -> list[str]:
    return [item.name for item in option_fields(kind)]


def _suggest_option(name: str, declared: Mapping[str, OptionField]) -> str:
    return suggest(name, list(declared)) if declared else "it has no options"


def example_text(item: OptionField) -> str:
    """The declared example as TOML; a text may be declared without its quotes."""
    if not item.example:
        return "..."
    try:
        tomllib.loads(f"value = {item.example}")
    except ValueError:
        return f'"{item.example}"'
    return item.example


def _is_secret(kind: Any) -> bool:
    return kind is Secret or Secret in typing.get_args(kind)
