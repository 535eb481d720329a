"""What MoLink adds to vLLM's HTTP application: `/cluster`, metrics, and who waits while it is down.

While a lost stage is replaced, requests are taken and wait.
"""

import asyncio
import contextlib
import json
import re
from functools import partial
from typing import Any

from prometheus_client import REGISTRY

from molink.gateway.agent_client import AgentClient
from molink.gateway.asgi import (
    Application,
    Message,
    Receive,
    Refusal,
    Scope,
    Send,
    error_body,
    is_post,
    respond,
    respond_error,
    with_body,
)
from molink.gateway.metrics import ClusterCollector

RETRY_AFTER_S = 5
NOTICE_S = 0.1  # the engine may fail a request before the agent's notice of the loss is here

ALWAYS_ANSWERED = ("/metrics", "/version", "/ping")
LOAD_ADAPTER_PATH = "/v1/load_lora_adapter"
NEVER_WAIT = ("/health", LOAD_ADAPTER_PATH, "/v1/unload_lora_adapter")
UNAVAILABLE = "ServiceUnavailableError"
_INTERNAL_ERROR = re.compile(
    rb'^((?:data: )?\{"error": ?)\{"message": ?"Internal server error"[^}]*\}', re.MULTILINE
)
"""How vLLM ends the stream of a request that has failed, and so does `/generate`."""


def customise(app: Any, client: AgentClient) -> None:
    """Put the pipeline's middleware around vLLM's FastAPI application."""
    REGISTRY.register(ClusterCollector(lambda: client.view))
    # vLLM has built its stack already, so ours goes around it instead of into it.
    app.middleware_stack = PipelineMiddleware(
        app.middleware_stack or app.build_middleware_stack(), client
    )


class PipelineMiddleware:
    """ASGI: serves `/cluster`; 503 for what cannot wait for a lost pipeline, or got lost."""

    def __init__(self, app: Application, client: AgentClient) -> None:
        self._app = app
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._reporting(send))
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == "/cluster":
            await respond(send, 200, self._client.view_json)
        elif self._client.down is not None and not self._may_wait(scope["path"]):
            await self._refuse(send)
        else:
            if is_post(scope, LOAD_ADAPTER_PATH):
                receive, send = with_body(receive, send, partial(_refuse_in_place, send=send))
            await self._pass(scope, receive, send)

    def _may_wait(self, path: str) -> bool:
        if path in ALWAYS_ANSWERED:
            return True
        return self._client.may_wait and path not in NEVER_WAIT

    def _reporting(self, send: Send) -> Send:
        async def forward(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                self._client.report_serving()

        return forward

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let vLLM answer; its 500 for a request that lost its pipeline becomes a 503.

        In a stream, whose status is sent already, the error says the same.
        """
        replaced = False

        async def forward(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == 500:
                await asyncio.sleep(NOTICE_S)
                replaced = self._client.down is not None
                if replaced:
                    await self._refuse(send)
            elif _INTERNAL_ERROR.search(message.get("body", b"")):
                await asyncio.sleep(NOTICE_S)
                if self._client.down is not None:
                    message = {**message, "body": self._explained(message["body"])}
            if not replaced:
                await send(message)

        await self._app(scope, receive, forward)

    def _explained(self, event: bytes) -> bytes:
        """An event that says «internal server error», with what has happened."""
        error = error_body(503, UNAVAILABLE, self._reason)["error"]
        return _INTERNAL_ERROR.sub(lambda found: found[1] + json.dumps(error).encode(), event)

    @property
    def _reason(self) -> str:
        return f"the pipeline is down: {self._client.trouble}"

    async def _refuse(self, send: Send) -> None:
        retry = [(b"retry-after", str(RETRY_AFTER_S).encode())]
        await respond_error(send, 503, UNAVAILABLE, self._reason, retry)


async def _refuse_in_place(body: bytes, send: Send) -> tuple[bytes, Send]:
    """A failure half way would leave neither adapter. What is no request vLLM refuses itself."""
    with contextlib.suppress(ValueError, RecursionError):
        request = json.loads(body)
        if isinstance(request, dict) and request.get("load_inplace"):
            text = "load_inplace does not work over stages: unload the adapter, then load it"
            raise Refusal(400, "BadRequestError", text)
    return body, send
