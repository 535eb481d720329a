"""The header in front of a step's activations: which tensors follow, as raw bytes, in which order.

    u8 count | count × (u8 name length, name, u8 dtype, u8 dims, dims × u64, [u32 coded])
             | zeros up to ALIGNMENT

Little endian. The tensors follow without gaps, each contiguous in row-major order. One that is
coded (the highest bit of its dims is set) is two pieces: `coded` bytes of its first plane, which is
deflated, and its other planes (`wire.planes`). This is the path of every step, so it stays apart
from the codec: nothing here touches the tensors' bytes.
"""

import struct
from collections.abc import Sequence
from math import prod
from typing import Final, NamedTuple

from molink.wire.codec import CodecError
from molink.wire.frames import MAX_MESSAGE

DTYPE_BYTES: Final = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "bool": 1,
    "int8": 1,
    "int16": 2,
}
"""Bytes of one element. The position in this table is the dtype's number on the wire."""

MAX_TENSORS: Final = 64  # one in eight bits is four
MAX_NAME: Final = 64  # bytes
MAX_DIMS: Final = 8
ALIGNMENT: Final = 64  # bytes; where the first tensor starts

_DTYPES: Final = tuple(DTYPE_BYTES)
_CODED: Final = 0x80  # in the byte of dims


class TensorMeta(NamedTuple):
    """One tensor of a step."""

    name: str
    dtype: str  # a key of DTYPE_BYTES; torch's name without the module
    shape: tuple[int, ...]
    coded: int | None = None  # bytes of its first plane, deflated; None: the tensor lies as it is

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return num_bytes(self.dtype, self.shape)

    @property
    def wire_bytes(self) -> int:
        if self.coded is None:
            return self.num_bytes
        return self.num_bytes - self.num_elements + self.coded


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a contiguous tensor.

    Raises:
        CodecError: an unknown dtype; a dimension that is no int, negative or, with the others,
            beyond 63 bits (an empty tensor's too: torch computes strides from them).
    """
    if dtype not in DTYPE_BYTES:
        raise CodecError(f"dtype {dtype!r:.40} does not cross the wire")
    if len(shape) > MAX_DIMS or any(type(dim) is not int or dim < 0 for dim in shape):
        raise CodecError(f"{shape!r:.80} is not a shape of at most {MAX_DIMS} dimensions")
    if prod(max(dim, 1) for dim in shape) * DTYPE_BYTES[dtype] >= 1 << 63:
        raise CodecError(f"a tensor of shape {shape!r:.160} cannot exist")
    return prod(shape) * DTYPE_BYTES[dtype]


def pack_header(metas: Sequence[TensorMeta], *, max_bytes: int = MAX_MESSAGE) -> bytes:
    """The header for tensors that will follow in this order.

    Args:
        metas: at most MAX_TENSORS, with names of at most MAX_NAME bytes.
        max_bytes: that header and tensors may take together.

    Raises:
        CodecError: a tensor that cannot travel, or too much of them.
    """
    if len(metas) > MAX_TENSORS:
        raise CodecError(f"{len(metas)} tensors in one step")
    header = bytearray((len(metas),))
    for meta in metas:
        name, dtype, shape, coded = meta
        num_bytes(dtype, shape)
        label = name.encode()
        if len(label) > MAX_NAME:
            raise CodecError(f"the name {name!r:.80} is too long")
        dims = len(shape) | (0 if coded is None else _CODED)
        header += struct.pack("<B", len(label)) + label
        header += struct.pack(f"<BB{len(shape)}Q", _DTYPES.index(dtype), dims, *shape)
        _check_coded(meta)
        header += b"" if coded is None else struct.pack("<I", coded)
    header += bytes(-len(header) % ALIGNMENT)
    _check_total(len(header), metas, max_bytes)
    return bytes(header)


def unpack_header(
    view: bytes | bytearray | memoryview, *, max_bytes: int = MAX_MESSAGE
) -> tuple[list[TensorMeta], int]:
    """The tensors announced at the start of `view`, and the offset in bytes of the first.

    The tensors themselves need not have arrived: with `max_bytes=len(view)` they have.

    Raises:
        CodecError: not a header, or it announces more than `max_bytes` with itself.
    """
    try:
        metas, end = _read(view)
    except (struct.error, LookupError, UnicodeDecodeError) as error:
        raise CodecError(f"not a header of tensors: {error}") from error
    offset = end + -end % ALIGNMENT
    if offset > len(view) or any(view[end:offset]):
        raise CodecError("not a header of tensors: no zeros at its end")
    _check_total(offset, metas, max_bytes)
    return metas, offset


def _read(view: bytes | bytearray | memoryview) -> tuple[list[TensorMeta], int]:
    if view[0] > MAX_TENSORS:
        raise CodecError(f"{view[0]} tensors in one step")
    metas, at = [], 1
    for _ in range(view[0]):
        length = view[at]
        if length > MAX_NAME:
            raise CodecError(f"a name of {length} bytes")
        name, at = str(view[at + 1 : at + 1 + length], "utf-8"), at + 1 + length
        dtype, dims, is_coded = view[at], view[at + 1] & ~_CODED, view[at + 1] & _CODED
        if dims > MAX_DIMS:
            raise CodecError(f"a tensor of {dims} dimensions")
        shape = struct.unpack_from(f"<{dims}Q", view, at + 2)
        at += 2 + 8 * dims
        coded = None
        if is_coded:
            (coded,), at = struct.unpack_from("<I", view, at), at + 4
        metas.append(TensorMeta(name, _DTYPES[dtype], shape, coded))
        _check_coded(metas[-1])
    return metas, at


def _check_coded(meta: TensorMeta) -> None:
    if meta.coded is None:
        return
    if meta.num_bytes > MAX_MESSAGE:
        raise CodecError(f"a coded tensor of {meta.num_bytes} bytes")
    if not 0 < meta.coded < meta.num_elements:
        raise CodecError(f"{meta.coded} bytes for {meta.num_elements} words are no coding")


def _check_total(offset: int, metas: Sequence[TensorMeta], max_bytes: int) -> None:
    total = offset + sum(meta.wire_bytes for meta in metas)
    if total > max_bytes:
        raise CodecError(f"a step of {total} bytes where {max_bytes} are allowed")
