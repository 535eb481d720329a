"""Planes come back bit for bit, and nothing else is believed."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.core.errors import WireError
from molink.wire.planes import WORD_BYTES, deflate, inflate, join, split

words = st.sampled_from(WORD_BYTES)


@given(words, st.data())
def test_what_is_split_is_joined(word_bytes: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 60))
    raw = data.draw(st.binary(min_size=number * word_bytes, max_size=number * word_bytes))
    first, others = split(raw, word_bytes)
    assert (len(first), len(others)) == (number, number * (word_bytes - 1))
    assert join(first.data, others.data, word_bytes).tobytes() == raw


def test_the_first_plane_of_a_bfloat16_is_its_exponent() -> None:
    first, others = split(bytes.fromhex("80bf 803f 0000"), 2)  # -1, 1, 0
    assert list(first) == [127, 127, 0]
    assert list(others) == [1, 0, 0]


@given(st.binary(max_size=2000))
def test_what_is_deflated_is_inflated(plane: bytes) -> None:
    assert inflate(deflate(plane), len(plane)) == plane


@given(st.binary(min_size=1, max_size=400), st.data())
def test_another_size_is_refused(plane: bytes, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 500).filter(lambda size: size != len(plane)))
    with pytest.raises(WireError, match="coded tensor"):
        inflate(deflate(plane), size)


@given(st.binary(min_size=1, max_size=400), st.data())
def test_what_is_cut_off_or_followed_is_refused(plane: bytes, data: st.DataObject) -> None:
    coded = deflate(plane)
    with pytest.raises(WireError):
        inflate(coded[: data.draw(st.integers(0, len(coded) - 1))], len(plane))
    with pytest.raises(WireError):
        inflate(coded + b"x", len(plane))


@given(st.binary(max_size=400), st.integers(0, 1000))
def test_foreign_bytes_give_the_size_or_an_error(coded: bytes, size: int) -> None:
    with suppress(WireError):
        assert len(inflate(coded, size)) == size
