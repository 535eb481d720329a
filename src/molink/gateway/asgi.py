"""What our ASGI middleware shares: its types, reading and replacing a body, answers of its own."""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from molink.gateway.http import JSON_HEADERS, MAX_BODY, Headers, Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
_ABOUT_BODY = (b"content-length", b"content-type", b"transfer-encoding")


def with_body(
    receive: Receive, send: Send, change: Callable[[bytes], Awaitable[tuple[bytes, Send]]]
) -> tuple[Receive, Send]:
    """What the application receives and sends, so that it gets another body.

    The body is read when the application first asks for it: when it has checked the key.

    Args:
        change: makes the other body of the client's, and says who takes the answer to it; or raises
            Refusal.
    """
    is_read = False
    answer = send

    async def next_message() -> Message:
        nonlocal is_read, answer
        if is_read:
            return await receive()
        is_read = True
        body = await _read_body(receive)
        if body is None:
            return {"type": "http.disconnect"}
        try:
            changed, answer = await change(_bounded(body))
        except Refusal as error:
            changed, answer = b"null", _refusing(error, send)
        return {"type": "http.request", "body": changed, "more_body": False}

    async def forward(message: Message) -> None:
        await answer(message)

    return next_message, forward


def _refusing(refusal: Refusal, send: Send) -> Send:
    """Answers with `refusal`, whatever the application says."""

    async def refuse(message: Message) -> None:
        if message["type"] == "http.response.start":
            await respond(send, refusal.status, refusal.body)

    return refuse


def _bounded(body: bytes) -> bytes:
    if len(body) > MAX_BODY:
        text = f"the body is larger than {MAX_BODY} bytes"
        raise Refusal(413, "RequestEntityTooLargeError", text)
    return body


async def _read_body(receive: Receive) -> bytes | None:
    """The body, or a little more than MAX_BODY of a larger one; None if the client went away."""
    body = bytearray()
    more = True
    while more and len(body) <= MAX_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def request_with(scope: Scope, path: str) -> Scope:
    """The same request with another path, and a body of JSON of another length."""
    full = scope.get("root_path", "") + path
    headers = headers_for(scope["headers"], b"application/json")
    return {**scope, "path": full, "raw_path": full.encode(), "headers": headers}


def headers_for(headers: Iterable[tuple[bytes, bytes]], content_type: bytes) -> Headers:
    """Headers for another body: those about the old one are left out."""
    others = [(name, value) for name, value in headers if name.lower() not in _ABOUT_BODY]
    return [*others, (b"content-type", content_type)]


def is_post(scope: Scope, path: str) -> bool:
    """Whether a request is a POST to `path` of the application."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    return bool(scope["path"].removeprefix(scope.get("root_path", "")) == path)


async def respond(send: Send, status: int, body: bytes) -> None:
    """Answer with JSON."""
    await send({"type": "http.response.start", "status": status, "headers": JSON_HEADERS})
    await send({"type": "http.response.body", "body": body})
