"""What MoLink puts around vLLM's HTTP application, with the application and the agent made up."""

import json
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest

from molink.gateway import app as gateway
from molink.gateway.app import PipelineMiddleware
from molink.gateway.asgi import Receive, Scope, Send


class FakeClient:
    """What the agent has told the gateway."""

    view_json = b'{"serving": true}'
    down: str | None = None
    reports = 0
    may_wait = False

    @property
    def trouble(self) -> str:
        return str(self.down)

    def lose(self, reason: str) -> None:
        self.down = reason

    def report_serving(self) -> None:
        self.reports += 1


class FakeApplication:
    """Stands for vLLM: answers in the parts it is given, and loses the pipeline when told to."""

    def __init__(self, client: FakeClient) -> None:
        self.client = client
        self.status = 200
        self.parts = [b"one ", b"two"]
        self.lose_after: int | None = None  # parts sent, the header counted as one
        self.paths: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["path"])
        await receive()
        await self._send(send, 0, {"type": "http.response.start", "status": self.status})
        for number, part in enumerate(self.parts, start=1):
            message = {"type": "http.response.body", "body": part}
            await self._send(send, number, message | {"more_body": number < len(self.parts)})

    async def _send(self, send: Send, number: int, message: MutableMapping[str, Any]) -> None:
        if number == self.lose_after:
            self.client.lose("beta is gone")
        await send({"headers": [], **message} if number == 0 else message)


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def vllm(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> FakeApplication:
    monkeypatch.setattr(gateway, "NOTICE_S", 0.0)
    return FakeApplication(client)


def client_of(client: FakeClient, vllm: FakeApplication) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(PipelineMiddleware(vllm, client))  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://head")


async def get(client: FakeClient, vllm: FakeApplication, path: str) -> httpx.Response:
    async with client_of(client, vllm) as http:
        return await http.get(path)


async def post(client: FakeClient, vllm: FakeApplication, path: str, body: bytes) -> httpx.Response:
    async with client_of(client, vllm) as http:
        return await http.post(path, content=body)


async def test_vllm_answers_while_the_pipeline_is_up(
    client: FakeClient, vllm: FakeApplication
) -> None:
    answer = await get(client, vllm, "/v1/models")
    assert (answer.status_code, answer.text) == (200, "one two")


async def test_cluster_is_answered_without_vllm_also_while_down(
    client: FakeClient, vllm: FakeApplication
) -> None:
    client.lose("beta is gone")
    answer = await get(client, vllm, "/cluster")
    assert (answer.status_code, answer.json()) == (200, {"serving": True})
    assert answer.headers["content-type"] == "application/json"
    assert vllm.paths == []


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/health"])
async def test_503_that_says_when_to_come_back_while_down(
    client: FakeClient, vllm: FakeApplication, path: str
) -> None:
    client.lose("beta is gone")
    answer = await get(client, vllm, path)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    error = answer.json()["error"]
    assert error["message"] == "the pipeline is down: beta is gone"
    assert error["code"] == 503
    assert vllm.paths == []


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/models"])
async def test_what_may_wait_for_a_lost_stage_is_taken(
    client: FakeClient, vllm: FakeApplication, path: str
) -> None:
    client.lose("beta is gone")
    client.may_wait = True
    assert (await get(client, vllm, path)).status_code == 200
    assert (await get(client, vllm, "/health")).status_code == 503
    assert (await get(client, vllm, gateway.LOAD_ADAPTER_PATH)).status_code == 503


@pytest.mark.parametrize("path", ["/metrics", "/version", "/ping"])
async def test_some_paths_are_answered_while_down(
    client: FakeClient, vllm: FakeApplication, path: str
) -> None:
    client.lose("beta is gone")
    assert (await get(client, vllm, path)).status_code == 200


async def test_a_500_of_a_request_that_lost_its_pipeline_is_a_503(
    client: FakeClient, vllm: FakeApplication
) -> None:
    vllm.status, vllm.lose_after = 500, 0
    answer = await get(client, vllm, "/v1/completions")
    assert answer.status_code == 503
    assert "beta is gone" in answer.json()["error"]["message"]
    assert "retry-after" in answer.headers


async def test_so_it_is_for_an_adapter_that_was_being_loaded(
    client: FakeClient, vllm: FakeApplication
) -> None:
    vllm.status, vllm.lose_after = 500, 0
    answer = await post(client, vllm, gateway.LOAD_ADAPTER_PATH, b"{}")
    assert (answer.status_code, "beta is gone" in answer.text) == (503, True)


STREAM_ERROR = b'data: {"error": {"message": "Internal server error", "type": "x", "code": 500}}'


@pytest.mark.parametrize(
    ("event", "prefix"),
    [
        (b'data: {"choices": []}\n\n' + STREAM_ERROR + b"\n\ndata: [DONE]\n\n", "data: "),
        (STREAM_ERROR.removeprefix(b"data: ") + b"\n", ""),
    ],
)
async def test_a_stream_that_lost_its_pipeline_says_so(
    client: FakeClient, vllm: FakeApplication, event: bytes, prefix: str
) -> None:
    vllm.parts = [b"one ", event]
    vllm.lose_after = 2
    lines = (await get(client, vllm, "/v1/completions")).text.splitlines()
    (line,) = (line for line in lines if '"error"' in line)
    error = json.loads(line.removeprefix("one ").removeprefix(prefix))["error"]
    assert error["message"] == "the pipeline is down: beta is gone"
    assert error["code"] == 503


async def test_another_error_of_a_stream_stays(client: FakeClient, vllm: FakeApplication) -> None:
    vllm.parts = [b"", STREAM_ERROR]
    assert (await get(client, vllm, "/v1/completions")).content == STREAM_ERROR


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"lora_name": "a", "lora_path": "b", "load_inplace": true}', 400),
        (b'{"lora_name": "a", "lora_path": "b"}', 200),
        (b"{", 200),
        (b"[1]", 200),
        (b"[" * 100_000, 200),
    ],
)
async def test_an_adapter_is_not_replaced_in_place(
    client: FakeClient, vllm: FakeApplication, body: bytes, status: int
) -> None:
    answer = await post(client, vllm, gateway.LOAD_ADAPTER_PATH, body)
    assert answer.status_code == status
    assert ("unload the adapter" in answer.text) == (status == 400)


async def test_vllms_own_500_stays_one(client: FakeClient, vllm: FakeApplication) -> None:
    vllm.status = 500
    answer = await get(client, vllm, "/v1/completions")
    assert (answer.status_code, answer.text) == (500, "one two")


@pytest.mark.parametrize("status", [200, 400, 404])
async def test_other_answers_of_a_lost_pipeline_stay(
    client: FakeClient, vllm: FakeApplication, status: int
) -> None:
    """A stream that has begun ends with vLLM's own error event; a client's fault stays its own."""
    vllm.status, vllm.lose_after = status, 0
    answer = await get(client, vllm, "/v1/completions")
    assert (answer.status_code, answer.text) == (status, "one two")


async def test_the_agent_hears_once_that_http_is_up(client: FakeClient) -> None:
    sent: list[str] = []

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        for event in ("startup", "shutdown"):
            await send({"type": f"lifespan.{event}.complete"})

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("nobody receives here")

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message["type"])

    middleware = PipelineMiddleware(lifespan, client)  # type: ignore[arg-type]
    await middleware({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert client.reports == 1
