"""Trees of Python values to bytes and back, over a closed registry of types.

The bytes are MessagePack, deflated if that pays (`wire.deflated`). None, bool, int, float, str and
bytes stand for themselves and an array is a list; every other value is a map of one entry, `{tag:
[part, ...]}`, where the tag names a registered type. Decoding makes registered types only, by
setting their declared fields on a bare instance: a dataclass or struct comes back as it was,
without its `__init__` or `__post_init__` running, and nothing is imported. Fields get whatever
types were sent; only their number is checked.

msgspec 0.22 keeps memory in proportion to the input: it does not believe a declared length.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from enum import Enum
from fractions import Fraction
from types import NoneType
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from molink.core.errors import WireError
from molink.wire.deflated import grow, shrink

MAX_DEPTH: Final = 96
"""Levels of nesting. vLLM accepts JSON schemas of 64 levels, which travel inside other values."""

FIRST_TAG: Final = 16  # smaller ones are the codec's own

PRIMITIVES: Final = frozenset({NoneType, bool, int, float, str, bytes})

NUMPY_DTYPES: Final = {
    dtype.str: dtype
    for dtype in map(
        np.dtype, ("?", "<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8")
    )
}

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder()

# What wrong bytes, or a value that lies about itself, make msgspec and constructors raise.
_FAILURES: Final = (
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RuntimeError,
)

Parts = list[Any]
ToParts = Callable[[Any], Parts]
FromParts = Callable[[Parts], Any]


class CodecError(WireError):
    """Bytes that are not an encoded value, or a value that has no encoding."""


class UnregisteredType(CodecError):
    """A type that does not cross the wire; the message names it and its place in the tree."""


class _Kind(NamedTuple):
    """How values of one type are taken apart and put together."""

    tag: int
    cls: type
    to_parts: ToParts
    from_parts: FromParts
    arity: int | None = None  # number of parts; None: any
    names: tuple[str, ...] = ()  # of the parts that are attributes


class Registry:
    """The types that may cross, each under a tag that never changes its meaning."""

    def __init__(self) -> None:
        self.by_type: dict[type, _Kind] = {}
        self.by_tag: dict[int, _Kind] = {}
        for kind in _BUILT_IN:
            self._put(kind)

    def add(self, tag: int, cls: type, *, template: Any = None) -> None:
        """Register a dataclass, msgspec.Struct, NamedTuple or Enum.

        Args:
            tag: FIRST_TAG or more, in use for no other type.
            cls: exactly this class; its subclasses are types of their own.
            template: any valid instance, for a Struct with a `__post_init__`: a Struct can only be
                made without its constructor by copying one.

        Raises:
            ValueError: the tag or the type is taken.
            TypeError: the class is none of these kinds.
        """
        if issubclass(cls, Enum):
            self.add_hook(tag, cls, _enum_parts, lambda parts: cls.__members__[parts[0]], (str,))
            return
        names: tuple[str, ...]
        if issubclass(cls, msgspec.Struct):
            names = cls.__struct_fields__
            bare = cls(**dict.fromkeys(names)) if template is None else template
            from_parts = _builder(names, lambda: copy(bare), msgspec.structs.force_setattr)
        elif is_dataclass(cls):
            names = tuple(field.name for field in fields(cls))
            from_parts = _builder(names, lambda: object.__new__(cls), object.__setattr__)
        elif issubclass(cls, tuple) and hasattr(cls, "_fields"):
            names, from_parts = cls._fields, lambda parts: tuple.__new__(cls, parts)
        else:
            raise TypeError(f"{_name(cls)} has no declared fields: register it with add_hook")
        self._put_own(_Kind(tag, cls, _field_getter(names), from_parts, len(names), names))

    def add_hook(
        self,
        tag: int,
        cls: type,
        to_parts: ToParts,
        from_parts: FromParts,
        types: tuple[type, ...],
    ) -> None:
        """Register a type by a pair of functions over its parts.

        Args:
            tag: FIRST_TAG or more, in use for no other type.
            cls: exactly this class.
            to_parts: gives values that can themselves be encoded.
            from_parts: gets those values, of exactly `types`; its errors become CodecError.
            types: of the parts, `object` for any.

        Raises:
            ValueError: the tag or the type is taken.
        """
        self._put_own(_Kind(tag, cls, to_parts, _checked(types, from_parts), len(types)))

    def _put_own(self, kind: _Kind) -> None:
        if kind.tag < FIRST_TAG:
            raise ValueError(f"tag {kind.tag} is below {FIRST_TAG}")
        self._put(kind)

    def _put(self, kind: _Kind) -> None:
        if kind.tag in self.by_tag or kind.cls in self.by_type:
            raise ValueError(f"tag {kind.tag} or type {_name(kind.cls)} is registered twice")
        self.by_tag[kind.tag] = self.by_type[kind.cls] = kind


class Codec:
    """Encodes and decodes values of the types a registry holds now; safe to use from any thread."""

    def __init__(self, registry: Registry) -> None:
        self._by_type = dict(registry.by_type)
        self._by_tag = dict(registry.by_tag)

    def encode(self, value: Any) -> bytes:
        """The bytes of a tree of values, deflated if that pays.

        Raises: as `encode_plain`.
        """
        return shrink(self.encode_plain(value))

    def encode_plain(self, value: Any) -> bytes:
        """The bytes of a tree of values; `decode` takes these too.

        Raises:
            UnregisteredType: a type in the tree is not registered; says which, and where.
            CodecError: an int beyond 64 bits, text that is not Unicode, nesting beyond MAX_DEPTH.
        """
        try:
            return _ENCODER.encode(self._pack(value, 0))
        except RecursionError as error:
            raise CodecError(f"cannot encode: nested deeper than {MAX_DEPTH} levels") from error
        except (CodecError, *_FAILURES) as error:
            path, cause = self._blame(value, error)
            kind = UnregisteredType if isinstance(cause, UnregisteredType) else CodecError
            raise kind(f"cannot encode ${path}: {cause}") from cause

    def decode(self, data: bytes | bytearray | memoryview) -> Any:
        """The value that `encode` got.

        Memory stays within a constant times the size of `data`.

        Raises:
            CodecError: `data` is anything else; nothing was executed.
        """
        try:
            return self._unpack(_DECODER.decode(grow(data)), 0)
        except RecursionError as error:
            raise CodecError(f"cannot decode: nested deeper than {MAX_DEPTH} levels") from error
        except (WireError, *_FAILURES) as error:
            raise CodecError(f"cannot decode: {error}") from error

    def _pack(self, value: Any, depth: int) -> Any:
        cls = type(value)
        if cls in PRIMITIVES:
            return value
        if cls is list:
            return self._pack_all(value, depth)
        kind = self._by_type.get(cls)
        if kind is None:
            raise UnregisteredType(f"{_name(cls)} does not cross the wire")
        return {kind.tag: self._pack_all(kind.to_parts(value), depth)}

    def _pack_all(self, values: Parts, depth: int) -> Parts:
        if depth >= MAX_DEPTH:
            raise RecursionError
        if PRIMITIVES.issuperset(map(type, values)):  # long lists of ints are not walked
            return values
        depth += 1
        return [v if type(v) in PRIMITIVES else self._pack(v, depth) for v in values]

    def _unpack(self, node: Any, depth: int) -> Any:
        cls = type(node)
        if cls in PRIMITIVES:
            return node
        if cls is list:
            return self._unpack_all(node, depth)
        if cls is not dict or len(node) != 1:
            raise CodecError(f"a {cls.__name__} in place of a value")
        ((tag, parts),) = node.items()
        kind = self._by_tag.get(tag)
        if kind is None or type(parts) is not list:
            raise CodecError(f"no registered type under tag {tag!r:.40}")
        if kind.arity is not None and kind.arity != len(parts):
            raise CodecError(f"{_name(kind.cls)} has {kind.arity} parts, got {len(parts)}")
        return kind.from_parts(self._unpack_all(parts, depth))

    def _unpack_all(self, nodes: Parts, depth: int) -> Parts:
        if depth >= MAX_DEPTH:
            raise RecursionError
        if PRIMITIVES.issuperset(map(type, nodes)):
            return nodes
        depth += 1
        return [n if type(n) in PRIMITIVES else self._unpack(n, depth) for n in nodes]

    def _blame(self, value: Any, error: Exception) -> tuple[str, Exception]:
        """Path and error of the smallest part of `value` that fails by itself."""
        for label, child in self._children(value):
            try:
                _ENCODER.encode(self._pack(child, 0))
            except (CodecError, *_FAILURES) as cause:
                path, innermost = self._blame(child, cause)
                return label + path, innermost
        return "", error

    def _children(self, value: Any) -> list[tuple[str, Any]]:
        if type(value) is dict:
            keys = [(f".keys()[{i}]", key) for i, key in enumerate(value)]
            return keys + [(f"[{key!r:.40}]", item) for key, item in value.items()]
        if type(value) in (list, tuple, set, frozenset):
            return [(f"[{i}]", item) for i, item in enumerate(value)]
        kind = self._by_type.get(type(value))
        names = () if kind is None else kind.names
        return [(f".{name}", getattr(value, name)) for name in names if hasattr(value, name)]


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _field_getter(names: tuple[str, ...]) -> ToParts:
    return lambda value: [getattr(value, name) for name in names]


def _builder(names: tuple[str, ...], new: Callable[[], Any], put: Any) -> FromParts:
    """Sets declared fields on a bare instance, frozen or not."""

    def build(parts: Parts) -> Any:
        value = new()
        for name, part in zip(names, parts, strict=True):
            put(value, name, part)
        return value

    return build


def _checked(types: tuple[type, ...], from_parts: FromParts) -> FromParts:
    """Constructors believe their arguments: `bytearray(10**12)` is a terabyte of zeros."""

    def build(parts: Parts) -> Any:
        for part, wanted in zip(parts, types, strict=True):
            if wanted is not object and type(part) is not wanted:
                raise CodecError(f"a {type(part).__name__} in place of a {wanted.__name__}")
        return from_parts(parts)

    return build


def _enum_parts(member: Enum) -> Parts:
    return [member.name]


def _dict_parts(value: dict[Any, Any]) -> Parts:
    return [*value.keys(), *value.values()]


def _dict_from(parts: Parts) -> dict[Any, Any]:
    half = len(parts) // 2
    return dict(zip(parts[:half], parts[half:], strict=True))


def _array_parts(array: np.ndarray[Any, Any]) -> Parts:
    if array.dtype.str not in NUMPY_DTYPES:
        raise CodecError(f"numpy dtype {array.dtype} does not cross the wire")
    return [array.dtype.str, list(array.shape), array.tobytes()]


def _array_from(parts: Parts) -> np.ndarray[Any, Any]:
    """A writable array, which the bytes must fill exactly."""
    dtype, shape, data = parts
    if any(type(dim) is not int or dim < 0 for dim in shape):  # numpy works out what -1 stands for
        raise CodecError(f"{shape!r:.80} is not a shape")
    array: np.ndarray[Any, Any] = np.ndarray(shape, NUMPY_DTYPES[dtype], buffer=bytearray(data))
    if array.nbytes != len(data):
        raise CodecError(f"{len(data)} bytes for an array of {array.nbytes}")
    return array


def _fraction_parts(value: Fraction) -> Parts:
    return [value.numerator, value.denominator]


_BUILT_IN: Final = (
    _Kind(1, tuple, list, tuple),
    _Kind(2, set, list, set),
    _Kind(3, frozenset, list, frozenset),
    _Kind(4, dict, _dict_parts, _dict_from),
    _Kind(5, np.ndarray, _array_parts, _checked((str, list, bytes), _array_from), 3),
    _Kind(6, Fraction, _fraction_parts, _checked((int, int), lambda p: Fraction(*p)), 2),
)
