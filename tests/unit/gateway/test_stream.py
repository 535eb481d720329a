"""Streams that go from engine to engine: the client sees what one engine alone would have said."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.gateway.generation import Generation, priority_of
from molink.gateway.stream import DivergedError, Stream, StreamBrokenError
from molink.wire.delivered import key_of

LETTERS = "äbcdefgh"
DONE = b"data: [DONE]\n\n"
Tokens = list[int]


def event(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return b"data: " + text.encode() + b"\n\n"


class Engine:
    """Writes events as vLLM does. Token 0 shows nothing until another one follows it."""

    def __init__(
        self, choices: list[Tokens], *, chat: bool, ids: bool = True, logprobs: bool = False
    ) -> None:
        self.choices = choices
        self.chat = chat
        self.ids = ids
        self.logprobs = logprobs

    def says(self, name: str, has: dict[str, Tokens] | None = None) -> list[bytes]:
        """All events; first the tokens that the client has from an engine before."""
        self.head = {"id": name, "object": "o", "created": len(name), "model": 'a ,"model"'}
        self.at = [0] * len(self.choices)
        events = [self.role(i) for i in range(len(self.choices))] if self.chat else []
        for index in range(len(self.choices)):
            if again := (has or {}).get(key_of(0, index)):
                assert again == self.choices[index][: len(again)]
                events.append(self.piece(index, len(again)))
        while any(at < len(tokens) for at, tokens in zip(self.at, self.choices, strict=True)):
            events += [
                self.piece(index, 1)
                for index, tokens in enumerate(self.choices)
                if self.at[index] < len(tokens)
            ]
        return [*events, event(self.head | {"choices": [], "usage": {"total_tokens": 7}}), DONE]

    def role(self, index: int) -> bytes:
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        more = {"prompt_token_ids": [1, 2] if self.ids else None}
        return event(self.head | {"choices": [choice | {"finish_reason": None}]} | more)

    def piece(self, index: int, count: int) -> bytes:
        before, self.at[index] = self.at[index], self.at[index] + count
        tokens = self.choices[index]
        new = tokens[before : self.at[index]]
        text = shown(tokens[: self.at[index]]).removeprefix(shown(tokens[:before]))
        choice: dict[str, Any] = {"index": index}
        choice |= {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        choice["logprobs"] = {"content": [{"token": t} for t in new]} if self.logprobs else None
        choice["finish_reason"] = "stop" if self.at[index] == len(tokens) else None
        choice["token_ids"] = new if self.ids else None
        if not self.chat:
            choice["prompt_token_ids"] = [1, 2] if self.ids and before == 0 else None
        return event(self.head | {"choices": [choice]})


def shown(tokens: Tokens) -> str:
    while tokens and tokens[-1] == 0:
        tokens = tokens[:-1]
    return "".join(LETTERS[token] for token in tokens)


def answers(data: bytes) -> list[dict[str, Any]]:
    events = data.removesuffix(DONE).split(b"\n\n")
    return [json.loads(e.removeprefix(b"data: ")) for e in events if e]


def joined(data: bytes) -> list[Any]:
    """What a client makes of a stream: of each choice its text, tokens, logprobs and end."""
    found: dict[int, list[Any]] = {}
    for answer in answers(data):
        for choice in answer["choices"]:
            of_choice = found.setdefault(choice["index"], ["", [], [], [], 0])
            delta = choice.get("delta", {})
            of_choice[0] += choice.get("text") or delta.get("content") or ""
            of_choice[1] += choice["token_ids"] or [] if "token_ids" in choice else []
            of_choice[2] += (choice["logprobs"] or {"content": []})["content"]
            of_choice[3] += [choice["finish_reason"]] if choice["finish_reason"] else []
            of_choice[4] += "role" in delta
    return [found[index] for index in sorted(found)]


choices_of = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=8), min_size=1, max_size=3)


@given(choices_of, st.booleans(), st.lists(st.integers(0, 400), max_size=6))
def test_an_undisturbed_stream_is_what_the_engine_says_unasked_for_tokens(
    choices: list[Tokens], chat: bool, cuts: list[int]
) -> None:
    data = b"".join(Engine(choices, chat=chat).says("id-1"))
    plain = Engine(choices, chat=chat, ids=False).says("id-1")
    if chat:  # vLLM says nothing where there is nothing but tokens
        plain = [e for e in plain if b'"delta":{}' not in e or b'"stop"' in e]
    stream = Stream(len(choices), shows_ids=False)
    assert pieces(stream, data, cuts).replace(b',"prompt_token_ids":null', b"") == b"".join(
        plain
    ).replace(b',"prompt_token_ids":null', b"")
    assert stream.is_done
    assert stream.num_tokens == sum(map(len, choices))


def pieces(stream: Stream, data: bytes, cuts: list[int]) -> bytes:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return b"".join(stream.pass_on(data[a:b]) for a, b in pairwise(places))


@given(
    choices_of,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 2000), st.booleans()), min_size=1, max_size=4),
)
def test_a_stream_of_many_engines_is_that_of_one(
    choices: list[Tokens],
    chat: bool,
    shows_ids: bool,
    logprobs: bool,
    losses: list[tuple[int, bool]],
) -> None:
    engine = Engine(choices, chat=chat, logprobs=logprobs)
    whole = b"".join(engine.says("id-1"))
    expected = joined(Stream(len(choices), shows_ids=shows_ids).pass_on(whole))
    stream = Stream(len(choices), shows_ids=shows_ids)
    received, has = b"", {}
    for number, (length, merges) in enumerate(losses):
        said = said_by(engine, f"id-{number + 1}", has, merges=merges)
        received += stream.pass_on(said[:length])
        if stream.is_done:
            break
        stream.begin_again()
        has = stream.delivered()
    else:
        received += stream.pass_on(said_by(engine, "last", has, merges=False))
    assert joined(received) == expected
    assert stream.is_done
    assert {answer["id"] for answer in answers(received)} == {answers(received)[0]["id"]}
    assert len({answer["created"] for answer in answers(received)}) == 1


def said_by(engine: Engine, name: str, has: dict[str, Tokens], *, merges: bool) -> bytes:
    """A slow client's server puts what was said again and the next token into one event."""
    if merges:
        has = {key: tokens for key, tokens in has.items() if key != key_of(0, 0)}
    return b"".join(engine.says(name, has))


def test_tools_are_named_once_and_their_arguments_go_on() -> None:
    def call(*calls: dict[str, Any], ids: Tokens) -> bytes:
        delta = {"tool_calls": list(calls)} if calls else {}
        choice = {"index": 0, "delta": delta, "finish_reason": None, "token_ids": ids}
        return event({"id": "x", "choices": [choice]})

    def named(name: str) -> dict[str, Any]:
        return {"index": 0, "id": name, "type": "function", "function": {"name": "f"}}

    def more(arguments: str) -> dict[str, Any]:
        return {"index": 0, "function": {"arguments": arguments}}

    stream = Stream(1, shows_ids=False)
    first = stream.pass_on(call(named("call-1"), ids=[1]) + call(more('{"a'), ids=[2]))
    assert stream.can_go_on
    stream.begin_again()
    merged = named("call-2") | {"function": {"name": "f", "arguments": '{"a": 1'}}
    second = stream.pass_on(call(merged, ids=[1, 2, 3]) + call(more("}"), ids=[4]))
    calls = [
        found
        for answer in answers(first + second)
        for found in answer["choices"][0]["delta"]["tool_calls"]
    ]
    assert [found.get("id") for found in calls] == ["call-1", None, None, None]
    arguments = [found["function"].get("arguments", "") for found in calls]
    assert "".join(arguments) == '{"a": 1}'


def test_a_parser_that_says_something_else_for_the_same_tokens_is_found_out() -> None:
    def chunk(text: str, ids: Tokens) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, "token_ids": ids}
        return event({"id": "x", "choices": [choice]})

    stream = Stream(1, shows_ids=False)
    stream.pass_on(chunk("let", [1]) + chunk(" me", [2]))
    stream.begin_again()
    assert stream.pass_on(chunk("letink me", [1, 2])) == b""
    assert isinstance(stream.failure, DivergedError)


def test_an_engine_that_says_other_tokens_is_found_out() -> None:
    stream = Stream(1, shows_ids=False)
    stream.pass_on(b"".join(Engine([[1, 2, 3, 4]], chat=False).says("a")[:2]))
    stream.begin_again()
    stream.pass_on(b"".join(Engine([[1, 5, 3, 4]], chat=False).says("b")))
    assert isinstance(stream.failure, DivergedError)


def test_a_failure_is_not_passed_on_as_the_engine_says_it() -> None:
    stream = Stream(1, shows_ids=False)
    before = Engine([[1, 2]], chat=False).says("a")[0]
    shown = stream.pass_on(before + b'data: {"error": {"message": "no", "code": 500}}\n\n')
    assert joined(shown)[0][0] == "b"
    assert isinstance(stream.failure, StreamBrokenError)
    assert json.loads(stream.failure.error)["message"] == "no"


def test_what_an_ending_engine_gives_up_has_not_finished() -> None:
    stream = Stream(1, shows_ids=False)
    choice = {"index": 0, "text": "", "token_ids": [], "finish_reason": "abort"}
    assert stream.pass_on(event({"id": "x", "choices": [choice]})) == b""
    assert isinstance(stream.failure, StreamBrokenError)
    stream.begin_again()
    assert stream.failure is None
    assert stream.can_go_on


def test_text_whose_tokens_are_not_known_cannot_go_on() -> None:
    stream = Stream(1, shows_ids=False)
    stream.pass_on(Engine([[1, 2]], chat=False, ids=False).says("a")[0])
    assert not stream.can_go_on


def test_what_is_no_completion_passes_and_cannot_go_on() -> None:
    stream = Stream(1, shows_ids=False)
    assert stream.pass_on(b": alive\n\ndata: {nonsense\n\n") == b": alive\n\ndata: {nonsense\n\n"
    assert not stream.can_go_on


def test_an_event_without_an_end_is_not_kept_for_ever() -> None:
    stream = Stream(1, shows_ids=False)
    assert stream.pass_on(b"data: " + bytes(15 << 20)) == b""
    stream.pass_on(bytes(2 << 20))
    assert isinstance(stream.failure, StreamBrokenError)


# --- requests


def test_the_engine_is_asked_for_tokens() -> None:
    generation = Generation.read("/v1/completions", b'{"prompt": "x", "stream": true}')
    assert generation is not None
    assert json.loads(generation.body) == {"prompt": "x", "stream": True, "return_token_ids": True}


@pytest.mark.parametrize(
    "body",
    [b'{"stream": true, "return_token_ids": true}', b'{"stream": true, "echo": true}'],
)
def test_a_request_that_may_not_be_changed_is_sent_as_it_is(body: bytes) -> None:
    generation = Generation.read("/v1/completions", body)
    assert generation is not None
    assert generation.body == body


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b"{}"),
        ("/v1/completions", b'{"stream": false}'),
        ("/v1/completions", b'{"stream": "yes"}'),
        ("/v1/completions", b'{"stream": true'),
        ("/v1/completions", b"[1]"),
        ("/v1/completions", b"\xff"),
        ("/v1/completions", b'{"a": ' * 100_000),
        ("/v1/embeddings", b'{"stream": true}'),
    ],
)
def test_what_is_no_stream_of_completions_is_left_alone(path: str, body: bytes) -> None:
    assert Generation.read(path, body) is None


def test_the_rest_is_asked_for_with_what_the_client_has() -> None:
    body = b'{"stream": true, "prompt": ["a", "b"], "n": 2, "vllm_xargs": {"k": 1}}'
    generation = Generation.read("/v1/completions", body)
    assert generation is not None
    choice = {"index": 3, "text": "b", "token_ids": [1], "finish_reason": None}
    generation.stream.pass_on(event({"id": "x", "choices": [choice]}))
    asked = json.loads(generation.rest())
    assert asked["vllm_xargs"] == {"k": 1, key_of(1, 1): [1]}
    assert asked["prompt"] == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "priority"),
    [
        (b'{"priority": -5}', -5),
        (b'{"prompt": "x"}', 0),
        (b'{"priority": "high"}', 0),
        (b'{"priority"', 0),
    ],
)
def test_how_urgent_a_request_is(body: bytes, priority: int) -> None:
    assert priority_of(body) == priority
