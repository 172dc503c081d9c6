"""encode.ova, proven by tarfile, hashlib, an XML parser and qemu-img."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.parse import load_config
from pipeline.config.planning import plan_run
from pipeline.config.wiring import wire
from pipeline.errors import PlanError, StageError
from pipeline.events import Event, EventStream, RunPlanned
from pipeline.flow.orders import HEAD_LAST_SINK, Order
from pipeline.flow.stage import Catalog, SinkPlan, SinkRequest, StageSpec
from pipeline.units import GiB, KiB, MiB, Size, TiB
from stages.catalog import CATALOG
from stages.encode.ova import FRONT, SPEC, Options
from stages.write import null
from tests.chains import export as run_chain
from tests.chains import write_toml
from tests.encode.judges import check, compare, run_to_file, unpack_7zz, write_raw
from tests.encode.lettered import Export, LetterDisk, disk, export, layout_of, make_encoder
from tests.encode.test_qcow2 import disks
from tests.encode.test_vhd import ALL_KINDS, image_bytes

OVF = "{http://schemas.dmtf.org/ovf/envelope/1}"
RASD = "{http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData}"


def members(image: bytes) -> dict[str, bytes]:
    """The archive's members, in order."""
    with tarfile.open(fileobj=io.BytesIO(image), mode="r:") as archive:
        found = {}
        for one in archive:
            content = archive.extractfile(one)
            assert content is not None
            found[one.name] = content.read()
        return found


def prove_archive(image: bytes, source: LetterDisk, folder: Path) -> ElementTree.Element:
    """Names, digests and disk are right; gives the description."""
    found = members(image)
    assert list(found) == ["disk.ovf", "disk-disk1.vmdk", "disk.mf"]
    told = dict(line.split("= ") for line in found["disk.mf"].decode().splitlines())
    for name in ("disk.ovf", "disk-disk1.vmdk"):
        assert told[f"SHA256({name})"] == hashlib.sha256(found[name]).hexdigest()
    vmdk = folder / "disk.vmdk"
    vmdk.write_bytes(found["disk-disk1.vmdk"])
    check(vmdk, "vmdk")
    root = ElementTree.fromstring(found["disk.ovf"])
    (entry,) = root.iter(f"{OVF}Disk")
    assert entry.get(f"{OVF}capacityAllocationUnits") == "byte"
    compare(write_raw(source, folder / "disk.raw", int(entry.get(f"{OVF}capacity", "0"))), vmdk, "vmdk")
    (file,) = root.iter(f"{OVF}File")
    assert file.get(f"{OVF}href") == "disk-disk1.vmdk"
    assert file.get(f"{OVF}size") == str(len(found["disk-disk1.vmdk"]))
    return root


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(source=disks, head_minimum=st.sampled_from((0, 20_000, 5 * MiB)))
def test_archive_of_any_disk_is_right(
    source: LetterDisk, head_minimum: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With a head of 5 MiB most of these images are shorter than their head, and are filled up."""
    made = export(SPEC, Options(), source, head_minimum=head_minimum)
    assert made.length <= made.layout.image_bytes_max
    assert made.length >= made.layout.head_length
    assert made.guest_bytes == source.size
    prove_archive(image_bytes(made), source, tmp_path_factory.mktemp("ova"))


def test_first_bytes_of_the_disk_wait_with_a_longer_head() -> None:
    source = disk("NOPQR" * 20, 100 * KiB)
    short = export(SPEC, Options(), source)
    long = export(SPEC, Options(), source, head_minimum=5 * MiB)
    assert image_bytes(long) == image_bytes(short)
    assert (short.layout.head_length, long.layout.head_length) == (FRONT, 5 * MiB)
    assert min(offset for offset, *_ in long.placed[:3]) == 5 * MiB
    assert (long.leaked_buffers, long.leaked_bytes) == (0, 0)


async def test_chain_into_a_file_gives_the_appliance(tmp_path: Path) -> None:
    image = await run_to_file(tmp_path, 'encode.ova; cpus = 4; ram = "8 GiB"; boot_mode = "uefi"', ALL_KINDS)
    found = members(image.read_bytes())
    assert list(found) == ["test.ovf", "test-disk1.vmdk", "test.mf"]
    root = ElementTree.fromstring(found["test.ovf"])
    amounts = {
        item.findtext(f"{RASD}ResourceType"): item.findtext(f"{RASD}VirtualQuantity")
        for item in root.iter(f"{OVF}Item")
    }
    assert (amounts["3"], amounts["4"]) == ("4", "8192")
    assert b'vmw:key="firmware" vmw:value="efi"' in found["test.ovf"]
    vmdk = tmp_path / "disk.vmdk"
    vmdk.write_bytes(found["test-disk1.vmdk"])
    raw = write_raw(ALL_KINDS, tmp_path / "padded", 25 * MiB)
    compare(raw, vmdk, "vmdk")
    unpack_7zz(raw, vmdk, "vmdk")


def test_populated_size_is_what_is_stored(tmp_path: Path) -> None:
    source = disk("A-N" + "-" * 29)
    root = prove_archive(image_bytes(export(SPEC, Options(), source)), source, tmp_path)
    (entry,) = root.iter(f"{OVF}Disk")
    assert entry.get(f"{OVF}populatedSize") == str(2 * 64 * KiB)


def test_archive_beyond_8_gib_is_told_in_a_form_that_readers_know() -> None:
    """Without making one: the header of the disk's member is the third block from the head's end."""
    encoder, _ = make_encoder(SPEC, Options(), 1 * TiB)
    header = encoder._header("disk-disk1.vmdk", 1 * TiB)
    assert tarfile.TarInfo.frombuf(header, "ascii", "strict").size == 1 * TiB


def test_it_says_that_it_cannot_be_resumed() -> None:
    assert not SPEC.checkpointed
    assert "resum" in SPEC.summary
    encoder, layout = make_encoder(SPEC, Options(), 1 * GiB)
    assert any("can't be resumed" in note for note in layout.notes)
    with pytest.raises(StageError, match="can't be saved"):
        encoder.checkpoint()
    with pytest.raises(StageError, match="can't be saved"):
        encoder.restore(b"")


def test_limits_are_those_of_the_disk_inside() -> None:
    assert layout_of(SPEC, Options(), 8 * TiB)[0].image_bytes_max < 2 * TiB + 2 * MiB
    with pytest.raises(PlanError, match="62 TiB"):
        layout_of(SPEC, Options(), 63 * TiB)


@pytest.mark.parametrize("wrong", [{"ram": Size(0)}, {"ram": Size(MiB + 1)}])
def test_impossible_machine_is_refused_when_options_are_made(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Options(**wrong)  # type: ignore[arg-type]  # one of several options


async def test_the_longest_name_fits_the_description(tmp_path: Path) -> None:
    """Each of its bytes is five in XML."""
    source = disk("A")
    source.write(tmp_path / "disk.raw")
    image = tmp_path / "disk.ova"
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.disk; path = "{tmp_path / "disk.raw"}"',
        "checksum.guest",
        "encode.ova",
        f'write.file; path = "{image}"',
        "verify.readback",
        name="&" * 100,
    )
    assert (await run_chain(toml)).state == "identical"
    with tarfile.open(image) as archive:
        member = archive.extractfile(archive.getnames()[0])
        assert member is not None
        assert ElementTree.fromstring(member.read().rstrip(b"\0 \n")).tag.endswith("Envelope")


async def test_run_says_what_there_is_to_note(tmp_path: Path) -> None:
    disk("A", 1000).write(tmp_path / "disk.raw")
    toml = write_toml(
        tmp_path / "export.toml", f'read.disk; path = "{tmp_path / "disk.raw"}"', "encode.ova", "write.null"
    )
    events: list[Event] = []
    await run_chain(toml, events=events)
    (planned,) = (event for event in events if isinstance(event, RunPlanned))
    assert "rounded up" in planned.notes[0]
    config = load_config(toml, CATALOG)
    async with plan_run(config, wire(config), EventStream()) as plan:
        assert "can't be resumed" in dict(plan.summary)["notes"]


class _PartsToMakeAgain(null.NullWriter):
    """A store whose parts are too long to wait in memory."""

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """One boundary is enough."""
        return SinkPlan(boundaries=(request.layout.head_length,))


async def test_store_that_needs_parts_again_is_refused_in_planning(tmp_path: Path) -> None:
    disk("A", 1 * MiB).write(tmp_path / "disk.raw")
    write = StageSpec(
        name="write.null",
        summary="",
        options=null.Options,
        takes=null.SPEC.takes,
        gives=null.SPEC.gives,
        build=_PartsToMakeAgain,
        sink=HEAD_LAST_SINK,
    )
    catalog = Catalog([*(spec for spec in CATALOG if spec.name != "write.null"), write])
    toml = write_toml(
        tmp_path / "export.toml", f'read.disk; path = "{tmp_path / "disk.raw"}"', "encode.ova", "write.null"
    )
    with pytest.raises(PlanError, match="can't make a part again") as refused:
        await run_chain(toml, catalog=catalog)
    assert "encode.vmdk" in refused.value.hint


def test_head_comes_last() -> None:
    assert SPEC.gives.orders == (Order.HEAD_LAST,)


def test_images_of_the_same_export_are_the_same() -> None:
    first, other = (export(SPEC, Options(), ALL_KINDS) for _ in range(2))
    assert isinstance(first, Export)
    assert first.digest() == other.digest()
    fresh = export(SPEC, Options(reproducible=False), ALL_KINDS)
    assert image_bytes(fresh) != image_bytes(first)
