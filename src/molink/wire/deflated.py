"""Encoded values without their repetitions.

A step names each of its requests several times, by ids of 30 bytes and more: deflated, it is less
than half as large. What is deflated begins with the one byte with which no MessagePack does.
"""

import zlib
from typing import Final

from molink.core.errors import WireError

MARK: Final = b"\xc1"
MIN_BYTES: Final = 256  # of what is worth the 20 µs
MAX_GROWTH: Final = 32
"""Times the size of what came: memory stays within a constant times it."""
MAX_GROWN: Final = 1 << 22
"""Bytes, whatever came: as Python's objects, those are up to 70 times as many."""


def shrink(encoded: bytes) -> bytes:
    """`encoded`, deflated if that is smaller, but not too much so."""
    if not MIN_BYTES <= len(encoded) <= MAX_GROWN:
        return encoded
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    small = MARK + coder.compress(encoded) + coder.flush()
    is_within = len(encoded) <= MAX_GROWTH * len(small)
    return small if len(small) < len(encoded) and is_within else encoded


def grow(data: bytes | bytearray | memoryview) -> bytes | bytearray | memoryview:
    """The inverse.

    Raises:
        WireError: it is damaged, or grows beyond MAX_GROWTH times its size or MAX_GROWN.
    """
    if data[:1] != MARK:
        return data
    return inflate(data[1:], min(MAX_GROWTH * len(data), MAX_GROWN), "a deflated value")


def inflate(
    coded: bytes | bytearray | memoryview, most: int, what: str, wbits: int = -zlib.MAX_WBITS
) -> bytes:
    """What was deflated; takes no more memory than `most` bytes, whatever comes.

    Raises:
        WireError: `what` is damaged, cut off, followed by more, or larger than that.
    """
    coder = zlib.decompressobj(wbits)
    try:
        plain = coder.decompress(coded, most)
    except zlib.error as error:
        raise WireError(f"{what} cannot be read: {error}") from error
    if not coder.eof or coder.unused_data:
        raise WireError(f"{what} is cut off, followed by more, or too large")
    return plain
