"""What clients get from a gateway while its engine answers, fails, and is gone."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from molink.gateway import connection
from molink.gateway.admission import Limits
from molink.gateway.gateway import MOST_SETBACKS
from molink.gateway.keys import Keys, hash_of
from molink.wire.delivered import key_of

from .conftest import Asked, Served

COMPLETIONS = "/v1/completions"
DONE = b"data: [DONE]\n\n"
FAILED = b'{"error": {"message": "Internal server error", "code": 500}}'


def event(tokens: list[int], *, ends: bool = False) -> bytes:
    text = "".join(chr(97 + token) for token in tokens)
    reason = "stop" if ends else None
    choice = {"index": 0, "text": text, "token_ids": tokens, "finish_reason": reason}
    answer = {"id": "a", "choices": [choice]}
    return b"data: " + json.dumps(answer, separators=(",", ":")).encode() + b"\n\n"


def text_of(answer: httpx.Response) -> str:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    return "".join(event["choices"][0]["text"] for event in events if "choices" in event)


async def ask(served: Served, **body: Any) -> httpx.Response:
    return await served.http.post(COMPLETIONS, json={"stream": True, **body})


async def says_two(asked: Asked) -> None:
    """What is left of «abcd», which ends after four tokens."""
    has = asked.json.get("vllm_xargs", {}).get(key_of(0, 0), [])
    await asked.begin()
    if has:
        await asked.say(event(has))
    for token in range(len(has), 4):
        await asked.say(event([token], ends=token == 3))
    await asked.say(DONE)
    await asked.end()


async def test_an_answer_passes_with_its_headers(served: Served) -> None:
    async def script(asked: Asked) -> None:
        await asked.whole(201, b'{"a": 1}', "x-of-engine: yes")

    served.engine.script = script
    answer = await served.http.post("/v1/any?x=1", content=b"body", headers={"x-of-client": "yes"})
    assert (answer.status_code, answer.json()) == (201, {"a": 1})
    assert answer.headers["x-of-engine"] == "yes"
    (asked,) = served.engine.asked
    assert asked.first == "POST /v1/any?x=1 HTTP/1.1"
    assert asked.headers["x-of-client"] == "yes"
    assert asked.body == b"body"


async def test_connections_to_the_engine_are_kept(served: Served) -> None:
    served.engine.script = lambda asked: asked.whole(200, b"{}")
    for _ in range(5):
        assert (await served.http.get("/v1/models")).status_code == 200
    assert served.engine.connections == 1


async def test_a_kept_connection_that_was_closed_is_no_failure(served: Served) -> None:
    async def script(asked: Asked) -> None:
        await asked.whole(200, b"{}")
        asked.writer.close()

    served.engine.script = script
    for _ in range(5):
        assert (await served.http.get("/v1/models")).status_code == 200


async def test_a_stream_comes_as_the_client_has_asked_for_it(served: Served) -> None:
    served.engine.script = says_two
    answer = await ask(served)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert text_of(answer) == "abcd"
    assert '"token_ids":null' in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


async def test_an_engine_that_is_gone_before_its_answer_is_asked_again(served: Served) -> None:
    async def script(asked: Asked) -> None:
        if len(served.engine.asked) == 1:
            served.agent.lose_engine()
            raise ConnectionError
        await asked.whole(200, b'{"second": true}')

    served.engine.script = script
    answer = await served.http.post(COMPLETIONS, json={"prompt": "x"})
    assert answer.json() == {"second": True}
    assert [asked.json for asked in served.engine.asked] == [{"prompt": "x"}] * 2


@pytest.mark.parametrize("after", [0, 1, 2, 3])
async def test_a_stream_goes_on_where_an_engine_left_it(served: Served, after: int) -> None:
    async def script(asked: Asked) -> None:
        if len(served.engine.asked) > 1:
            await says_two(asked)
            return
        await asked.begin()
        for token in range(after):
            await asked.say(event([token]))
        await asyncio.sleep(0.02)
        served.agent.lose_engine()
        raise ConnectionError

    served.engine.script = script
    answer = await ask(served)
    assert text_of(answer) == "abcd"


async def test_a_stream_goes_on_although_the_engine_had_time_to_fail(served: Served) -> None:
    async def script(asked: Asked) -> None:
        if len(served.engine.asked) > 1:
            await says_two(asked)
            return
        await asked.begin()
        await asked.say(event([0]))
        await asked.say(b"data: " + FAILED + b"\n\n" + DONE)
        await asked.end()
        await asyncio.sleep(0.02)
        served.agent.lose_engine()

    served.engine.script = script
    assert text_of(await ask(served)) == "abcd"


async def test_the_end_of_an_answer_is_waited_for_while_the_engine_is_away(
    served: Served,
) -> None:
    async def script(asked: Asked) -> None:
        if len(served.engine.asked) > 1:
            await says_two(asked)
            return
        await asked.begin()
        await asked.say(event([0, 1]))
        served.agent.waits_for_s = 60.0
        served.agent.lose("the engine has ended")
        served.agent.lose_engine()
        asyncio.get_running_loop().call_later(0.3, served.agent.come_back)
        raise ConnectionError

    served.engine.script = script
    assert text_of(await ask(served)) == "abcd"


async def test_nobody_waits_for_ever(served: Served) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.say(event([0, 1]))
        served.agent.lose("the engine has ended")
        served.agent.lose_engine()
        raise ConnectionError

    served.engine.script = script
    answer = await ask(served)
    assert text_of(answer) == "ab"
    assert "the engine has ended" in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


async def test_a_request_that_ends_every_engine_ends(served: Served) -> None:
    async def script(asked: Asked) -> None:
        served.agent.lose_engine()
        raise ConnectionError

    served.engine.script = script
    answer = await served.http.post(COMPLETIONS, json={"prompt": "x"})
    assert answer.status_code == 500
    assert "engines in a row" in answer.json()["error"]["message"]
    assert len(served.engine.asked) == MOST_SETBACKS


async def test_an_answer_that_an_ending_engine_gave_up_is_asked_for_again(served: Served) -> None:
    async def script(asked: Asked) -> None:
        if len(served.engine.asked) == 1:
            await asked.whole(200, b'{"choices":[{"text":"a","finish_reason":"abort"}]}')
            served.agent.lose_engine()
        else:
            await asked.whole(200, b'{"choices":[{"text":"ab","finish_reason":"stop"}]}')

    served.engine.script = script
    answer = await served.http.post(COMPLETIONS, json={"prompt": "x"})
    assert answer.json()["choices"][0]["text"] == "ab"


@pytest.mark.parametrize("begins", [False, True])
async def test_an_engine_that_lives_and_drops_connections_is_not_asked_for_ever(
    served: Served, begins: bool
) -> None:
    async def script(asked: Asked) -> None:
        if begins:
            await asked.begin()
        raise ConnectionError

    served.engine.script = script
    answer = await ask(served)
    assert "engines in a row" in answer.text
    assert len(served.engine.asked) == MOST_SETBACKS


async def test_a_connection_that_breaks_after_the_end_was_said_is_no_loss(served: Served) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.say(event([0, 1, 2, 3], ends=True) + DONE)
        raise ConnectionError

    served.engine.script = script
    answer = await ask(served)
    assert answer.text.count("[DONE]") == 1
    assert text_of(answer) == "abcd"
    assert len(served.engine.asked) == 1


async def test_what_is_no_stream_of_events_is_cut_off(served: Served) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin("audio/wav")
        await asked.say(b"RIFF")
        await asked.reader.readexactly(1)

    served.engine.script = script
    headers = {"x-request-timeout": "0.2"}
    with pytest.raises(httpx.RemoteProtocolError):
        await served.http.post("/v1/audio/speech", json={}, headers=headers)


@pytest.mark.parametrize("path", ["/v1/%6coad_lora_adapter", "http://x/v1/load_lora_adapter"])
async def test_a_path_is_read_as_the_engine_reads_it(served: Served, path: str) -> None:
    body = b'{"lora_name": "one", "lora_path": "x", "load_inplace": true}'
    head = f"POST {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    said = await served.raw(head.encode() + body)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert served.engine.asked == []


async def test_a_stream_that_nobody_else_understands_ends_with_an_error(served: Served) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.say(b"data: something\n\n")
        served.agent.lose_engine()
        raise ConnectionError

    served.engine.script = script
    answer = await served.http.post("/v1/responses", json={"stream": True})
    assert answer.text.startswith("data: something\n\n")
    assert "ask again" in answer.text


async def test_a_client_that_leaves_is_noticed_by_the_engine(served: Served) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.say(event([0]))
        await asked.reader.readexactly(1)

    served.engine.script = script
    body = {"stream": True}
    async with served.http.stream("POST", COMPLETIONS, json=body) as answer:
        await anext(answer.aiter_bytes())
    await asyncio.wait_for(served.engine.gone.wait(), 5)


async def test_a_client_that_does_not_read_holds_back_the_engine_and_is_cut_off(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALLED_TIMEOUT_S", 0.5)
    said = 0

    async def script(asked: Asked) -> None:
        nonlocal said
        await asked.begin()
        while True:
            await asked.say(event([0] * 50_000))
            said += 1

    served.engine.script = script
    _, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1024)
    body = b'{"stream": true}'
    writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 16\r\n\r\n" + body)
    await asyncio.wait_for(served.engine.gone.wait(), 10)
    assert said < 200
    writer.close()


# --- a pipeline that is down


async def test_cluster_is_answered_without_the_engine(served: Served) -> None:
    served.agent.lose("beta is gone")
    answer = await served.http.get("/cluster")
    assert (answer.status_code, answer.json()) == (200, {"serving": True})
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions", "/health"])
async def test_503_that_says_when_to_come_back(served: Served, path: str) -> None:
    served.agent.lose("beta is gone")
    answer = await served.http.get(path)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    error = answer.json()["error"]
    assert (error["message"], error["code"]) == ("the pipeline is down: beta is gone", 503)


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/models"])
async def test_what_may_wait_for_a_lost_stage_is_taken(served: Served, path: str) -> None:
    served.engine.script = lambda asked: asked.whole(200, b"{}")
    served.agent.lose("beta is gone")
    served.agent.waits_for_s = 60.0
    assert (await served.http.get(path)).status_code == 200
    for refused in ("/health", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert (await served.http.get(refused)).status_code == 503


@pytest.mark.parametrize("path", ["/metrics", "/version", "/ping"])
async def test_some_paths_are_answered_while_down(served: Served, path: str) -> None:
    served.engine.script = lambda asked: asked.whole(200, b"of_engine 1\n")
    served.agent.lose("beta is gone")
    answer = await served.http.get(path)
    assert (answer.status_code, answer.text[:12]) == (200, "of_engine 1\n")


async def test_metrics_are_there_without_an_engine(served: Served) -> None:
    await served.engine.stop()
    assert "molink_gateway_requests_in_flight" in (await served.http.get("/metrics")).text
    await served.engine.start()


async def test_a_500_of_a_request_that_lost_its_pipeline_is_a_503(served: Served) -> None:
    async def script(asked: Asked) -> None:
        await asked.whole(500, FAILED)
        served.agent.lose("beta is gone")

    served.engine.script = script
    answer = await served.http.post(COMPLETIONS, json={})
    assert answer.status_code == 503
    assert "beta is gone" in answer.json()["error"]["message"]


async def test_a_500_for_another_reason_passes(served: Served) -> None:
    served.engine.script = lambda asked: asked.whole(500, FAILED)
    answer = await served.http.post(COMPLETIONS, json={})
    assert (answer.status_code, answer.content) == (500, FAILED)


@pytest.mark.parametrize("path", [COMPLETIONS, "/generate"])
async def test_the_error_of_a_stream_says_what_has_happened(served: Served, path: str) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.say(b"data: " + FAILED + b"\n\n")
        await asked.end()
        served.agent.lose("beta is gone")

    served.engine.script = script
    answer = await served.http.post(path, json={"stream": True})
    error = json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))["error"]
    assert error["message"] == "the pipeline is down: beta is gone"


async def test_the_error_of_a_stream_of_a_pipeline_that_stands_passes(served: Served) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.say(b"data: " + FAILED + b"\n\n" + DONE)
        await asked.end()

    served.engine.script = script
    answer = await ask(served)
    assert answer.content == b"data: " + FAILED + b"\n\n" + DONE


# --- adapters


async def test_another_engine_gets_the_adapters_before_anything_else(served: Served) -> None:
    served.engine.script = lambda asked: asked.whole(200, b"{}")
    for name in ("one", "two", "three"):
        body = {"lora_name": name, "lora_path": "x"}
        await served.http.post("/v1/load_lora_adapter", json=body)
    await served.http.post("/v1/unload_lora_adapter", json={"lora_name": "two"})
    served.engine.asked.clear()
    served.agent.lose_engine()
    answers = [served.http.get("/v1/models") for _ in range(5)]
    assert [a.status_code for a in await asyncio.gather(*answers)] == [200] * 5
    loads = [asked for asked in served.engine.asked if asked.path == "/v1/load_lora_adapter"]
    assert served.engine.asked[:2] == loads
    assert [asked.json["lora_name"] for asked in loads] == ["one", "three"]


async def test_an_adapter_is_not_replaced_in_place(served: Served) -> None:
    body = {"lora_name": "one", "lora_path": "x", "load_inplace": True}
    answer = await served.http.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == 400
    assert "unload the adapter" in answer.json()["error"]["message"]
    assert served.engine.asked == []


# --- who may ask, and how much


async def test_a_client_without_a_key_gets_none_of_the_engine(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.engine.script = lambda asked: asked.whole(200, b"{}")
    monkeypatch.setattr(served.keys, "_given", Keys([hash_of("key")], None)._given)
    refused = await served.http.get("/v1/models")
    assert refused.status_code == 401
    assert "Bearer KEY" in refused.json()["error"]["message"]
    assert served.engine.asked == []
    for path in ("/health", "/cluster", "/metrics"):
        assert (await served.http.get(path)).status_code == 200
    taken = await served.http.get("/v1/models", headers={"authorization": "Bearer key"})
    assert taken.status_code == 200


async def test_who_comes_when_all_places_are_taken_is_told_when_to_come_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = asyncio.Event()

    async def script(asked: Asked) -> None:
        if asked.first.startswith("POST"):
            await ends.wait()
        await asked.whole(200, b"{}")

    served.engine.script = script
    monkeypatch.setattr(served.admission, "_limits", Limits(running=1, waiting=1))
    asked = [asyncio.create_task(served.http.post(COMPLETIONS, json={})) for _ in range(3)]
    done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    (refused,) = (task.result() for task in done)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert (await served.http.get("/v1/models")).status_code == 200  # nothing is computed for it
    ends.set()
    answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429]
    metrics = (await served.http.get("/metrics")).text
    assert 'molink_gateway_answers_total{status="429"} 1.0' in metrics


@pytest.mark.parametrize("begins", [False, True])
async def test_a_request_that_takes_too_long_ends_here_and_at_the_engine(
    served: Served, begins: bool
) -> None:
    async def script(asked: Asked) -> None:
        if begins:
            await asked.begin()
            await asked.say(event([0]))
        await asked.reader.readexactly(1)

    served.engine.script = script
    headers = {"x-request-timeout": "0.2"}
    answer = await served.http.post(COMPLETIONS, json={"stream": True}, headers=headers)
    assert answer.status_code == (200 if begins else 504)
    assert "the request was not done within 0.2 s" in answer.text
    await asyncio.wait_for(served.engine.gone.wait(), 5)


@pytest.mark.parametrize("seconds", ["-1", "0", "soon", "inf", "nan"])
async def test_a_timeout_that_is_none(served: Served, seconds: str) -> None:
    headers = {"x-request-timeout": seconds}
    answer = await served.http.post(COMPLETIONS, json={}, headers=headers)
    assert answer.status_code == 400
    assert "x-request-timeout: expected seconds" in answer.json()["error"]["message"]


async def test_a_server_that_is_about_to_end_takes_nothing_more(served: Served) -> None:
    begun, ends = asyncio.Event(), asyncio.Event()

    async def script(asked: Asked) -> None:
        begun.set()
        await ends.wait()
        await asked.whole(200, b"{}")

    served.engine.script = script
    first = asyncio.create_task(served.http.post(COMPLETIONS, json={}))
    await begun.wait()
    served.agent.drains.set()
    refused = await served.http.post(COMPLETIONS, json={})
    assert (refused.status_code, served.admission.present) == (503, 1)
    assert "about to end" in refused.json()["error"]["message"]
    ends.set()
    assert (await first).status_code == 200
    assert served.admission.present == 0
