"""Control messages: each comes back as it was, and nothing else gets in."""

import types
from contextlib import suppress
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.errors import WireError
from molink.wire import to_agent, to_engine, to_head, to_stage
from molink.wire.to_stage import WORKER_CALLS, WireDtype, WireFormat, WireSum

quick = settings(deadline=None, max_examples=15)

PRIMITIVES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    bytes: st.binary(max_size=20),
    types.NoneType: st.none(),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if hint in PRIMITIVES:
        return PRIMITIVES[hint]
    if get_origin(hint) is list:
        return st.lists(values(get_args(hint)[0]), max_size=3)
    if get_origin(hint) is dict:
        return st.dictionaries(*map(values, get_args(hint)), max_size=3)
    if get_origin(hint) is Annotated:
        base, meta = get_args(hint)
        return bounded(base, meta)
    if get_origin(hint) in (types.UnionType, Union):
        return st.one_of([values(member) for member in get_args(hint)])
    fields = get_type_hints(hint, include_extras=True)
    return st.builds(hint, **{name: values(field) for name, field in fields.items()})


def bounded(base: Any, meta: msgspec.Meta) -> st.SearchStrategy[Any]:
    if get_origin(base) is list:
        return st.lists(values(get_args(base)[0]), max_size=meta.max_length)
    if base is str:
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=meta.max_length)
    numbers = st.integers if base is int else st.floats
    return numbers(meta.ge, meta.le)


RECEIVERS = [
    (to_agent, to_agent.ToAgent),
    (to_head, to_head.ToHead),
    (to_engine, to_engine.ToEngine),
    (to_stage, to_stage.LinkRates),
]
MESSAGES = [(module, cls) for module, union in RECEIVERS for cls in get_args(union) or [union]]
modules = st.sampled_from([module for module, _ in RECEIVERS])


@pytest.mark.parametrize(("module", "cls"), MESSAGES)
@quick
@given(draw=st.data())
def test_a_message_comes_back_if_it_is_whole(module: Any, cls: type, draw: st.DataObject) -> None:
    message = draw.draw(values(cls))
    payload = module.encode(message)
    back = module.decode(bytearray(payload))
    assert type(back) is cls
    assert back == message
    with pytest.raises(WireError):
        module.decode(payload[: draw.draw(st.integers(0, len(payload) - 1))])


@given(case=st.sampled_from(MESSAGES), draw=st.data())
def test_a_damaged_message_is_a_message_or_a_wire_error(
    case: tuple[Any, type], draw: st.DataObject
) -> None:
    module, cls = case
    payload = bytearray(module.encode(draw.draw(values(cls))))
    payload[draw.draw(st.integers(0, len(payload) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    with suppress(WireError):
        assert type(module.decode(payload)) in [cls for m, cls in MESSAGES if m is module]


@given(module=modules, data=st.binary(max_size=200))
def test_foreign_bytes_are_a_wire_error(module: Any, data: bytes) -> None:
    with pytest.raises(WireError):
        module.decode(data)


@pytest.mark.parametrize(
    "payload",
    [
        msgspec.msgpack.encode({"type": "EngineFailed", "is_usage": 1.0})[:-9] + b"\x91" * 99_999,
        b"\x82\xa4type\xa5Probe\xa1x" + b"\x91" * 99_999,  # an unknown field nested without end
        b"\x82\xa4type\xa4\xffing\xa7sent_at\x01",  # a tag that is not UTF-8
        b"\xdf\xff\xff\xff\xff",  # a map of four thousand million fields
    ],
)
def test_ways_to_trouble_a_decoder(payload: bytes) -> None:
    for module, _ in RECEIVERS:
        with pytest.raises(WireError, match="unreadable"):
            module.decode(payload)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (to_agent, to_head.LinkLost(3, "cut")),
        (to_head, to_agent.Shutdown("over")),
        (to_engine, to_agent.Probe()),
        (to_agent, to_engine.PipelineDown("lost")),
        (to_stage, to_engine.PipelineDown("lost")),
    ],
)
def test_what_is_meant_for_another_receiver_is_refused(module: Any, message: Any) -> None:
    with pytest.raises(WireError):
        module.decode(msgspec.msgpack.encode(message))


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf"), "fast"])
def test_a_rate_is_a_finite_number(rate: Any) -> None:
    for module, message in (
        (to_stage, {"type": "LinkRates", "bytes_per_s": {1: rate}}),
        (
            to_engine,
            {"type": "PathMeasured", "epoch": 1, "hops": [{"bytes_per_s": rate, "rtt_s": 0.0}]},
        ),
    ):
        with pytest.raises(WireError):
            module.decode(msgspec.msgpack.encode(message))


@quick
@given(request=values(to_head.EnrollRequest), reply=values(to_head.EnrollReply))
def test_enrolment_comes_back(request: to_head.EnrollRequest, reply: to_head.EnrollReply) -> None:
    for message in (request, reply):
        payload = msgspec.msgpack.encode(message)
        assert msgspec.msgpack.decode(payload, type=type(message)) == message


def test_a_stage_answers_public_methods_only() -> None:
    assert all(name.isidentifier() and not name.startswith("_") for name in WORKER_CALLS)
    assert not {"load_model", "execute_model", "apply_model"} & WORKER_CALLS


@pytest.mark.parametrize(
    ("choice", "wire_dtype", "dtype", "expected"),
    [
        ("auto", "auto", "float32", True),  # exact
        ("auto", "auto", "bfloat16", False),
        ("auto", "auto", "float16", False),
        ("auto", "int8", "bfloat16", True),  # rounded anyway
        ("auto", "fp8", "float16", True),
        ("on", "auto", "bfloat16", True),
        ("off", "fp8", "float32", False),
    ],
)
def test_when_a_sum_is_wanted(
    choice: WireSum, wire_dtype: WireDtype, dtype: str, expected: bool
) -> None:
    wire = WireFormat(sum=choice, dtype=wire_dtype)
    assert wire.wants_sum(dtype) == expected
    assert WireFormat.from_json(wire.to_json()) == wire
    assert wire.may_code_sum(dtype) == (choice == wire_dtype == "auto" and dtype != "float32")
