"""Lossless coding of numbers: their exponents shrink, the rest is nearly random.

Every word is turned left by one bit, so that the sign goes to the end and the first byte is the
exponent (bfloat16, float32; with three bits of the mantissa in float16). Those bytes are deflated
with Huffman codes alone: there is nothing to match in them, and what zlib gives is within 1 % of
their entropy. The other bytes follow as they are. Words of one byte are deflated whole.
"""

import zlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from molink.core.errors import WireError
from molink.wire import deflated

Bytes = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview

_WORDS: Final[dict[int, np.dtype[np.unsignedinteger[Any]]]] = {
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
}
WORD_BYTES: Final = (1, *_WORDS)


def split(data: Buffer, word_bytes: int) -> tuple[Bytes, Bytes]:
    """The first bytes of all turned words, and the others in their order; both are copies."""
    if word_bytes == 1:
        return np.frombuffer(data, np.uint8).copy(), np.empty(0, np.uint8)
    words = np.frombuffer(data, _WORDS[word_bytes])
    turned = (words << 1) | (words >> (8 * word_bytes - 1))
    columns = turned.view(np.uint8).reshape(-1, word_bytes)
    return columns[:, -1].copy(), columns[:, :-1].ravel()


def join(first: Buffer, others: Buffer, word_bytes: int) -> Bytes:
    """The inverse of `split`: the bytes of all words, in memory of their own."""
    top = np.frombuffer(first, np.uint8)
    if word_bytes == 1:
        return top.copy()
    columns = np.empty((len(top), word_bytes), np.uint8)
    columns[:, -1] = top
    columns[:, :-1] = np.frombuffer(others, np.uint8).reshape(-1, word_bytes - 1)
    words = columns.reshape(-1).view(_WORDS[word_bytes])
    return ((words >> 1) | (words << (8 * word_bytes - 1))).view(np.uint8)


def deflate(plane: Buffer) -> bytes:
    """Releases the interpreter's lock while it works."""
    numbers = np.frombuffer(plane, np.uint8)
    is_sparse = 8 * np.count_nonzero(numbers) < len(numbers)  # a code has at least one bit
    strategy = zlib.Z_RLE if is_sparse else zlib.Z_HUFFMAN_ONLY
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
    return coder.compress(plane) + coder.flush()


def inflate(coded: Buffer, size: int) -> bytes:
    """The plane of `size` bytes that was deflated; takes no more memory, whatever comes.

    Raises:
        WireError: it is damaged, or of another size.
    """
    plane = deflated.inflate(coded, size + 1, "a coded tensor")
    if len(plane) != size:
        raise WireError(f"a coded tensor does not hold the {size} words that it should")
    return plane
