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
    Refusal,
    Scope,
    Send,
    headers_for,
    is_post,
    request_with,
    with_body,
)
from molink.gateway.generate_forms import Form, FormError, Outputs, read_form

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
        translation = _Translation(send)
        channel = with_body(receive, send, translation.completion, translation.send)
        await self._app(request_with(scope, COMPLETIONS_PATH), *channel)


class _Translation:
    """Turns the request's form into a completion, and the application's answer into that form.

    An error passes as it is; one may come before the application has asked for the body.
    """

    def __init__(self, send: Send) -> None:
        self._form: Form | None = None
        self._send = send
        self._passes = False
        self._received = bytearray()  # what is not translated yet
        self._outputs: Outputs | None = None

    async def completion(self, body: bytes) -> bytes:
        """The body of `/v1/completions`. Raises Refusal."""
        try:
            self._form = read_form(body)
        except FormError as error:
            raise Refusal(400, "BadRequestError", str(error)) from error
        return msgspec.json.encode(self._form.completion())

    async def send(self, message: Message) -> None:
        """Take what the application sends."""
        if message["type"] == "http.response.start":
            self._passes = message["status"] != 200
            await self._send(message if self._passes else self._start(message))
        elif message["type"] != "http.response.body" or self._passes:
            await self._send(message)
        else:
            self._received += message.get("body", b"")
            more = message.get("more_body", False)
            form = self._checked_form()
            translated = self._events(form) if form.stream else self._whole(form, more)
            await self._send({**message, "body": translated})

    def _start(self, message: Message) -> Message:
        form = self._checked_form()
        self._outputs = form.outputs()  # not before the application has accepted their number
        kind = form.media_type if form.stream else b"application/json"
        return {**message, "headers": headers_for(message.get("headers", ()), kind)}

    def _checked_form(self) -> Form:
        assert self._form is not None, "a completion was answered without its body"
        return self._form

    def _whole(self, form: Form, more: bool) -> bytes:
        assert self._outputs is not None
        answer = None if more else msgspec.json.decode(self._received)
        if answer is None:  # or vLLM's last word to a client that went away
            return b""
        self._outputs.extend(answer)
        return msgspec.json.encode(form.whole(self._outputs))

    def _events(self, form: Form) -> bytes:
        *events, rest = bytes(self._received).split(b"\n\n")
        self._received = bytearray(rest)
        return b"".join(self._event(form, event) for event in events)

    def _event(self, form: Form, event: bytes) -> bytes:
        assert self._outputs is not None
        if not event.startswith(b"data: "):
            return b""  # a comment that keeps the connection alive
        data = event.removeprefix(b"data: ")
        if data == b"[DONE]":
            return form.stream_end
        answer: dict[str, Any] = msgspec.json.decode(data)
        if "error" in answer:
            return form.trouble(answer["error"])
        changed = self._outputs.extend(answer)
        return b"".join(form.piece(self._outputs, index) for index in changed)
