"""The configuration inside a kernel image, whatever packed the kernel: used where no /boot/config-* is there."""

from __future__ import annotations

import gzip
import random
import struct
import subprocess
from pathlib import Path

import pytest

from pipeline.units import MiB
from stages.preflight.ikconfig import find_config
from tests.preflight import systems
from tests.preflight.disks import findings_of, subject_of, target_of, volume
from tests.preflight.initrds import CODECS, packed_by_tool
from tests.preflight.packages import unpacked
from tests.preflight.systems import DEBIAN_KERNEL, config_text, kernel_image
from tests.preflight.trees import Content, MadeView

CONFIG = f"/boot/config-{DEBIAN_KERNEL}"
IMAGE = f"/boot/vmlinuz-{DEBIAN_KERNEL}"


def kernel_proper(config: str, *, before: int = 300_000) -> bytes:
    """What a kernel unpacks to: code, the configuration between its marks, code. The mark stands in a string first."""
    noise = random.Random(7).randbytes(before)
    inside = b"IKCFG_ST" + gzip.compress(config.encode(), mtime=0) + b"IKCFG_ED"
    return b"\x7fELF" + noise + b"looking for IKCFG_ST here\0" + inside + noise[:1000]


def config_of(image: bytes) -> str:
    return find_config(lambda offset, length: image[offset : offset + length], len(image))


@pytest.mark.parametrize("codec", CODECS)
def test_a_configuration_is_found_in_a_kernel_however_it_is_packed(codec: str) -> None:
    payload = packed_by_tool(kernel_proper(config_text()), codec)
    # The kernel's build puts the length of what it unpacks to behind all but gzip.
    image = kernel_image(DEBIAN_KERNEL, payload + struct.pack("<I", 300_000))
    assert config_of(image) == config_text()
    assert config_of(payload) == config_text(), "an image that is nothing but the packed kernel, as on arm64"
    zboot = b"MZ\0\0zimg" + struct.pack("<II", 4096, len(payload)) + bytes(4080) + payload
    assert config_of(zboot) == config_text(), "EFI zboot"


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"\x7fELF",
        kernel_image(DEBIAN_KERNEL),
        kernel_image(DEBIAN_KERNEL, gzip.compress(kernel_proper("CONFIG_A=y\n"))[:-20_000]),
        kernel_image(DEBIAN_KERNEL, gzip.compress(b"IKCFG_ST\x1f\x8b\x08" + b"\xff" * 99 + b"IKCFG_ED")),
        kernel_image(DEBIAN_KERNEL, b"\x89LZO\0\r\n\x1a\n" + kernel_proper("CONFIG_A=y\n")),
        gzip.compress(b"IKCFG_ST\x1f\x8b\x08" + bytes(3 * MiB)),
        b"MZ\0\0zimg" + b"\xff" * 2000,
    ],
    ids=["empty", "short", "no payload", "cut", "damaged", "lzo", "without an end", "points away"],
)
def test_an_image_without_a_configuration_or_with_a_damaged_one_tells_nothing(image: bytes) -> None:
    assert config_of(image) == ""


def without_lists(changes: dict[str, Content]) -> dict[str, Content]:
    """A Debian of which nothing but the kernel image says what its kernel has."""
    files = systems.debian_files()
    gone = ("/lib/modules/", "/boot/config-")
    return {path: content for path, content in files.items() if not path.startswith(gone)} | changes


@pytest.mark.parametrize("value, status", [("y", "pass"), ("n", "fail")])
async def test_the_configuration_in_the_image_decides_and_its_line_is_told(value: str, status: str) -> None:
    config = config_text(dict.fromkeys(("VIRTIO", "VIRTIO_PCI", "VIRTIO_NET", "EXT4_FS"), "y") | {"VIRTIO_BLK": value})
    image = kernel_image(DEBIAN_KERNEL, gzip.compress(kernel_proper(config)))
    subject = await subject_of(MadeView(without_lists({IMAGE: image})))
    (found,) = await findings_of(subject, target_of(subject), "drv.virtio.kernel")
    assert (found.status, found.blocks) == (status, status == "fail")
    assert str(found.evidence[0]) == f"{IMAGE} (IKCONFIG):3"


async def test_a_file_with_the_configuration_comes_before_what_is_in_the_image() -> None:
    image = kernel_image(DEBIAN_KERNEL, gzip.compress(kernel_proper(config_text({"VIRTIO_BLK": "n"}))))
    view = MadeView(without_lists({IMAGE: image, CONFIG: config_text()}))
    subject = await subject_of(view)
    assert str(subject.kernels[0].config_at("CONFIG_VIRTIO_BLK")[0]) == f"{CONFIG}:3"
    assert view.reads[IMAGE] <= 64 * 1024, "the kernel is not unpacked for nothing"


async def test_the_module_configs_tells_it_where_that_was_built() -> None:
    files = systems.debian_files() | systems.kernel_files(DEBIAN_KERNEL, suffix=".xz")
    folder = f"/lib/modules/{DEBIAN_KERNEL}"
    del files[CONFIG]
    files[f"{folder}/modules.dep"] = str(files[f"{folder}/modules.dep"]) + "kernel/kernel/configs.ko.xz:\n"
    files[f"{folder}/kernel/kernel/configs.ko.xz"] = packed_by_tool(kernel_proper(config_text()), "xz")
    subject = await subject_of(MadeView(files))
    assert str(subject.kernels[0].config_at("CONFIG_VIRTIO_BLK")[0]) == "kernel/kernel/configs.ko.xz (IKCONFIG):3"


async def test_a_unified_image_is_looked_into_at_its_kernel() -> None:
    """Arch builds its kernels with IKCONFIG and ships no /boot/config-*."""
    files = systems.arch_files()
    version = systems.ARCH_KERNEL
    kernel = kernel_image(version, packed_by_tool(kernel_proper(config_text({"VIRTIO_BLK": "n"})), "zstd"))
    inside = {".linux": kernel, ".cmdline": b"root=LABEL=x\0", ".uname": version.encode()}
    files["/efi/EFI/Linux/arch-linux.efi"] = systems.unified_image(inside)
    subject = await subject_of(MadeView(files), volumes=[volume(1)])
    assert subject.kernels[0].config["CONFIG_VIRTIO_BLK"] == "n"


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["zstd", "gzip"])
def test_a_shipped_kernel_is_unpacked_to_its_end_and_gives_what_was_put_into_it(codec: str) -> None:
    """Debian builds without IKCONFIG: its real kernel has none, and has one where it is put in and packed again."""
    folder: Path = unpacked() / "boot"
    image = next(folder.glob("vmlinuz-*")).read_bytes()
    config = next(folder.glob("config-*")).read_text()
    assert config_of(image) == ""
    offset, length = struct.unpack_from("<II", image, 0x248)
    offset += (image[0x1F1] + 1) * 512
    tool = {b"\x02\x21": "lz4", b"\xfd7": "xz", b"\x28\xb5": "zstd"}[image[offset : offset + 2]]
    # Behind it, its build puts four bytes with the length of what it unpacks to.
    packed = image[offset : offset + length - 4]
    proper = subprocess.run([tool, "-dcq"], input=packed, capture_output=True, check=True).stdout
    assert proper[:4] == b"\x7fELF"
    half = len(proper) // 2
    made = proper[:half] + b"IKCFG_ST" + gzip.compress(config.encode()) + b"IKCFG_ED" + proper[half:]
    payload = packed_by_tool(made, codec)
    head = bytearray(image[:offset])
    struct.pack_into("<I", head, 0x24C, len(payload))
    assert config_of(bytes(head) + payload) == config
