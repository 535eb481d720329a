"""The header of activations: announces what follows, believes nobody."""

import struct
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.wire.codec import CodecError
from molink.wire.tensors import (
    ALIGNMENT,
    DTYPE_BYTES,
    MAX_DIMS,
    MAX_NAME,
    MAX_TENSORS,
    TensorMeta,
    pack_header,
    unpack_header,
)

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_NAME // 4)
shapes = st.lists(st.integers(0, 20), max_size=MAX_DIMS).map(tuple)
raw = st.builds(TensorMeta, names, st.sampled_from(sorted(DTYPE_BYTES)), shapes, st.none())
coded = st.builds(
    lambda meta, share: meta._replace(coded=min(meta.num_elements, 2**24) * share // 100),
    raw.filter(lambda meta: meta.num_bytes < 2**30),
    st.integers(1, 99),
).filter(lambda meta: meta.coded > 0)
tensors = st.one_of(raw, coded)
quick = settings(deadline=None)

HIDDEN = TensorMeta("hidden_states", "bfloat16", (2048, 5120))


@quick
@given(metas=st.lists(tensors.filter(lambda meta: meta.num_bytes < 2**20), max_size=MAX_TENSORS))
def test_a_header_comes_back(metas: list[TensorMeta]) -> None:
    header = pack_header(metas)
    assert unpack_header(memoryview(header + b"payload")) == (metas, len(header))
    assert len(header) % ALIGNMENT == 0


@quick
@given(data=st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(b"\1\0".__add__)))
def test_foreign_bytes_are_a_header_or_a_codec_error(data: bytes) -> None:
    with suppress(CodecError):
        metas, offset = unpack_header(data, max_bytes=1000)
        assert offset + sum(meta.num_bytes for meta in metas) <= 1000


@quick
@given(metas=st.lists(tensors, min_size=1, max_size=3), draw=st.data())
def test_damaged_headers_are_a_header_or_a_codec_error(
    metas: list[TensorMeta], draw: st.DataObject
) -> None:
    header = bytearray(pack_header(metas, max_bytes=2**63))
    at = draw.draw(st.integers(0, len(header) - 1))
    with pytest.raises(CodecError):
        unpack_header(header[:at], max_bytes=2**63)
    header[at] ^= 1 << draw.draw(st.integers(0, 7))
    with suppress(CodecError):
        unpack_header(header)


def test_sizes() -> None:
    assert HIDDEN.num_elements == 2048 * 5120
    assert HIDDEN.num_bytes == 2 * 2048 * 5120
    assert TensorMeta("scalar", "int64", ()).num_bytes == 8
    assert TensorMeta("empty", "float32", (0, 5120)).num_bytes == 0


def test_a_coded_tensor_is_counted_with_the_bytes_that_come() -> None:
    meta = HIDDEN._replace(coded=3_000_000)
    header = pack_header([meta])
    assert meta.wire_bytes == HIDDEN.num_elements + 3_000_000
    total = len(header) + meta.wire_bytes
    assert unpack_header(header, max_bytes=total) == ([meta], len(header))
    with pytest.raises(CodecError, match=f"{total} bytes"):
        unpack_header(header, max_bytes=total - 1)


@pytest.mark.parametrize("size", [0, HIDDEN.num_elements, 2**32 - 1])
def test_a_coding_that_does_not_shrink_is_none(size: int) -> None:
    with pytest.raises(CodecError, match="no coding"):
        pack_header([HIDDEN._replace(coded=size)])


def test_a_coded_tensor_is_not_larger_than_a_message() -> None:
    with pytest.raises(CodecError, match="a coded tensor of"):
        pack_header([TensorMeta("x", "bfloat16", (2**30,), coded=7)])


def test_the_bound_counts_header_and_tensors() -> None:
    header = pack_header([HIDDEN])
    total = len(header) + HIDDEN.num_bytes
    assert unpack_header(header, max_bytes=total) == ([HIDDEN], len(header))
    for refuse in (
        lambda: unpack_header(header, max_bytes=total - 1),
        lambda: pack_header([HIDDEN], max_bytes=total - 1),
    ):
        with pytest.raises(CodecError, match=f"{total} bytes"):
            refuse()


@pytest.mark.parametrize(
    "meta",
    [
        TensorMeta("x", "float64", (1,)),
        TensorMeta("x", "float32", (-1,)),
        TensorMeta("x", "float32", (2**31, 2**31)),
        TensorMeta("x", "float32", (0, 2**63)),
        TensorMeta("x", "float32", (1,) * (MAX_DIMS + 1)),
        TensorMeta("x", "float32", (True,)),
        TensorMeta("x", "float32", (1.0,)),  # type: ignore[arg-type]
        TensorMeta("x" * (MAX_NAME + 1), "float32", (1,)),
    ],
)
def test_a_tensor_that_cannot_travel_is_refused_at_the_sender(meta: TensorMeta) -> None:
    with pytest.raises(CodecError):
        pack_header([meta])


def test_too_many_tensors() -> None:
    metas = [TensorMeta(str(i), "bool", ()) for i in range(MAX_TENSORS + 1)]
    with pytest.raises(CodecError, match=f"{MAX_TENSORS + 1} tensors"):
        pack_header(metas)
    with pytest.raises(CodecError, match=f"{MAX_TENSORS + 1} tensors"):
        unpack_header(bytes([MAX_TENSORS + 1]) + bytes(200))


@pytest.mark.parametrize("shape", [(2**64 - 1,), (2**33, 2**33), (0, 2**64 - 1), (2**40, 1)])
def test_a_huge_announcement_costs_nothing(shape: tuple[int, ...]) -> None:
    body = struct.pack(f"<BB1sBB{len(shape)}Q", 1, 1, b"x", 0, len(shape), *shape)
    header = body + bytes(-len(body) % ALIGNMENT)
    tracemalloc.start()
    with pytest.raises(CodecError):
        unpack_header(header)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
