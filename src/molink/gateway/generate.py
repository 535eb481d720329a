"""`POST /generate`: answered by `/v1/completions` of the application around which this is put.

Pure ASGI; vLLM takes it with `--middleware molink.gateway.generate.GenerateMiddleware`. Keys are
checked by the application itself, which sees a completion with the client's own headers.
"""

from typing import Any

import msgspec

from molink.gateway.asgi import (
    Application,
    Message,
    Receive,
    Scope,
    Send,
    headers_for,
    is_post,
    request_with,
    with_body,
)
from molink.gateway.generate_forms import Form, FormError, Outputs, read_form
from molink.gateway.http import Refusal

PATH = "/generate"
COMPLETIONS_PATH = "/v1/completions"


class GenerateMiddleware:
    """ASGI: serves `/generate` in both forms of `generate_forms`; passes on everything else."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_post(scope, PATH):
            await self._app(scope, receive, send)
            return

        async def change(body: bytes) -> tuple[bytes, Send]:
            try:
                form = read_form(body)
            except FormError as error:
                raise Refusal(400, "BadRequestError", str(error)) from error
            return msgspec.json.encode(form.completion()), _Translation(form, send).send

        channel = with_body(receive, send, change)
        await self._app(request_with(scope, COMPLETIONS_PATH), *channel)


class _Translation:
    """Turns the application's answer into the form's; an error passes as it is."""

    def __init__(self, form: Form, send: Send) -> None:
        self._form = form
        self._send = send
        self._passes = False
        self._received = bytearray()  # what is not translated yet
        self._outputs: Outputs | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._passes = message["status"] != 200
            await self._send(message if self._passes else self._start(message))
        elif message["type"] != "http.response.body" or self._passes:
            await self._send(message)
        else:
            self._received += message.get("body", b"")
            more = message.get("more_body", False)
            translated = self._events() if self._form.stream else self._whole(more)
            await self._send({**message, "body": translated})

    def _start(self, message: Message) -> Message:
        self._outputs = self._form.outputs()  # not before the application has accepted their number
        kind = self._form.media_type if self._form.stream else b"application/json"
        return {**message, "headers": headers_for(message.get("headers", ()), kind)}

    def _whole(self, more: bool) -> bytes:
        assert self._outputs is not None
        answer = None if more else msgspec.json.decode(self._received)
        if answer is None:  # or vLLM's last word to a client that went away
            return b""
        self._outputs.extend(answer)
        return msgspec.json.encode(self._form.whole(self._outputs))

    def _events(self) -> bytes:
        *events, rest = bytes(self._received).split(b"\n\n")
        self._received = bytearray(rest)
        return b"".join(self._event(event) for event in events)

    def _event(self, event: bytes) -> bytes:
        assert self._outputs is not None
        if not event.startswith(b"data: "):
            return b""  # a comment that keeps the connection alive
        data = event.removeprefix(b"data: ")
        if data == b"[DONE]":
            return self._form.stream_end
        answer: dict[str, Any] = msgspec.json.decode(data)
        if "error" in answer:
            return self._form.trouble(answer["error"])
        changed = self._outputs.extend(answer)
        return b"".join(self._form.piece(self._outputs, index) for index in changed)
