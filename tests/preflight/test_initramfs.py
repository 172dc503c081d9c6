"""Names in an initramfs, whatever packed it: real cpio, real compressors, with and without archives before."""

from __future__ import annotations

import functools
import gzip
import lzma
from collections.abc import Callable

import pytest
import zstandard

from pipeline.units import KiB, MiB
from stages.preflight import initramfs
from stages.preflight.initramfs import Contents, UnreadableInitramfs, read_contents
from tests.preflight import systems
from tests.preflight.disks import findings_of, subject_of, target_of
from tests.preflight.initrds import CODECS, cpio, cpio_by_tool, packed, packed_by_tool
from tests.preflight.trees import MadeView

VERSION = "6.1.0-13-amd64"


def names_read(data: bytes, *, step: int = 64 * 1024) -> Contents:
    """Read an image from memory."""
    return read_contents(lambda offset, length: data[offset : offset + length], len(data), step=step)


MODULES = ("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk",
           "ext4", "jbd2")  # fmt: skip


def module_files(suffix: str, *, with_virtio: bool = True) -> list[str]:
    """What the main archive has."""
    # Files are called with - or _ as their makers liked; to the kernel both are one module.
    modules = ("virtio-blk", *MODULES[:5], *MODULES[6:]) if with_virtio else ("ahci", "usb-storage", *MODULES[6:])
    return ["init", "conf/modules", *(f"usr/lib/modules/{VERSION}/kernel/drivers/{one}.ko{suffix}" for one in modules)]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, bool], bytes]:
    """Main archives by real cpio and the real compressor: (codec, suffix of modules, whether virtio is in it)."""

    @functools.cache
    def made(codec: str, suffix: str, with_virtio: bool) -> bytes:
        plain = cpio_by_tool(tmp_path_factory.mktemp("initrd"), module_files(suffix, with_virtio=with_virtio))
        return packed_by_tool(plain, codec)

    return made


def before_it(count: int) -> bytes:
    """Plain archives with microcode, as dracut and initramfs-tools put them first."""
    return b"".join(cpio([f"kernel/x86/microcode/Vendor{number}.bin", "early_cpio"]) for number in range(count))


@pytest.mark.parametrize("state", ["present", "absent", "builtin", "blacklisted"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("codec", CODECS)
async def test_virtio_is_judged_in_every_kind_of_initramfs(
    archives: Callable[[str, str, bool], bytes], codec: str, before: int, suffix: str, state: str
) -> None:
    """Present passes, absent blocks, built in needs none, blacklisted blocks: whatever packed it, whatever is first."""
    data = before_it(before) + archives(codec, suffix, state in ("present", "blacklisted"))
    found = names_read(data)
    assert found.is_complete
    assert found.members == ["cpio"] * before + (["cpio"] if codec == "none" else [codec])
    assert not found.has_module("6.6.0", "virtio_blk"), "modules of another kernel don't count"
    builtin = MODULES if state == "builtin" else ()
    files = systems.debian_files()
    files = {path: content for path, content in files.items() if not path.startswith("/lib/modules/")}
    files |= systems.kernel_files(VERSION, suffix=suffix, builtin=builtin)
    files[f"/boot/initrd.img-{VERSION}"] = data
    if state == "blacklisted":
        files["/etc/modprobe.d/local.conf"] = "blacklist virtio_blk\n"
    subject = await subject_of(MadeView(files))
    findings = await findings_of(subject, target_of(subject), "drv.virtio.initramfs", "drv.virtio.blacklist")
    statuses = {one.id: (one.status, one.severity) for one in findings}
    block, ok = ("fail", "block"), ("pass", "info")
    assert statuses["drv.virtio.initramfs"] == (block if state == "absent" else ok)
    assert statuses["drv.virtio.blacklist"] == (block if state == "blacklisted" else ok)


@pytest.mark.parametrize("codec", CODECS)
def test_an_initramfs_is_the_same_however_its_bytes_come(codec: str) -> None:
    data = cpio(["early"]) + packed(cpio(module_files(".zst")), codec if codec not in ("lz4", "lzma") else "gzip")
    whole = names_read(data)
    assert names_read(data, step=7).names == whole.names
    assert names_read(data, step=512).names == whole.names


def test_modules_in_a_plain_archive_before_the_packed_one_count() -> None:
    """Ubuntu 23.10 and later put packed modules there, as packing them again gains nothing."""
    plain = cpio(["usr/lib/modules/6.8.0-31-generic/kernel/drivers/virtio_blk.ko.zst"])
    found = names_read(cpio(["kernel/x86/microcode/GenuineIntel.bin"]) + plain + packed(cpio(["init"]), "zstd"))
    assert found.has_module("6.8.0-31-generic", "virtio_blk")
    assert {"init", "kernel/x86/microcode/GenuineIntel.bin"} <= found.names


def test_several_packed_archives_follow_each_other() -> None:
    data = packed(cpio(["a"]), "gzip") + bytes(100) + packed(cpio(["b"]), "xz") + packed(cpio(["c"]), "zstd")
    assert {"a", "b", "c"} <= names_read(data).names


def test_reading_stops_when_everything_was_seen() -> None:
    data = cpio([f"lib/modules/{VERSION}/virtio_blk.ko"]) + packed(cpio(["rest"]) + bytes(50 * MiB), "gzip")
    asked: list[int] = []

    def fetch(offset: int, length: int) -> bytes:
        asked.append(offset + length)
        return data[offset : offset + length]

    found = read_contents(fetch, len(data), enough=lambda so_far: so_far.has_module(VERSION, "virtio_blk"), step=4096)
    assert not found.is_complete
    assert max(asked) <= 8192
    assert "rest" not in found.names


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"\x89LZO\0\r\n\x1a\n" + bytes(50), "lzo"),
        (b"what is this?", "not known here"),
        (gzip.compress(cpio(["a"]))[:-20], "middle of a compressed"),
        (gzip.compress(cpio(["a"]))[:20] + b"\x07" * 40, "damaged"),
        (lzma.compress(cpio(["a"]))[:40], "middle of a compressed"),
        (zstandard.compress(cpio(["a" * 2000]))[:-3], "middle of a compressed"),
        (b"\x02\x21\x4c\x18\x10\0\0\0" + b"\xff" * 16, "damaged"),
        (cpio(["a"])[:60], "middle of a file"),
        (b"070701" + b"zz" * 60, "damaged"),
        (gzip.compress(b"070701" + b"0" * 88 + b"0000ffff" + b"0" * 8), "longer than a path"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",  # packed bytes hold the time: two workers name them otherwise
)
def test_what_cannot_be_read_is_told_and_never_taken_for_empty(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableInitramfs, match=reason):
        names_read(data)


@pytest.mark.parametrize("limit", [256 * MiB, pytest.param(initramfs.UNPACKED_MAX, marks=pytest.mark.slow)])
def test_a_bomb_is_refused_in_bounded_memory(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 GiB of zeros behind one header, packed into 128 KiB. Source: RFC 8878, "Blocks": four bytes may be 128 KiB."""
    fields = (1, 0o100644, 0, 0, 1, 0, 0xFFFFFFF0, 0, 0, 0, 0, 2, 0)
    head = b"070701" + b"".join(b"%08x" % one for one in fields) + b"a\0"
    raw = (len(head) << 3).to_bytes(3, "little") + head
    zeros = (1 << 1 | 128 * KiB << 3).to_bytes(3, "little") + b"\0"
    data = b"\x28\xb5\x2f\xfd\x00\x38" + raw + zeros * 32768
    monkeypatch.setattr(initramfs, "UNPACKED_MAX", limit)
    asked: list[int] = []

    def fetch(offset: int, length: int) -> bytes:
        asked.append(offset + length)
        return data[offset : offset + length]

    with pytest.raises(UnreadableInitramfs, match="more than any real one"):
        read_contents(fetch, len(data), step=KiB)
    assert max(asked) * (128 * KiB // 4) < limit + 64 * MiB, "it stops at its limit"
