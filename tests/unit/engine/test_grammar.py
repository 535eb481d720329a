"""Grammar bitmasks shrink on the wire, and what arrives is bounded."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.core.errors import WireError
from molink.engine import grammar
from molink.engine.grammar import pack_grammar, unpack_grammar


@given(st.binary(max_size=300))
def test_what_is_packed_is_unpacked(encoded: bytes) -> None:
    assert unpack_grammar(pack_grammar(encoded)) == encoded


def test_a_mask_of_a_large_vocabulary_takes_little() -> None:
    mask = bytearray(b"\xff" * 19_000)
    mask[7_000:7_040] = bytes(range(40))
    assert len(pack_grammar(bytes(mask))) < 500


@given(st.binary(min_size=1, max_size=300), st.data())
def test_what_is_cut_off_is_refused(encoded: bytes, data: st.DataObject) -> None:
    packed = pack_grammar(encoded)
    with pytest.raises(WireError, match="grammar"):
        unpack_grammar(packed[: data.draw(st.integers(0, len(packed) - 1))])


def test_what_is_no_grammar_is_refused() -> None:
    with pytest.raises(WireError, match="cannot be read"):
        unpack_grammar(b"no grammar")


def test_a_grammar_may_not_grow_beyond_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_MESSAGE", 1000)
    assert len(unpack_grammar(zlib.compress(bytes(1000)))) == 1000
    with pytest.raises(WireError, match="too large"):
        unpack_grammar(zlib.compress(bytes(1001)))
