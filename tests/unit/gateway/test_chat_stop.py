"""A chat template's stop strings, over an application in memory."""

import json
from typing import Any

import httpx
import pytest

from molink.gateway.asgi import Receive, Scope, Send, respond
from molink.gateway.chat_stop import STOP_VARIABLE, ChatStopMiddleware

TOKENS = {"<|im_end|>": [7], "<|im_start|>": [8], "###": [3, 3]}

Json = dict[str, Any]


class Chats:
    """Stands for vLLM's application: notes chats, and knows a few tokens."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.tokenized = 0
        self.tokenizes = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        if scope["path"] != "/tokenize":
            self.bodies.append(body)
            await respond(send, 200, b"{}")
        elif self.tokenizes:
            self.tokenized += 1
            assert body["add_special_tokens"] is False
            answer = json.dumps({"tokens": TOKENS[body["prompt"]]})
            await respond(send, 200, answer.encode())
        else:
            await respond(send, 503, b"{}")


@pytest.fixture
def vllm() -> Chats:
    return Chats()


@pytest.fixture
def http(vllm: Chats, monkeypatch: pytest.MonkeyPatch) -> httpx.AsyncClient:
    monkeypatch.setenv(STOP_VARIABLE, json.dumps(list(TOKENS)))
    transport = httpx.ASGITransport(ChatStopMiddleware(vllm))
    return httpx.AsyncClient(transport=transport, base_url="http://head")


async def chat(http: httpx.AsyncClient, body: Any) -> None:
    await http.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize(
    ("body", "stop", "ids"),
    [
        ({}, [], []),
        ({"stop": "x"}, ["x"], []),
        ({"stop": ["x", "y"], "stop_token_ids": [1]}, ["x", "y"], [1]),
        ({"stop": None, "stop_token_ids": None}, [], []),
    ],
)
async def test_stops_are_added_to_those_of_the_request(
    http: httpx.AsyncClient, vllm: Chats, body: Json, stop: list[str], ids: list[int]
) -> None:
    await chat(http, {"messages": [], **body})
    (seen,) = vllm.bodies
    assert seen["stop"] == [*stop, *TOKENS]
    assert seen["stop_token_ids"] == [*ids, 7, 8]
    assert seen["messages"] == []


async def test_tokens_are_looked_up_once(http: httpx.AsyncClient, vllm: Chats) -> None:
    await chat(http, {})
    await chat(http, {})
    assert vllm.tokenized == len(TOKENS)


async def test_a_tokenizer_that_does_not_answer_is_asked_again(
    http: httpx.AsyncClient, vllm: Chats
) -> None:
    vllm.tokenizes = False
    await chat(http, {})
    vllm.tokenizes = True
    await chat(http, {})
    assert [body["stop_token_ids"] for body in vllm.bodies] == [[], [7, 8]]


@pytest.mark.parametrize("body", [[], "x", {"stop": 5}, {"stop_token_ids": "many"}])
async def test_what_vllm_refuses_reaches_it_as_it_is(
    http: httpx.AsyncClient, vllm: Chats, body: Any
) -> None:
    await chat(http, body)
    assert vllm.bodies == [body]


async def test_completions_keep_their_own_stops(http: httpx.AsyncClient, vllm: Chats) -> None:
    await http.post("/v1/completions", json={"prompt": "x"})
    assert vllm.bodies == [{"prompt": "x"}]
