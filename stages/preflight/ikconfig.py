"""The configuration that a kernel carries inside of its image (CONFIG_IKCONFIG), found without running the kernel.

Source: Linux scripts/extract-ikconfig and kernel/configs.c for the marks around it; Documentation/arch/x86/boot.rst,
"payload_offset" and "payload_length"; drivers/firmware/efi/libstub/zboot-header.S.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.units import KiB, MiB
from stages.preflight.initramfs import Fetch, UnreadableInitramfs, codec_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

# The configuration is itself gzip'd; the mark alone may stand in a string table.
_BEGIN, _END = b"IKCFG_ST\x1f\x8b\x08", b"IKCFG_ED"
_MARK = len(b"IKCFG_ST")
# Distributions' kernels have 5 to 20 MiB packed, 30 to 100 MiB unpacked; a configuration 300 KiB.
_IMAGE_MAX = 128 * MiB
_UNPACKED_MAX = 512 * MiB
_PACKED_CONFIG_MAX = MiB
_CONFIG_MAX = 4 * MiB
_STEP = MiB


def find_config(fetch: Fetch, size: int) -> str:
    """The configuration inside a kernel image; empty where it has none or where its packing is not known here.

    Blocks: for a worker thread. Unpacks as far as the configuration and keeps no more than that of it.

    Args:
        fetch: gives bytes of the image: (offset, length), fewer at its end.
        size: of the image in bytes.
    """
    packed = b""
    held = b""
    try:
        for data in _unpacked(fetch, min(size, _IMAGE_MAX)):
            held += data
            if not packed:
                at = held.find(_BEGIN)
                if at < 0:
                    held = held[-len(_BEGIN) :]
                    continue
                packed = b"found"
                held = held[at + _MARK :]
            end = held.find(_END)
            if end >= 0:
                return zlib.decompressobj(31).decompress(held[:end], _CONFIG_MAX).decode("ascii", "replace")
            if len(held) > _PACKED_CONFIG_MAX:
                return ""
    except (UnreadableInitramfs, zlib.error):
        return ""  # a damaged kernel does not start here either; other rules look at what boots
    return ""


def _unpacked(fetch: Fetch, size: int) -> Iterator[bytes]:
    """The kernel proper, piece by piece, whatever is around it."""
    head = fetch(0, KiB)
    offset, length = _payload(head, size)
    magic = fetch(offset, 6)
    try:
        codec = codec_of(magic)[1]()
    except UnreadableInitramfs:
        if offset and magic[:4] != b"\x7fELF":
            return  # packed with something that is not read here
        codec = None
    made = 0
    for start in range(offset, offset + length, _STEP):
        data = fetch(start, min(_STEP, offset + length - start))
        if codec is None:
            yield data
            continue
        for at in range(0, len(data), codec.step):
            for out in codec.unpack(data[at : at + codec.step]):
                made += len(out)
                if made > _UNPACKED_MAX:
                    return
                yield out
            if codec.unused is not None:
                return


def _payload(head: bytes, size: int) -> tuple[int, int]:
    """Where the packed kernel lies in its image: offset and length in bytes. A plain one is the image itself."""
    if len(head) < 0x250:
        return 0, size
    if head[0x202:0x206] == b"HdrS" and struct.unpack_from("<H", head, 0x206)[0] >= 0x208:
        sectors = head[0x1F1] or 4
        offset, length = struct.unpack_from("<II", head, 0x248)
        offset += (sectors + 1) * 512
    elif head[:2] == b"MZ" and head[4:8] == b"zimg":
        offset, length = struct.unpack_from("<II", head, 8)
    else:
        return 0, size
    return (offset, min(length, size - offset)) if offset < size else (0, 0)


async def read_config(read_at: Callable[[int, int], Coroutine[Any, Any, bytes]], size: int) -> str:
    """`find_config` of an image that is read asynchronously; unpacks in a worker thread.

    Raises:
        OSError, FormatError, StoreError: it can't be read.
    Cancellation: takes effect at the next read.
    """
    import anyio.from_thread
    import anyio.to_thread

    def fetch(offset: int, length: int) -> bytes:
        return anyio.from_thread.run(read_at, offset, length)

    return await anyio.to_thread.run_sync(find_config, fetch, size)
