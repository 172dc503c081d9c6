"""What every SPEC of the catalog declares, whatever its role."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

import stages
from pipeline.config.options import OptionField, option_fields
from pipeline.config.parse import load_config
from pipeline.config.wiring import ROLES
from pipeline.errors import ConfigError
from pipeline.flow.orders import Order, PartLimits, Traits
from pipeline.flow.stage import BLOCKS, DISK_SIZE, NOTHING, STORED_IMAGE, StageSpec
from stages.catalog import CATALOG

SPECS = list(CATALOG)
WRITERS = [spec for spec in SPECS if spec.role == "write"]
ENCODERS = [spec for spec in SPECS if spec.role == "encode"]
# What a stage of each role takes and gives.
PORTS = {
    "read": (NOTHING.item, BLOCKS.item),
    "sparse": (BLOCKS.item, BLOCKS.item),
    "encode": (BLOCKS.item, "pieces"),
    "compress": ("pieces", "pieces"),
    "write": ("pieces", STORED_IMAGE.item),
    "verify": (STORED_IMAGE.item, "a verdict"),
}

each = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
each_writer = pytest.mark.parametrize("spec", WRITERS, ids=lambda spec: spec.name)
each_encoder = pytest.mark.parametrize("spec", ENCODERS, ids=lambda spec: spec.name)


@each
def test_name_is_the_path_of_the_module_that_declares_it(spec: StageSpec) -> None:
    module = importlib.import_module(f"stages.{spec.name}")
    assert module.SPEC is spec
    assert spec.role in ROLES


def test_every_spec_in_a_stage_folder_is_in_the_catalog() -> None:
    (root,) = stages.__path__
    declaring = {
        f"{path.parent.name}.{path.stem}"
        for role in ROLES
        for path in Path(root, role).glob("*.py")
        if any(line.startswith("SPEC") for line in path.read_text().splitlines())
    }
    assert declaring == set(CATALOG.names)
    assert len(SPECS) == len(CATALOG.names)


def test_stages_stand_in_the_order_data_passes() -> None:
    def rank(spec: StageSpec) -> int:
        # A checksum of the image stands behind the encoder, where its pieces are.
        is_late = spec.role == "checksum" and spec.takes.item == "pieces"
        return ROLES.index("compress" if is_late else spec.role)

    assert [spec.name for spec in SPECS] == [spec.name for spec in sorted(SPECS, key=rank)]


@each
def test_summary_is_one_sentence(spec: StageSpec) -> None:
    """A second one may say what it needs beside the base packages, or why it can't be resumed."""
    first, _, more = spec.summary.partition(". ")
    assert first[0].isupper()
    assert spec.summary.endswith(".")
    assert not more or more.startswith(("Needs ", "Not resumable"))
    assert 20 < len(spec.summary) <= 140


@each
def test_options_are_a_frozen_dataclass_and_each_is_explained(spec: StageSpec) -> None:
    assert dataclasses.is_dataclass(spec.options)
    parameters = spec.options.__dataclass_params__  # type: ignore[attr-defined]  # every dataclass has them
    assert parameters.frozen
    assert all(field.kw_only for field in dataclasses.fields(spec.options))
    assert "__slots__" in vars(spec.options)
    for item in option_fields(spec.options):
        assert item.doc.endswith("."), item.name
        assert item.name == item.name.lower()


@each
def test_build_takes_options_and_context(spec: StageSpec) -> None:
    required = [
        parameter
        for parameter in inspect.signature(spec.build).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
    ]
    assert len(required) == 2


@each
def test_ports_are_those_of_the_role(spec: StageSpec) -> None:
    if spec.role == "checksum":  # of the disk or of the image; it passes on what it gets
        assert spec.takes.item == spec.gives.item
        assert spec.takes.item in (BLOCKS.item, "pieces")
        return
    takes, gives = PORTS[spec.role]
    assert spec.takes.item == takes
    if spec.role == "write" and spec.gives.item == NOTHING.item:  # what cannot be looked at again
        assert spec.open_reader is None
        return
    assert spec.gives.item == gives


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.role == "read"], ids=lambda spec: spec.name)
def test_source_has_either_load_or_fetch(spec: StageSpec) -> None:
    """What the engine calls to fill a buffer; with both it would be unclear which."""
    assert hasattr(spec.build, "load") != hasattr(spec.build, "fetch")
    assert spec.provides[0] == DISK_SIZE


@each
def test_every_need_is_provided_by_somebody_or_by_the_engine(spec: StageSpec) -> None:
    provided = {fact for other in SPECS for fact in other.provides}
    assert set(spec.needs) <= provided


@each_encoder
def test_encoder_says_what_it_will_make_and_in_which_orders(spec: StageSpec) -> None:
    assert spec.layout is not None
    assert spec.gives.orders
    assert all(isinstance(order, Order) for order in spec.gives.orders)
    assert set(spec.orders_of(None)) <= set(spec.gives.orders)
    if not spec.checkpointed:
        assert "resum" in spec.summary, "it says that it can't be resumed, and why"


@each_writer
def test_writer_says_what_its_target_can_do(spec: StageSpec) -> None:
    assert isinstance(spec.sink, Traits) or spec.takes.orders
    if spec.sink is not None:
        accepted = spec.takes.orders or spec.sink.accepts
        assert set(accepted) <= set(spec.sink.accepts), "it takes an order that its sink can't live with"
        if spec.sink.parts is not None:
            assert isinstance(spec.sink.parts, PartLimits)
            assert spec.sink.parts.part_min <= spec.sink.parts.part_max


@each_writer
def test_writer_whose_target_can_be_rewritten_lets_a_disk_in_use_be_caught_up_with(spec: StageSpec) -> None:
    assert hasattr(spec.build, "can_rewrite") == (spec.sink is not None and spec.sink.rewrite == "any")


@each_writer
def test_writer_that_stores_under_urls_can_read_them_too(spec: StageSpec) -> None:
    assert bool(spec.schemes) == (spec.open_reader is not None)
    if spec.open_reader is not None:
        assert "endpoint" in inspect.signature(spec.open_reader).parameters


def test_no_url_scheme_has_two_stages() -> None:
    schemes = [scheme for spec in SPECS for scheme in spec.schemes]
    assert len(schemes) == len(set(schemes))


@each_encoder
def test_some_writer_takes_what_the_encoder_gives(spec: StageSpec) -> None:
    given = set(spec.gives.orders)
    assert [one.name for one in WRITERS if given & set(one.takes.orders or (one.sink.accepts if one.sink else ()))]


@pytest.mark.parametrize("spec", [spec for spec in CATALOG if spec.open_reader is not None], ids=lambda spec: spec.name)
def test_what_opens_a_stored_object_takes_an_endpoint_and_an_authority(spec: StageSpec) -> None:
    assert spec.open_reader is not None
    assert {"endpoint", "ca_file"} <= set(inspect.signature(spec.open_reader).parameters)


COUNTS = ("attempts", "parts_in_flight", "connections", "parallel", "cpus")
AT_LEAST = [
    pytest.param(spec, item, id=f"{spec.name}.{item.name}")
    for spec in SPECS
    for item in option_fields(spec.options)
    if item.name in (*COUNTS, "rate_limit")
]


@pytest.mark.parametrize("spec, item", AT_LEAST)
def test_a_count_or_rate_that_stops_everything_is_a_fault_of_the_file(
    spec: StageSpec, item: OptionField, tmp_path: Path
) -> None:
    file = tmp_path / "export.toml"
    for value in ("0", "-1") if item.name in COUNTS else ('"0"', "1023"):
        file.write_text(f'[export]\nname = "a"\n[[stage]]\nuse = "{spec.name}"\n{item.name} = {value}\n')
        with pytest.raises(ConfigError) as caught:
            load_config(file, CATALOG)
        assert (5, f"{item.name}: at least {item.least} is wanted") in [
            (fault.line, fault.reason.partition(",")[0]) for fault in caught.value.faults
        ]


@pytest.mark.parametrize(
    "options, reason",
    [
        (
            'use = "write.http"\nurl = "http://h/x"\nuser = "me"\npassword = { env = "NOPE" }',
            "password: the environment variable NOPE is not set",
        ),
        (
            'use = "write.gcs"\nurl = "gs://b/x"\nhmac_key = "me"\nhmac_secret = { env = "NOPE" }',
            "hmac_secret: the environment variable NOPE is not set",
        ),
        ('use = "read.image"\npath = 7', "path: a path is wanted, not the number 7"),
    ],
)
def test_an_option_that_is_given_and_cannot_be_read_is_not_called_missing(
    options: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOPE", raising=False)
    file = tmp_path / "export.toml"
    file.write_text(f'[export]\nname = "a"\n[[stage]]\n{options}\n')
    with pytest.raises(ConfigError) as caught:
        load_config(file, CATALOG)
    assert [fault.reason for fault in caught.value.faults] == [reason]
