"""Stop strings that belong to a chat template: added to every `/v1/chat/completions`.

vLLM knows no default for `stop`. A string that is one token of the model's vocabulary is added as a
token too: vLLM leaves special tokens out of the text, where a string would look for them in vain.
"""

import asyncio
import json
import os
from typing import Any

import msgspec

from molink.gateway.asgi import (
    Application,
    Message,
    Receive,
    Scope,
    Send,
    is_post,
    request_with,
    with_body,
)

STOP_VARIABLE = "MOLINK_CHAT_STOP"  # JSON list of strings
CHAT_PATH = "/v1/chat/completions"
TOKENIZE_PATH = "/tokenize"


class ChatStopMiddleware:
    """ASGI; vLLM takes it with `--middleware molink.gateway.chat_stop.ChatStopMiddleware`."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._stop: list[str] = json.loads(os.environ[STOP_VARIABLE])
        self._token_ids: list[int] | None = None  # until the first chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_post(scope, CHAT_PATH):
            await self._app(scope, receive, send)
            return

        async def change(body: bytes) -> tuple[bytes, Send]:
            if self._token_ids is None:
                self._token_ids = await self._find_tokens(scope)
            return _with_stop(body, self._stop, self._token_ids or []), send

        channel = with_body(receive, send, change)
        await self._app(request_with(scope, CHAT_PATH), *channel)

    async def _find_tokens(self, scope: Scope) -> list[int] | None:
        """Ids of the strings that are one token; None if the tokenizer does not answer now."""
        found = []
        for text in self._stop:
            tokens = await self._tokenize(scope, text)
            if tokens is None:
                return None
            found += tokens if len(tokens) == 1 else []
        return found

    async def _tokenize(self, scope: Scope, text: str) -> list[int] | None:
        body = msgspec.json.encode({"prompt": text, "add_special_tokens": False})
        answer = bytearray()
        status = 0

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            answer.extend(message.get("body", b""))

        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            return next(messages, None) or await _stay()

        await self._app(request_with(scope, TOKENIZE_PATH), receive, send)
        if status != 200:
            return None
        tokens: list[int] = msgspec.json.decode(answer)["tokens"]
        return tokens


async def _stay() -> Message:
    """A client that does not leave."""
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


def _with_stop(body: bytes, stop: list[str], token_ids: list[int]) -> bytes:
    """The body with stop strings and tokens added; as it was if vLLM should refuse it itself."""
    try:
        request: dict[str, Any] = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body
    own_stop = request.get("stop") or []
    own_stop = [own_stop] if isinstance(own_stop, str) else own_stop
    own_ids = request.get("stop_token_ids") or []
    if not isinstance(own_stop, list) or not isinstance(own_ids, list):
        return body
    request |= {"stop": [*own_stop, *stop], "stop_token_ids": [*own_ids, *token_ids]}
    return msgspec.json.encode(request)
