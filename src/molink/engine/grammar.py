"""Grammar bitmasks on the wire: vocabulary/8 bytes for each request and step, mostly equal bits."""

import zlib

from molink.wire.deflated import inflate
from molink.wire.frames import MAX_MESSAGE

LEVEL = 1  # a mask of 19 kB shrinks to a few hundred bytes at any level


def pack_grammar(encoded: bytes) -> bytes:
    """Compress an encoded GrammarOutput."""
    return zlib.compress(encoded, LEVEL)


def unpack_grammar(payload: bytes | bytearray) -> bytes:
    """The inverse. Raises WireError for anything else, and beyond MAX_MESSAGE bytes."""
    return inflate(payload, MAX_MESSAGE, "a grammar", zlib.MAX_WBITS)
