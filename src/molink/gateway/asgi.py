"""What our ASGI middleware shares: its types, and answers of its own."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


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
