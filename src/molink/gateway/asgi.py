"""What our ASGI middleware shares: its types, reading and replacing a body, answers of its own."""

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MAX_BODY = 64 * 1024 * 1024  # bytes; chats may hold pictures
_ABOUT_BODY = (b"content-length", b"content-type", b"transfer-encoding")


async def read_body(receive: Receive) -> bytes | None:
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


def request_with(scope: Scope, path: str, body: bytes) -> Scope:
    """The same request with another path and a body of JSON."""
    full = scope.get("root_path", "") + path
    headers = headers_for(scope["headers"], b"application/json")
    headers.append((b"content-length", str(len(body)).encode()))
    return {**scope, "path": full, "raw_path": full.encode(), "headers": headers}


def headers_for(headers: Iterable[tuple[bytes, bytes]], content_type: bytes) -> Headers:
    """Headers for another body: those about the old one are left out."""
    others = [(name, value) for name, value in headers if name.lower() not in _ABOUT_BODY]
    return [*others, (b"content-type", content_type)]


def replay(body: bytes, receive: Receive) -> Receive:
    """A request of `body`; afterwards whatever comes, which is the client's leaving."""
    is_sent = False

    async def next_message() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


def is_post(scope: Scope, path: str) -> bool:
    """Whether a request is a POST to `path` of the application."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    return bool(scope["path"].removeprefix(scope.get("root_path", "")) == path)


async def respond(send: Send, status: int, body: bytes, headers: Headers | None = None) -> None:
    """Answer with JSON."""
    own = [(b"content-type", b"application/json"), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": body})


async def respond_error(
    send: Send, status: int, kind: str, message: str, headers: Headers | None = None
) -> None:
    """Answer with an error in OpenAI's form."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    await respond(send, status, json.dumps({"error": error}).encode(), headers)


async def refuse_large(send: Send) -> None:
    """Answer 413."""
    message = f"the body is larger than {MAX_BODY} bytes"
    await respond_error(send, 413, "RequestEntityTooLargeError", message)
