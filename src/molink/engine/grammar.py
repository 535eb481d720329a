"""Grammar bitmasks on the wire: vocabulary/8 bytes for each request and step, mostly equal bits."""

import zlib

from molink.core.errors import WireError
from molink.wire.frames import MAX_MESSAGE

LEVEL = 1  # a mask of 19 kB shrinks to a few hundred bytes at any level


def pack_grammar(encoded: bytes) -> bytes:
    """Compress an encoded GrammarOutput."""
    return zlib.compress(encoded, LEVEL)


def unpack_grammar(payload: bytes | bytearray) -> bytes:
    """The inverse. Raises WireError for anything else, and beyond MAX_MESSAGE bytes."""
    inflate = zlib.decompressobj()
    try:
        encoded = inflate.decompress(payload, MAX_MESSAGE)
    except zlib.error as error:
        raise WireError(f"a grammar cannot be read: {error}") from error
    if not inflate.eof:
        raise WireError("a grammar is cut off or too large")
    return encoded
