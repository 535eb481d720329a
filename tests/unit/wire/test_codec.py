"""The codec: what goes in comes out; anything else is a CodecError and costs little."""

import math
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from fractions import Fraction
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from molink.core.errors import WireError
from molink.wire.codec import (
    FIRST_TAG,
    MAX_DEPTH,
    NUMPY_DTYPES,
    Codec,
    CodecError,
    Registry,
    UnregisteredType,
)


class Colour(Enum):
    RED = "red"
    BLUE = ("b", 1)


class Level(IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: Any
    y: Any = None


@dataclass
class Base:
    a: Any
    hidden: Any = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self.hidden = "set by the constructor"


@dataclass(frozen=True, slots=True)
class Frozen:
    b: Any

    def __post_init__(self) -> None:
        if type(self.b) is str and self.b == "refused":
            raise AssertionError("the constructor ran")


@dataclass
class Child(Base):
    c: Any = ()


class Settings(msgspec.Struct, omit_defaults=True, dict=True):
    limit: Any = 1
    _private: Any = msgspec.field(default_factory=set)

    def __post_init__(self) -> None:
        assert self.limit is not None, "the constructor ran"


class FrozenSettings(msgspec.Struct, frozen=True, array_like=True):
    value: Any


class Stranger:
    pass


@pytest.fixture(scope="module")
def codec() -> Codec:
    registry = Registry()
    classes = [Colour, Level, Point, Base, Frozen, Child, FrozenSettings]
    for tag, cls in enumerate(classes, start=FIRST_TAG):
        registry.add(tag, cls)
    registry.add(40, Settings, template=Settings())
    registry.add_hook(
        41,
        complex,
        lambda value: [value.real, value.imag],
        lambda parts: complex(*parts),
        (float, float),
    )
    return Codec(registry)


def plain(value: Any) -> Any:
    """A tree that is equal for equal values only: types, order, NaN and bytes of arrays count."""
    match value:
        case float():
            return float, struct.pack("<d", value)
        case complex():
            return complex, struct.pack("<2d", value.real, value.imag)
        case set() | frozenset():
            return type(value), sorted(map(repr, map(plain, value)))
        case dict():
            return dict, [(plain(k), plain(v)) for k, v in value.items()]
        case list() | tuple():
            return type(value), [plain(item) for item in value]
        case np.ndarray():
            return value.dtype.str, value.shape, value.tobytes()
        case Base() | Settings() | FrozenSettings():
            names = getattr(value, "__struct_fields__", None) or value.__dataclass_fields__
            return type(value), [plain(getattr(value, name)) for name in names]
        case Frozen(b):
            return Frozen, plain(b)
    return type(value), value


integers = st.integers(min_value=-(2**63), max_value=2**64 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]))
keys = st.recursive(
    st.one_of(st.none(), st.booleans(), integers, texts, st.binary(), st.sampled_from(Colour)),
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.builds(Point, inner, inner)),
    max_leaves=4,
)
arrays = st.sampled_from(sorted(NUMPY_DTYPES)).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))
)
leaves = st.one_of(
    keys,
    st.floats(),
    arrays,
    st.builds(Fraction, integers, st.integers(1, 2**63)),
    st.just(Level.LOW),
    st.complex_numbers(),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(inner, max_size=4)
    return st.one_of(
        some,
        some.map(tuple),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
        st.dictionaries(keys, inner, max_size=4),
        st.builds(Base, inner),
        st.builds(Child, inner, inner),
        st.builds(Frozen, inner),
        st.builds(Point, inner, inner),
        st.builds(Settings, some, st.sets(keys, max_size=4)),
        st.builds(FrozenSettings, inner),
    )


values = st.recursive(leaves, containers, max_leaves=12)

# Trees that msgspec reads and that look like the codec's own, with parts it never wrote.
raw = st.recursive(
    st.one_of(integers, st.floats(), texts, st.binary(max_size=16), st.sampled_from(["<f4", "?"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.integers(0, 42), st.lists(inner, max_size=4), min_size=1, max_size=1),
        st.dictionaries(st.one_of(st.integers(0, 42), texts), inner, max_size=2),
    ),
    max_leaves=12,
).map(msgspec.msgpack.encode)

quick = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(value=values)
def test_a_value_comes_back_with_all_its_types(codec: Codec, value: Any) -> None:
    assert plain(codec.decode(codec.encode(value))) == plain(value)


@quick
@given(data=st.one_of(st.binary(max_size=200), raw))
def test_foreign_bytes_are_a_value_or_a_codec_error(codec: Codec, data: bytes) -> None:
    decode_or_refuse(codec, data)


@quick
@given(value=values, draw=st.data())
def test_damaged_bytes_are_a_value_or_a_codec_error(
    codec: Codec, value: Any, draw: st.DataObject
) -> None:
    data = codec.encode(value)
    at = draw.draw(st.integers(0, len(data) - 1))
    with pytest.raises(CodecError):
        codec.decode(data[:at])
    with pytest.raises(CodecError):
        codec.decode(data + data[:1])
    damaged = bytearray(data)
    damaged[at] ^= 1 << draw.draw(st.integers(0, 7))
    decode_or_refuse(codec, damaged)


def decode_or_refuse(codec: Codec, data: bytes | bytearray) -> None:
    with suppress(CodecError):
        codec.decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x05",
        b"\xdc\xff\xff" * 400,
        b"\x81\xdd\xff\xff\xff\xff" * 90,
        b"\x91" * 100_000,
        b"\x81\x01" * 100_000,
        msgspec.msgpack.encode({5: ["<f4", [2**40], b"abcd"]}),
        msgspec.msgpack.encode({5: ["<f4", [10**10], 10**11]}),
        msgspec.msgpack.encode({5: ["<f4", [-1], b"abcd"]}),
        msgspec.msgpack.encode({5: ["<f4", [-1, 1], b"abcd"]}),
        msgspec.msgpack.encode({5: ["<f4", [True], b"abcd"]}),
        msgspec.msgpack.encode({5: ["<f4", [0, 2**62, 2**62], b""]}),
        msgspec.msgpack.encode({5: ["<f4", [1], b"abcdefgh"]}),
        msgspec.msgpack.encode({5: ["O", [1], b"abcdefgh"]}),
        msgspec.msgpack.encode({6: ["1e1000000000", 1]}),
        msgspec.msgpack.encode({6: [1, 0]}),
        msgspec.msgpack.encode({2: [[1]]}),
        msgspec.msgpack.encode({4: [1, 2, 3]}),
        msgspec.msgpack.encode({FIRST_TAG: ["GREEN"]}),
        msgspec.msgpack.encode({FIRST_TAG: [["RED"]]}),
        msgspec.msgpack.encode({FIRST_TAG + 3: [1]}),
        msgspec.msgpack.encode({FIRST_TAG + 3: [1, 2, 3]}),
        msgspec.msgpack.encode({FIRST_TAG + 3: {"a": 1, "hidden": 2}}),
        msgspec.msgpack.encode({9: [1]}),
        msgspec.msgpack.encode({1: [], 2: []}),
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode(msgspec.msgpack.Ext(5, b"ab")),
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xa1\xff",  # text that is not UTF-8
        b"\x01\x01",
        b"",
        b"\x80\x04\x95",  # the beginning of a pickle
    ],
)
def test_hostile_bytes_are_refused_at_little_cost(codec: Codec, data: bytes) -> None:
    with pytest.raises(CodecError):
        codec.decode(data)
    assert peak_of_decoding(codec, data) < 64 * 1024 + 300 * len(data)


@quick
@given(data=raw)
def test_memory_is_in_proportion_to_the_input(codec: Codec, data: bytes) -> None:
    assert peak_of_decoding(codec, data) < 64 * 1024 + 300 * len(data)


def peak_of_decoding(codec: Codec, data: bytes) -> int:
    """Bytes that Python and numpy held at most, beyond what they held before."""
    tracemalloc.start()
    try:
        decode_or_refuse(codec, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (Stranger(), "$:"),
        ([1, (2, Stranger())], "$[1][1]:"),
        (Base({"k": [Stranger()]}), "$.a['k'][0]:"),
        ({Stranger(): 1}, "$.keys()[0]:"),
        (Settings(Point(1, {"x": Stranger})), "$.limit.y['x']:"),
        (Child(1, OrderedDict()), "$.c:"),
    ],
)
def test_an_unknown_type_names_itself_and_its_place(codec: Codec, value: Any, path: str) -> None:
    with pytest.raises(UnregisteredType) as raised:
        codec.encode(value)
    assert f" {path} " in str(raised.value)
    assert any(name in str(raised.value) for name in ("Stranger", "OrderedDict", "builtins.type"))
    assert isinstance(raised.value, WireError)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"n": [1, 2**64]}, "$['n'][1]:"),
        ((-(2**63) - 1,), "$[0]:"),
        (["\ud800"], "$[0]:"),
        ([np.array([object()])], "$[0]: numpy dtype object"),
        (Base(np.zeros(2, ">i4")), "$.a: numpy dtype >i4"),
    ],
)
def test_a_value_without_an_encoding_says_where_it_is(codec: Codec, value: Any, says: str) -> None:
    with pytest.raises(CodecError) as raised:
        codec.encode(value)
    assert says in str(raised.value)
    assert not isinstance(raised.value, UnregisteredType)


def test_sender_and_receiver_agree_on_depth(codec: Codec) -> None:
    deep: list[Any] = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    assert codec.decode(codec.encode(deep)) == deep
    with pytest.raises(CodecError, match="deeper"):
        codec.encode([deep])
    with pytest.raises(CodecError, match="deeper"):
        codec.decode(msgspec.msgpack.encode([deep]))
    deep.append(deep)
    with pytest.raises(CodecError, match="deeper"):
        codec.encode(deep)


def test_no_constructor_runs_on_receipt(codec: Codec) -> None:
    base = Base(1)
    base.hidden = "kept"
    frozen = Frozen(1)
    object.__setattr__(frozen, "b", "refused")
    options = Settings(2)
    options.limit = None
    back = codec.decode(codec.encode([base, frozen, options]))
    assert plain(back) == plain([base, frozen, options])


def test_what_is_pickled_stays_outside(codec: Codec) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return pytest.fail, ("executed",)

    with pytest.raises(UnregisteredType, match="Bomb"):
        codec.encode([Bomb()])
    with pytest.raises(CodecError):
        codec.decode(pickle.dumps(Bomb()))


def test_arrays_are_writable_copies(codec: Codec) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    back = codec.decode(codec.encode(array))
    back[0, 0] = math.nan
    assert array[0, 0] == 0
    np.testing.assert_array_equal(back[1:], array[1:])


def test_a_codec_is_closed(codec: Codec) -> None:
    registry = Registry()
    closed = Codec(registry)
    registry.add(FIRST_TAG, Colour)
    with pytest.raises(UnregisteredType):
        closed.encode(Colour.RED)
    assert Codec(registry).decode(Codec(registry).encode(Colour.BLUE)) is Colour.BLUE


def test_a_tag_and_a_type_are_registered_once() -> None:
    registry = Registry()
    registry.add(FIRST_TAG, Colour)
    for tag, cls in [(FIRST_TAG, Level), (FIRST_TAG + 1, Colour), (FIRST_TAG - 1, Level)]:
        with pytest.raises(ValueError, match="tag"):
            registry.add(tag, cls)
    with pytest.raises(TypeError, match="Stranger"):
        registry.add(FIRST_TAG + 1, Stranger)


def test_fractions_are_exact(codec: Codec) -> None:
    assert codec.decode(codec.encode(Fraction(1, 3))) == Fraction(1, 3)
