"""Unpack LZO1X, which btrfs may compress with. Bounded by what the caller expects; copies of copies are byte by byte.

Source: Linux Documentation/staging/lzo.rst, "LZO stream format as understood by Linux's LZO decompressor".
"""

from __future__ import annotations

from pipeline.errors import FormatError


def unpack_lzo(data: bytes, most: int) -> bytes:
    """Unpack a stream of at most `most` bytes. Raises FormatError for what is none."""
    try:
        return _unpack(data, most)
    except IndexError:
        raise FormatError("LZO data is cut off") from None


def _unpack(data: bytes, most: int) -> bytes:
    made = bytearray()
    at = 0
    state = 0  # literals in front of this instruction: none, 1 to 3, or 4 for more

    def long_length(low: int, base: int) -> int:
        """A length whose low bits are zero goes on: zeros for 255 each, then the rest."""
        nonlocal at
        if low:
            return low
        length = base
        while not data[at]:
            length += 255
            at += 1
            if length > most:
                raise FormatError("LZO data unpacks to more than it should")
        length += data[at]
        at += 1
        return length

    def literals(count: int) -> None:
        nonlocal at
        if at + count > len(data) or len(made) + count > most:
            raise FormatError("LZO data is cut off, or unpacks to more than it should")
        made.extend(data[at : at + count])
        at += count

    if data[0] > 17:
        at = 1
        literals(data[0] - 17)
        state = min(data[0] - 17, 4)
    while True:
        code = data[at]
        at += 1
        if code < 16 and state == 0:
            literals(3 + long_length(code, 15))
            state = 4
            continue
        if code >= 64:
            length = 5 + (code >> 5 & 3) if code >= 128 else 3 + (code >> 5 & 1)
            distance = (data[at] << 3) + (code >> 2 & 7) + 1
            state = code & 3
            at += 1
        elif code >= 16:
            length = 2 + (long_length(code & 31, 31) if code >= 32 else long_length(code & 7, 7))
            low = data[at] | data[at + 1] << 8
            at += 2
            state = low & 3
            distance = (low >> 2) + 1
            if code < 32:
                distance += 16383 + ((code >> 3 & 1) << 14)
                if distance == 16384:
                    return bytes(made)
        else:
            length = 2 if state < 4 else 3
            distance = (data[at] << 2) + (code >> 2) + (1 if state < 4 else 2049)
            state = code & 3
            at += 1
        begin = len(made) - distance
        if begin < 0 or len(made) + length > most:
            raise FormatError("LZO data points nowhere, or unpacks to more than it should")
        if distance >= length:
            made += made[begin : begin + length]
        else:
            for index in range(length):
                made.append(made[begin + index])
        if state:
            literals(state)
