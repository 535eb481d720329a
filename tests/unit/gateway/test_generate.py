"""`POST /generate` over an application in memory that answers completions as vLLM does."""

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.gateway.asgi import Message, Receive, Scope, Send, respond
from molink.gateway.generate import GenerateMiddleware
from molink.gateway.generate_forms import FormError, SglangForm, VllmForm, read_form
from molink.gateway.http import MAX_BODY

WORDS = (" a", " b", " c")
"""What every prompt is continued with; token ids 10, 11, 12; logprobs -0.5, -1.5, -2.5."""

Json = dict[str, Any]


class Completions:
    """Stands for vLLM's application."""

    def __init__(self) -> None:
        self.body: Json = {}
        self.scope: Scope = {}
        self.refusal: tuple[int, bytes] | None = None
        self.breaks_off = False
        self.waits = False  # for the client to leave
        self.left = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        self.body = json.loads(message["body"] or b"{}")
        if self.refusal is not None:
            await respond(send, *self.refusal)
        elif not self.body:
            await respond(send, 400, b'{"error": "no body"}')
        elif self.waits:
            self.left = (await receive())["type"] == "http.disconnect"
            await respond(send, 200, b"null")
        elif self.body.get("stream"):
            await self._stream(send)
        else:
            choices = [self._choice(i, range(len(WORDS)), True) for i in range(self._count())]
            await respond(send, 200, json.dumps({"id": "cmpl-1", "choices": choices}).encode())

    def _count(self) -> int:
        prompt = self.body["prompt"]
        is_many = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return (len(prompt) if is_many else 1) * int(self.body["n"])

    def _choice(self, index: int, steps: range, is_last: bool) -> Json:
        choice: Json = {"index": index, "text": "".join(WORDS[step] for step in steps)}
        choice |= {"finish_reason": "length" if is_last else None, "stop_reason": None}
        if self.body.get("return_token_ids"):
            choice["token_ids"] = [10 + step for step in steps]
            choice["prompt_token_ids"] = [1, 2, 3] if steps.start == 0 else None
        if "logprobs" in self.body:
            candidates = [{f"token_id:{10 + s}": -0.5 - s, "token_id:7": -0.1} for s in steps]
            choice["logprobs"] = {
                "token_logprobs": [-0.5 - step for step in steps],
                "top_logprobs": candidates,
            }
        return choice

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        events = [
            {"id": "cmpl-1", "choices": [self._choice(i, range(step, step + 1), step == 2)]}
            for step in range(len(WORDS))
            for i in range(self._count())
        ]
        if self.breaks_off:
            events[1:] = [{"error": {"message": "a stage was lost", "code": 503}}]
        text = ": keep-alive\n\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        data = text.encode() + b"data: [DONE]\n\n"
        for start in range(0, len(data), 7):  # events are cut anywhere
            piece = {"body": data[start : start + 7], "more_body": True}
            await send({"type": "http.response.body", **piece})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.fixture
def vllm() -> Completions:
    return Completions()


async def post(vllm: Completions, body: Any, path: str = "/generate") -> httpx.Response:
    transport = httpx.ASGITransport(GenerateMiddleware(vllm))
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with httpx.AsyncClient(transport=transport, base_url="http://head") as http:
        return await http.post(path, content=content, headers={"Authorization": "Bearer key"})


def events_of(answer: httpx.Response) -> list[Any]:
    return [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n")[:-2]]


# vLLM's form


async def test_a_prompt_in_vllms_form(vllm: Completions) -> None:
    answer = await post(vllm, {"prompt": "San Francisco is a", "max_tokens": 20, "temperature": 0})
    assert answer.json() == {"text": ["San Francisco is a a b c"]}
    assert answer.headers["content-type"] == "application/json"
    assert vllm.body["prompt"] == "San Francisco is a"
    assert (vllm.body["max_tokens"], vllm.body["temperature"]) == (20, 0)


async def test_the_application_sees_a_completion_with_the_clients_headers(
    vllm: Completions,
) -> None:
    await post(vllm, {"prompt": "x"})
    headers = dict(vllm.scope["headers"])
    assert vllm.scope["path"] == "/v1/completions"
    assert vllm.scope["raw_path"] == b"/v1/completions"
    assert headers[b"authorization"] == b"Bearer key"
    assert headers[b"content-type"] == b"application/json"
    assert b"content-length" not in headers  # it is that of another body


async def test_defaults_are_the_originals_and_not_the_models(vllm: Completions) -> None:
    await post(vllm, {"prompt": "x"})
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_tokens": 16}
    penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert (defaults | penalties).items() <= vllm.body.items()
    await post(vllm, {"text": "x"})
    assert (defaults | penalties).items() <= vllm.body.items()
    await post(vllm, {"text": "x", "rid": None, "sampling_params": {"temperature": None}})
    assert (defaults | penalties).items() <= vllm.body.items()


async def test_several_prompts_and_several_outputs(vllm: Completions) -> None:
    answer = await post(vllm, {"prompt": ["x", "y"], "n": 2})
    assert answer.json() == {"text": ["x a b c", "x a b c", "y a b c", "y a b c"]}


async def test_a_stream_in_vllms_form_has_all_of_the_text_in_every_line(vllm: Completions) -> None:
    answer = await post(vllm, {"prompt": "x", "stream": True})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines == [{"text": [text]} for text in ("x a", "x a b", "x a b c")]


async def test_a_stream_of_several_outputs_has_all_of_them_in_every_line(
    vllm: Completions,
) -> None:
    answer = await post(vllm, {"prompt": "x", "n": 2, "stream": True})
    lines = [json.loads(line)["text"] for line in answer.text.splitlines()]
    assert lines[0] == ["x a", "x"]
    assert lines[-1] == ["x a b c", "x a b c"]


async def test_a_stream_in_vllms_form_that_breaks_off_says_so(vllm: Completions) -> None:
    vllm.breaks_off = True
    answer = await post(vllm, {"prompt": "x", "stream": True})
    last = json.loads(answer.text.splitlines()[-1])
    assert last["error"]["message"] == "a stage was lost"


# SGLang's form


async def test_a_text_in_sglangs_form(vllm: Completions) -> None:
    sampling = {"max_new_tokens": 16, "temperature": 0}
    answer = await post(vllm, {"text": "Once upon a time,", "sampling_params": sampling})
    assert answer.json() == {
        "text": " a b c",
        "output_ids": [10, 11, 12],
        "meta_info": {
            "id": "cmpl-1",
            "finish_reason": {"type": "length", "length": 3},
            "prompt_tokens": 3,
            "completion_tokens": 3,
        },
    }
    assert (vllm.body["max_tokens"], vllm.body["temperature"]) == (16, 0)


@pytest.mark.parametrize(
    ("request_body", "count"),
    [
        ({"text": ["x"]}, 1),
        ({"text": ["x", "y"]}, 2),
        ({"text": "x", "sampling_params": {"n": 2}}, 2),
        ({"input_ids": [[1, 2], [3]]}, 2),
    ],
)
async def test_several_texts_give_a_list(vllm: Completions, request_body: Json, count: int) -> None:
    answer = (await post(vllm, request_body)).json()
    assert [output["text"] for output in answer] == [" a b c"] * count


async def test_token_ids_instead_of_a_text(vllm: Completions) -> None:
    answer = (await post(vllm, {"input_ids": [1, 2, 3], "rid": "mine"})).json()
    assert vllm.body["prompt"] == [1, 2, 3]
    assert answer["meta_info"]["id"] == "mine"


async def test_a_stream_in_sglangs_form(vllm: Completions) -> None:
    answer = await post(vllm, {"text": "x", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    events = events_of(answer)
    assert [event["text"] for event in events] == [" a", " a b", " a b c"]
    assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 2, 3]
    assert {event["meta_info"]["prompt_tokens"] for event in events} == {3}
    reasons = [event["meta_info"]["finish_reason"] for event in events]
    assert reasons == [None, None, {"type": "length", "length": 3}]


async def test_a_stream_of_several_texts_names_the_index(vllm: Completions) -> None:
    events = events_of(await post(vllm, {"text": ["x", "y"], "stream": True}))
    assert [event["index"] for event in events] == [0, 1] * 3


async def test_a_stream_in_sglangs_form_that_breaks_off_says_so(vllm: Completions) -> None:
    vllm.breaks_off = True
    events = events_of(await post(vllm, {"text": "x", "stream": True}))
    assert events[-1]["error"]["message"] == "a stage was lost"


@pytest.mark.parametrize("stream", [True, False])
async def test_logprobs_are_of_the_output_with_token_ids(vllm: Completions, stream: bool) -> None:
    body = {"text": "x", "return_logprob": True, "top_logprobs_num": 1, "stream": stream}
    answer = await post(vllm, body)
    meta = (events_of(answer)[-1] if stream else answer.json())["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, 10, None], [-1.5, 11, None], [-2.5, 12, None]]
    assert meta["output_top_logprobs"] == [[[-0.1, 7, None]]] * 3


async def test_sglangs_names_become_vllms(vllm: Completions) -> None:
    sampling = {"min_new_tokens": 2, "sampling_seed": 5, "no_stop_trim": True, "regex": "a+"}
    await post(vllm, {"text": "x", "sampling_params": sampling})
    expected = {"min_tokens": 2, "seed": 5, "include_stop_str_in_output": True}
    assert expected.items() <= vllm.body.items()
    assert vllm.body["structured_outputs"] == {"regex": "a+"}


# What cannot be answered


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"[]", "Expected `object`"),
        (b'{"prompt": "\xff"}', ""),
        (b"[" * 100_000, ""),
        (b'{"a": ' + b"[" * 100_000, "recursion"),
        ({}, "give a `prompt`"),
        ({"max_tokens": 5}, "give a `prompt`"),
        ({"prompt": 5}, "$.prompt"),
        ({"prompt": []}, "$.prompt"),
        ({"prompt": "x", "max_tokens": "many"}, "$.max_tokens"),
        ({"prompt": "x", "frobnicate": 1}, "unknown field `frobnicate`"),
        ({"prompt": "x", "n": 0}, "$.n"),
        ({"prompt": ["x", "y"], "stream": True}, "`stream` takes one prompt"),
        ({"text": "x", "input_ids": [1]}, "either `text` or `input_ids`"),
        ({"text": None}, "give a `prompt`"),
        ({"text": "x", "prompt": "y"}, "unknown field `prompt`"),
        ({"text": "x", "max_tokens": 5}, "unknown field `max_tokens`"),
        ({"text": "x", "sampling_params": {"max_tokens": 5}}, "$.sampling_params"),
        ({"text": "x", "sampling_params": {"regex": "a", "ebnf": "b"}}, "exclude one another"),
    ],
)
async def test_400_that_names_what_is_wrong(vllm: Completions, body: Any, words: str) -> None:
    answer = await post(vllm, body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert not vllm.body


async def test_vllm_asks_for_its_key_here_too(vllm: Completions) -> None:
    """Its own stack with our middleware as `molink serve` names it."""
    from fastapi import FastAPI
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    middleware = f"{GenerateMiddleware.__module__}.{GenerateMiddleware.__qualname__}"
    flags = ["--api-key=key", f"--middleware={middleware}"]
    app = FastAPI()
    app.mount("/", vllm)
    init_entrypoints_middleware(
        make_arg_parser(FlexibleArgumentParser()).parse_args(flags), app, ()
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://head") as http:
        answers = [
            await http.post("/generate", json={"prompt": "x"}, headers={"Authorization": value})
            for value in ("", "Bearer wrong", "Bearer key")
        ]
    assert [answer.status_code for answer in answers] == [401, 401, 200]
    assert answers[2].json() == {"text": ["x a b c"]}


async def test_a_body_has_a_bound(vllm: Completions) -> None:
    answer = await post(vllm, b" " * (MAX_BODY + 1))
    assert answer.status_code == 413
    assert not vllm.body


async def test_a_body_is_not_read_before_the_application_asks_for_it() -> None:
    """Whoever has no key costs no memory."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, 401, b'{"error": "Unauthorized"}')

    async def receive() -> Message:
        raise AssertionError("somebody reads")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    await GenerateMiddleware(refuse)(scope, receive, send)
    assert [message.get("status") for message in sent] == [401, None]


@pytest.mark.parametrize("status", [400, 401, 404, 500, 503])
@pytest.mark.parametrize("body", [{"prompt": "x"}, {"text": "x", "stream": True}])
async def test_the_applications_own_refusal_passes_as_it_is(
    vllm: Completions, status: int, body: Json
) -> None:
    vllm.refusal = (status, b'{"error": "its own words"}')
    answer = await post(vllm, body)
    assert (answer.status_code, answer.json()) == (status, {"error": "its own words"})


@pytest.mark.parametrize("path", ["/v1/completions", "/generate/x", "/health"])
async def test_other_paths_are_passed_on(vllm: Completions, path: str) -> None:
    vllm.refusal = (200, b"{}")
    assert (await post(vllm, {"a": 1}, path)).status_code == 200
    assert (vllm.scope["path"], vllm.body) == (path, {"a": 1})


async def test_a_client_that_leaves_is_seen_by_the_application(vllm: Completions) -> None:
    vllm.waits = True
    messages: asyncio.Queue[Message] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": b'{"prompt": "x"}', "more_body": False})
    messages.put_nowait({"type": "http.disconnect"})
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    await GenerateMiddleware(vllm)(scope, messages.get, send)
    assert vllm.left


async def test_a_client_that_leaves_before_its_request_is_whole(vllm: Completions) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError("nobody listens")

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    await GenerateMiddleware(vllm)(scope, receive, send)
    assert not vllm.body


names = st.sampled_from([*VllmForm.__struct_fields__, *SglangForm.__struct_fields__])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
)
bodies = st.dictionaries(names, values, max_size=4).map(json.dumps).map(str.encode)


@settings(deadline=None)
@given(st.binary(max_size=50) | bodies)
def test_any_body_is_refused_or_becomes_a_completion(body: bytes) -> None:
    with contextlib.suppress(FormError):
        completion = read_form(body).completion()
        assert completion["prompt"] is not None
        json.dumps(completion)
