"""What every compressor here does: one frame for each window of the image, one behind the other.

A frame depends on its window alone, so windows are compressed on all cores and any of them can be unpacked alone. A
window of zeros is always the same frame, which is made once.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.errors import StageError
from pipeline.flow.buffers import Charge, Slice, charged_slice, loose_slice
from pipeline.flow.items import ImageWindow, Piece
from pipeline.flow.stage import Layout, StageContext
from stages.compress.index import FRAME_INDEX, FrameIndex, from_little_endian, little_endian
from stages.encode.checkpoints import identify, pack_state, unpack_state
from stages.encode.codecs import Codec

# The copies of the frame of zeros that one piece holds at most, and so the bytes of them in memory: 16 KiB each for
# lz4 and windows of 4 MiB, less for the others.
_ZERO_FRAMES = 64


@dataclass(frozen=True, slots=True)
class Framed:
    """A window that was compressed, or `zeros` frames of zeros. Owns `data`."""

    offset: int
    length: int
    guest_bytes: int
    data: Slice | bytes | None = None
    zeros: int = 0


class FrameCompressor:
    """Append a frame for each window.

    Args:
        name: of the codec in a frame index.
        codec: makes one frame of one window.
        table: what follows the last frame, in pieces, of the index of all of them.
    """

    def __init__(
        self,
        name: str,
        codec: Codec,
        context: StageContext,
        *,
        table: Callable[[FrameIndex], Iterator[bytes]] = lambda index: iter(()),
    ) -> None:
        self._name = name
        self._codec = codec
        self._window = context.window
        self._facts = context.facts
        self._table = table
        self._taken = 0  # image offset behind the last window placed, before compressing
        self._position = 0
        self._lengths = array("I")
        self._zero_frame = codec.compress(bytes(context.window))
        self._zero_frames = memoryview(self._zero_frame * _ZERO_FRAMES)
        self._identity = ""
        # As many as windows are compressed at once: the planning sets memory aside for them.
        self._scratches: list[bytearray] = []

    @property
    def position(self) -> int:
        """Offset behind the last byte placed."""
        return self._position

    @property
    def identity(self) -> str:
        """A digest of all that shapes the stream besides the image."""
        if not self._identity:
            self._identity = identify(compressor=f"{self._name} 1", codec=self._codec.identity(), window=self._window)
        return self._identity

    def prepare(self, window: ImageWindow, charge: Charge | None) -> Framed:
        """Compress a window. Threads: any; takes over its slices and `charge`, which holds the window and its frame."""
        made = (window.offset, window.length, window.guest_bytes)
        if window.is_zero:
            if charge is not None:
                charge.release()
            if window.length % self._window:  # the last one of an image
                return Framed(*made, self._codec.compress(bytes(window.length)))
            return Framed(*made, zeros=window.length // self._window)
        try:
            try:
                scratch = self._scratches.pop()
            except IndexError:
                scratch = bytearray(self._window)
            frame = self._codec.compress(window.joined(scratch))
            self._scratches.append(scratch)
        except BaseException:
            if charge is not None:
                charge.release()
            raise
        finally:
            window.release()
        return Framed(*made, charged_slice(frame, charge) if charge is not None else loose_slice(frame))

    def place(self, prepared: Framed) -> list[Piece]:
        """The frame, or frames of zeros, at the next offset. The caller owns the pieces.

        Raises:
            StageError: the windows don't come in order, or one follows a short one.
        """
        if prepared.offset != self._taken or self._taken % self._window:
            if isinstance(prepared.data, Slice):
                prepared.data.release()
            raise StageError(
                "the windows of the image do not come in order",
                operation="place",
                expected=self._taken,
                offset=prepared.offset,
            )
        self._taken += prepared.length
        if prepared.data is not None:
            length = len(prepared.data)
            self._lengths.append(length)
            return [self._put(prepared.data, length, prepared.guest_bytes)]
        placed = []
        done = counted = 0
        while done < prepared.zeros:
            count = min(_ZERO_FRAMES, prepared.zeros - done)
            done += count
            share = prepared.guest_bytes * done // prepared.zeros
            length = count * len(self._zero_frame)
            placed.append(self._put(loose_slice(self._zero_frames[:length]), length, share - counted))
            counted = share
        self._lengths.extend(array("I", (len(self._zero_frame),)) * prepared.zeros)
        return placed

    def finish(self) -> Iterator[Piece]:
        """What the codec's stream ends with. Leaves the index of all frames as a fact."""
        index = FrameIndex(self._name, self._window, self._taken, self._lengths)
        for part in self._table(index):
            yield self._put(part, len(part), 0)
        self._facts.put(FRAME_INDEX, index)

    def checkpoint(self) -> bytes:
        """Both positions and the length of every frame so far. Compressed."""
        return pack_state(
            self.identity, {"taken": self._taken, "position": self._position}, [little_endian(self._lengths)]
        )

    def restore(self, state: bytes) -> None:
        """Go back to a checkpoint.

        Raises:
            PlanError: it is damaged, or was made with other options or by a codec that gives other bytes.
        """
        note, (lengths,) = unpack_state(self.identity, state)
        self._taken, self._position = note["taken"], note["position"]
        self._lengths = from_little_endian(lengths)

    def _put(self, data: Slice | bytes, length: int, guest_bytes: int) -> Piece:
        piece = Piece(self._position, length, data, guest_bytes)
        self._position += length
        return piece


def frame_max(length: int) -> int:
    """No codec here makes a longer frame of `length` bytes.

    zstd's own bound; the others add less: lz4 31 bytes, deflate stored blocks of 5 bytes for each 32 KiB.
    """
    return length + (length >> 8) + 1024


def wrap_layout(
    layout: Layout, window: int, *, codec: str, table_max: Callable[[int], int] = lambda frames: 0
) -> Layout:
    """The layout of a compressed image.

    Args:
        table_max: bytes behind the frames, of their number.
    """
    frames = -(-layout.image_bytes_max // window)
    return Layout(
        format=f"{layout.format}+{codec}",
        virtual_size=layout.virtual_size,
        head_length=0,
        image_bytes_max=frames * frame_max(window) + table_max(frames),
        made_max=window + frame_max(window),
        grain=layout.grain,
        notes=layout.notes,
    )
