"""From the stages of a file to a chain whose neighbours fit, or to every reason why they do not.

Pure: looks at declarations only, never at a disk, a target or the environment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.config import locate
from pipeline.config.options import option_fields
from pipeline.config.outputs import output_faults
from pipeline.config.parse import ExportConfig, StageConfig, read_draft, sort_faults
from pipeline.errors import ConfigError, Fault
from pipeline.flow.orders import Order
from pipeline.flow.stage import DISK_SIZE, Catalog, StageSpec

# The order in which data passes the roles; what a [[stage]] may stand behind.
ROLES = ("read", "checksum", "sparse", "encode", "compress", "write", "verify")
# The same with a place for checks of the image, whose role is "checksum" too.
_PLACES = ("read", "checksum", "sparse", "encode", "compress", "image", "write", "verify")
_ALONE = {"read": "source", "encode": "encoder", "write": "writer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WiredChain:
    """Stages that fit together, by what they do.

    Attributes:
        functions: between source and encoder, in file order.
        checks: of the image, between the last stage that shapes it and the writer.
        order: how pieces travel from the encoder to the writer.
    """

    source: StageConfig
    functions: tuple[StageConfig, ...]
    encoder: StageConfig
    compressors: tuple[StageConfig, ...]
    checks: tuple[StageConfig, ...]
    writer: StageConfig
    verifiers: tuple[StageConfig, ...]
    order: Order

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """Every stage, in the order data passes."""
        before = (self.source, *self.functions, self.encoder)
        return (*before, *self.compressors, *self.checks, self.writer, *self.verifiers)

    @property
    def names(self) -> tuple[str, ...]:
        """Their TOML names, in the order data passes."""
        return tuple(stage.name for stage in self.stages)


def wire(config: ExportConfig) -> WiredChain:
    """Put the stages of a file together.

    Raises:
        ConfigError: with every reason why they do not fit.
    """
    wiring = _Wiring(config.stages, config.catalog, config.file, config.text)
    wiring.check()
    faults = [*wiring.faults, *output_faults(config)]
    if faults:
        raise ConfigError(sort_faults(faults))
    return wiring.chain()


def load_chain(
    file: Path, catalog: Catalog, overrides: Sequence[str] = (), *, text: str | None = None
) -> tuple[ExportConfig, WiredChain]:
    """Read a file and wire its stages: `load_config` and `wire`, with the faults of both at once.

    Args:
        text: of the file, where it is not to be read.
    Raises:
        ConfigError: as both do. Stages are wired only when all are known: a misspelt one is not also a missing one.
    """
    draft = read_draft(file, catalog, overrides, text=text)
    if draft.config is not None:
        return draft.config, wire(draft.config)
    faults = list(draft.faults)
    if draft.all_known:
        wiring = _Wiring(draft.stages, catalog, file, draft.text)
        wiring.check()
        faults += wiring.faults
    raise ConfigError(sort_faults(faults))


class _Wiring:
    """Checks one list of stages; never looks at their options."""

    def __init__(self, stages: Sequence[StageConfig], catalog: Catalog, file: Path, text: str) -> None:
        self.faults: list[Fault] = []
        self._catalog = catalog
        self._file = file
        self._lines = text.split("\n")
        self._written = stages
        self._stages: list[StageConfig] = []  # without duplicates, in the right order
        self._orders: tuple[Order, ...] = ()

    def check(self) -> None:
        """Note every fault. Each check looks at the chain as it would be once the faults before it are mended."""
        self._stages = sorted(self._without_duplicates(), key=lambda stage: _PLACES.index(_place(stage)))
        self._check_sequence()
        self._check_counts()
        self._check_items()
        self._check_orders()
        self._check_facts()

    def chain(self) -> WiredChain:
        """The chain, after `check` found no fault."""
        return WiredChain(
            source=self._of("read")[0],
            functions=tuple(self._of("checksum", "sparse")),
            encoder=self._of("encode")[0],
            compressors=tuple(self._of("compress")),
            checks=tuple(self._of("image")),
            writer=self._of("write")[0],
            verifiers=tuple(self._of("verify")),
            order=self._orders[0],
        )

    def _of(self, *places: str) -> list[StageConfig]:
        return [stage for stage in self._stages if _place(stage) in places]

    def _without_duplicates(self) -> list[StageConfig]:
        seen: dict[str, StageConfig] = {}
        for stage in self._written:
            first = seen.setdefault(stage.name, stage)
            if first is not stage:
                self._fault(stage, f"{stage.name} stands in the chain twice", f"it is there in line {first.place[0]}")
        return list(seen.values())

    def _check_sequence(self) -> None:
        written = sorted(self._stages, key=lambda stage: stage.index)
        right = "the right order is " + " -> ".join(stage.name for stage in self._stages)
        # Checksums and sparse stages count as one place here: what is wrong between them has a reason of its own.
        ranks = [_PLACES.index(_place(stage).replace("sparse", "checksum")) for stage in written]
        misplaced = set(range(len(ranks))) - set(_longest_ascending(ranks))
        for number in sorted(misplaced):
            self._fault(written[number], f"{written[number].name} stands in the wrong place", right)
        in_place = [stage for number, stage in enumerate(written) if number not in misplaced]
        sparse = next((stage for stage in in_place if stage.spec.role == "sparse"), None)
        for stage in in_place:
            if sparse and _place(stage) == "checksum" and stage.index > sparse.index:
                reason = f"{stage.name} stands behind {sparse.name}: the digest is taken of what was read"
                self._fault(stage, reason, right)

    def _check_counts(self) -> None:
        for role, title in _ALONE.items():
            found = self._of(role)
            names = self._names_of(role)
            if not found and self._written:
                hint = f"add one of {', '.join(names)}" if names else ""
                self._fault(None, f"the chain has no {title}", hint)
            self._refuse_others(found, title)
        self._refuse_others(self._of("compress"), "compressor")

    def _refuse_others(self, found: Sequence[StageConfig], title: str) -> None:
        for stage in found[1:]:
            hint = f"a chain has one; the first is {found[0].name} in line {found[0].place[0]}"
            self._fault(stage, f"{stage.name} is a second {title}", hint)

    def _check_items(self) -> None:
        """Every stage takes what the one before it gives; verifiers all look at what the writer gives."""
        if any(len(self._of(role)) != 1 for role in _ALONE):
            return
        carriers = [stage for stage in self._stages if stage.spec.role != "verify"]
        pairs = [*pairwise(carriers), *((carriers[-1], stage) for stage in self._of("verify"))]
        for giver, taker in pairs:
            gives, takes = giver.spec.gives.item, taker.spec.takes.item
            if gives != takes:
                hint = f"remove one of the two, or put another {taker.spec.role} or {giver.spec.role} stage there"
                self._fault(taker, f"{taker.name} takes {takes}, and {giver.name} before it gives {gives}", hint)

    def _check_orders(self) -> None:
        """Find the orders in which pieces can travel all the way, the encoder's favourite first."""
        encoders, writers = self._of("encode"), self._of("write")
        if len(encoders) != 1 or len(writers) != 1:
            return
        giver = encoders[0]
        orders = giver.spec.orders_of(giver.options)
        for taker in (*self._of("compress", "image"), writers[0]):
            accepted = _accepted(taker)
            possible = tuple(order for order in orders if order in accepted)
            if not possible:
                reason = f"{taker.name} takes pieces {_or(accepted)}, and {giver.name} gives them {_or(orders)}"
                hints = [stage.spec.orders_hint(stage.options) for stage in (giver, taker)
                         if stage.spec.orders_hint and stage.options is not None]  # fmt: skip
                self._fault(taker, reason, "; ".join(filter(None, [*hints, self._ways_out(giver, taker)])))
                return
            orders = possible
            if taker.spec.role == "compress":
                orders = tuple(order for order in orders if order in taker.spec.gives.orders)
                giver = taker
        self._orders = orders

    def _ways_out(self, giver: StageConfig, taker: StageConfig) -> str:
        """Which option would do, and which stages of the catalog could take the place of one of the two."""
        gives, takes = set(giver.spec.orders_of(giver.options)), set(_accepted(taker))
        others = [spec for spec in self._catalog if spec.name not in (giver.name, taker.name)]
        givers = [spec.name for spec in others if spec.role == giver.spec.role and takes & set(spec.gives.orders)]
        takers = [spec.name for spec in others if spec.role == taker.spec.role and gives & set(accepted_by(spec))]
        ways = [(taker.name, givers), (giver.name, takers)]
        found = None
        if giver.options is not None and giver.spec.orders_hint is None:
            found = option_for(giver.spec, giver.options, takes)
        option = [f'set {found[0]} = "{found[1]}" in {giver.name}'] if found else []
        return "; ".join([*option, *(f"{kept} works with {', '.join(names)}" for kept, names in ways if names)])

    def _check_facts(self) -> None:
        provided = {DISK_SIZE.name}  # the engine knows it as soon as the source is open
        for stage in self._stages:
            for fact in stage.spec.needs:
                if fact.name not in provided:
                    givers = [spec.name for spec in self._catalog if fact in spec.provides]
                    hint = fact.hint or (f"add {' or '.join(givers)} before it" if givers else "")
                    self._fault(stage, f"{stage.name} needs the {fact.name}, and no stage before it provides it", hint)
            provided.update(fact.name for fact in stage.spec.provides)

    def _names_of(self, role: str) -> list[str]:
        return [name for name in self._catalog.names if name.partition(".")[0] == role]

    def _fault(self, stage: StageConfig | None, reason: str, hint: str) -> None:
        if stage is None or not stage.place[0]:
            self.faults.append(Fault(reason=reason, hint=hint, file=str(self._file)))
            return
        line, column = stage.place
        self.faults.append(
            Fault(
                reason=reason,
                hint=hint,
                file=str(self._file),
                line=line,
                column=column,
                width=len(stage.name) + 2,  # in its quotes
                text=locate.shown(self._lines[line - 1]),
            )
        )


def _place(stage: StageConfig) -> str:
    """Where in the chain a stage belongs: its role, or "image" for a check of the image."""
    return "image" if stage.spec.checks_image else stage.spec.role


def _accepted(stage: StageConfig) -> tuple[Order, ...]:
    """The orders that a stage takes with its options."""
    decides = stage.spec.checks_image or stage.spec.role == "write"
    if decides and stage.spec.orders and stage.options is not None:
        return stage.spec.orders(stage.options)
    return accepted_by(stage.spec)


def accepted_by(spec: StageSpec) -> tuple[Order, ...]:
    """The orders that a stage takes: what its port says, else what its sink can live with."""
    if spec.takes.orders or spec.sink is None:
        return spec.takes.orders
    return spec.sink.accepts


def option_for(spec: StageSpec, options: Any, accepted: Iterable[Order]) -> tuple[str, str] | None:
    """The one option (name, value) to change so that an encoder gives pieces in an accepted order; None: none will."""
    if spec.orders is None:
        return None
    for item in option_fields(spec.options):
        for choice in item.choices:
            if set(accepted) & set(spec.orders(replace(options, **{item.name: choice}))):
                return item.name, choice
    return None


def _or(orders: Iterable[Order]) -> str:
    return " or ".join(f'"{order.value}"' for order in orders) or "in no order"


def _longest_ascending(ranks: Sequence[int]) -> list[int]:
    """Indices of a longest stretch that is in order already; the fewest stages are then called misplaced."""
    best: list[list[int]] = []
    for index, rank in enumerate(ranks):
        before = [one for one in best if ranks[one[-1]] <= rank]
        best.append([*max(before, key=len, default=[]), index])
    return max(best, key=len, default=[])
