"""Values shrink by their repetitions, and what comes is bounded."""

import tracemalloc
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.core.errors import WireError
from molink.wire.deflated import MARK, MAX_GROWTH, MIN_BYTES, grow, shrink

encoded = st.builds(
    lambda piece, times: piece * times, st.binary(min_size=1, max_size=200), st.integers(0, 200)
).filter(lambda data: data[:1] != MARK)


@given(encoded)
def test_what_is_shrunk_grows_again(data: bytes) -> None:
    small = shrink(data)
    assert grow(small) == data
    assert len(small) <= len(data) <= max(MAX_GROWTH * len(small), MIN_BYTES)


def test_ids_that_are_named_twice_take_half() -> None:
    ids = b"".join(b"cmpl-%032x-0" % (number**9 * 7919) for number in range(32))
    assert len(shrink(ids + ids)) < 0.5 * len(ids + ids)


@given(encoded.filter(lambda data: len(shrink(data)) < len(data)), st.data())
def test_what_is_cut_off_or_followed_is_refused(data: bytes, draw: st.DataObject) -> None:
    small = shrink(data)
    with pytest.raises(WireError):
        grow(small[: draw.draw(st.integers(1, len(small) - 1))])
    with pytest.raises(WireError):
        grow(small + b"x")


@given(st.binary(max_size=300))
def test_foreign_bytes_are_bounded_or_refused(data: bytes) -> None:
    with suppress(WireError):
        assert len(grow(MARK + data)) <= MAX_GROWTH * (len(data) + 1)


def test_a_small_message_cannot_become_a_large_one() -> None:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = MARK + coder.compress(bytes(1 << 24)) + coder.flush()
    tracemalloc.start()
    with pytest.raises(WireError, match="too large"):
        grow(bomb)
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_GROWTH * len(bomb)
    tracemalloc.stop()
