"""What clients of the OpenAI API use, over two stages; answers equal those of one process."""

import json
import re
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from tests.e2e.cluster import Answer, Cluster, Request, eventually
from tests.e2e.conftest import MAX_NUM_SEQS, TWO_STAGES
from tests.e2e.models import MAX_MODEL_LEN
from tests.e2e.test_equality import assert_equal
from tests.factories import make_completion, make_prompt, make_prompts

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(240),
    pytest.mark.parametrize("case", [TWO_STAGES], indirect=True),
]

TOLERANCE = 1e-3  # of logarithms of probabilities in float32
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Grace"]}, "age": {"enum": [1, 2, 30]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "time")
]


def choices(answer: Answer) -> list[Answer]:
    found: list[Answer] = answer["choices"]
    return found


def counts(answer: Answer) -> tuple[int, int, int]:
    """Tokens of the prompt, of the completion and of both."""
    usage = answer["usage"]
    return usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]


def stream(cluster: Cluster, request: Request) -> Generator[Answer, None, None]:
    """The events of a streamed completion."""
    body = {"model": cluster.model, "stream": True, **request}
    with cluster.http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data and data != "[DONE]":
                yield json.loads(data)


def test_streaming_equals_one_answer(pipeline: Cluster) -> None:
    request = make_completion(make_prompt(80, seed=1), max_tokens=30)
    [whole] = pipeline.ask([request])
    events = list(stream(pipeline, request | {"stream_options": {"include_usage": True}}))
    parts = [choice for event in events for choice in choices(event)]
    assert len(parts) > 1
    assert [token for part in parts for token in part["token_ids"]] == (
        choices(whole)[0]["token_ids"]
    )
    assert "".join(part["text"] for part in parts) == choices(whole)[0]["text"]
    assert counts(events[-1]) == counts(whole) == (80, 30, 110)


def test_openai_client(pipeline: Cluster) -> None:
    """A conversation through the chat template, with the client people use."""
    answer = pipeline.client.chat.completions.create(
        model=pipeline.model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=8,
        temperature=0,
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"


def test_logprobs(pipeline: Cluster, reference: Cluster) -> None:
    """Of sampled tokens and their rivals, and of prompts longer than a chunk."""
    requests = [
        make_completion(prompt, logprobs=5, echo=echo, max_tokens=6)
        for echo in (False, True)
        for prompt in make_prompts([3, 64, 65, 150])
    ]
    for found, expected in zip(pipeline.ask(requests), reference.ask(requests), strict=True):
        ours, theirs = choices(found)[0]["logprobs"], choices(expected)[0]["logprobs"]
        assert ours["tokens"] == theirs["tokens"]
        assert ours["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=TOLERANCE)
        for rivals, their_rivals in zip(ours["top_logprobs"], theirs["top_logprobs"], strict=True):
            assert rivals == (their_rivals and pytest.approx(their_rivals, abs=TOLERANCE))


def test_several_answers_to_one_prompt(pipeline: Cluster, reference: Cluster) -> None:
    request = make_completion(make_prompt(40, seed=3), n=4, seed=11, temperature=1.0)
    texts = [choice["text"] for choice in choices(pipeline.ask([request])[0])]
    assert texts == [choice["text"] for choice in choices(reference.ask([request])[0])]
    assert len(set(texts)) == 4


def test_stop_string(pipeline: Cluster) -> None:
    request = make_completion(make_prompt(50, seed=4), max_tokens=40)
    text = choices(pipeline.ask([request])[0])[0]["text"]
    stop = text[20:24]
    [answer] = pipeline.ask([request | {"stop": [stop]}])
    assert choices(answer)[0]["text"] == text[: text.index(stop)]
    assert choices(answer)[0]["finish_reason"] == "stop"


def test_structured_output(pipeline: Cluster, reference: Cluster) -> None:
    """Grammars travel as a second message of the step; free requests share the steps."""
    prompts = make_prompts([5, 70, 20, 100, 33, 64, 40, 12])
    forms = [
        {"json": SCHEMA},
        {"regex": "[a-c]{3}-[0-9]{4}"},
        {"choice": ["yes", "no"]},
        {"grammar": 'root ::= "a" root "b" | "ab"'},
    ]
    requests = [
        make_completion(prompt, structured_outputs=form, max_tokens=60, temperature=0.8, seed=i)
        for i, (prompt, form) in enumerate(zip(prompts, forms * 2, strict=True))
    ]
    requests += [make_completion(prompt, max_tokens=30) for prompt in make_prompts([9, 90])]
    answers = pipeline.ask(requests)
    texts = [choices(answer)[0]["text"] for answer in answers]
    assert texts == [choices(answer)[0]["text"] for answer in reference.ask(requests)]
    for text in (texts[0], texts[4]):
        assert json.loads(text).keys() == {"name", "age"}
    assert all(re.fullmatch("[a-c]{3}-[0-9]{4}", text) for text in (texts[1], texts[5]))
    assert {texts[2], texts[6]} <= {"yes", "no"}
    assert all(re.fullmatch("a+b*", text) for text in (texts[3], texts[7]))  # may be cut off


def test_schema_through_the_chat_api(pipeline: Cluster) -> None:
    answer = pipeline.client.chat.completions.create(
        model=pipeline.model,
        messages=[{"role": "user", "content": "Who?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA}},
        max_tokens=60,
    )
    assert json.loads(answer.choices[0].message.content or "").keys() == {"name", "age"}


def test_prompt_logprobs(pipeline: Cluster, reference: Cluster) -> None:
    """Also of prompts that are cut."""
    requests = [
        make_completion(prompt, prompt_logprobs=3, max_tokens=2)
        for prompt in make_prompts([3, 65, 150])
    ]
    for found, expected in zip(pipeline.ask(requests), reference.ask(requests), strict=True):
        ours, theirs = (choices(answer)[0]["prompt_logprobs"] for answer in (found, expected))
        assert len(ours) == len(theirs)
        for here, there in zip(ours[1:], theirs[1:], strict=True):
            assert here.keys() == there.keys()
            for token in here:
                assert here[token]["rank"] == there[token]["rank"]
                assert here[token]["logprob"] == pytest.approx(
                    there[token]["logprob"], abs=TOLERANCE
                )


def test_beam_search(pipeline: Cluster, reference: Cluster) -> None:
    request = make_completion(make_prompt(40, seed=8), use_beam_search=True, n=3, max_tokens=10)
    texts = [choice["text"] for choice in choices(pipeline.ask([request])[0])]
    assert texts == [choice["text"] for choice in choices(reference.ask([request])[0])]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}, "auto", "none"]
)
def test_tool_calls(pipeline: Cluster, reference: Cluster, choice: object) -> None:
    request = {
        "messages": [{"role": "user", "content": "What is the weather in Rome?"}],
        "tools": TOOLS,
        "tool_choice": choice,
        "max_tokens": 300,
        "temperature": 0.0,
    }

    def answer(cluster: Cluster) -> tuple[str | None, list[tuple[str, str]]]:
        [found] = cluster.ask([request], "/v1/chat/completions")
        message = choices(found)[0]["message"]
        functions = [call["function"] for call in message.get("tool_calls") or []]
        return message["content"], [(f["name"], f["arguments"]) for f in functions]

    content, calls = answer(pipeline)
    assert (content, calls) == answer(reference)
    if choice in ("auto", "none"):
        assert content
    else:
        assert {name for name, _ in calls} <= {"weather", "time"}
        assert all(json.loads(arguments).keys() == {"city"} for _, arguments in calls)
        assert calls


def waiting_in(pipeline: Cluster) -> float:
    """Requests that wait at the engine, or at the gateway for a place there."""
    found = pipeline.metrics()
    return found["vllm:num_requests_waiting"] + found["molink_gateway_requests_waiting"]


def test_priority(pipeline: Cluster) -> None:
    """A request that comes last, and is urgent, ends before those that wait."""
    waiting = [
        make_completion(prompt, max_tokens=60, ignore_eos=True, priority=5)
        for prompt in make_prompts([40] * 3 * MAX_NUM_SEQS)
    ]
    urgent = make_completion(make_prompt(40, seed=99), max_tokens=20, priority=-5)
    with ThreadPoolExecutor(max_workers=2) as threads:
        slow = threads.submit(pipeline.ask, waiting)
        eventually(lambda: waiting_in(pipeline) >= MAX_NUM_SEQS, 20, "requests wait")
        pipeline.ask([urgent])
        assert waiting_in(pipeline) > 0
        assert not slow.done()
        slow.result()


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 8}, "output_text"),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8},
            "max_tokens",
        ),
        ("/tokenize", {"prompt": "Hello"}, "tokens"),
    ],
)
def test_other_apis_of_vllm(
    pipeline: Cluster, path: str, body: dict[str, object], words: str
) -> None:
    assert words in json.dumps(pipeline.ask([{"temperature": 0.0, **body}], path))


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"prompt": [5] * (MAX_MODEL_LEN + 1)}, 400, str(MAX_MODEL_LEN)),
        ({"prompt": [10**9]}, 400, "out of vocabulary"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"structured_outputs": {"regex": "(["}}, 400, "regex"),
        ({"structured_outputs": {"json": {"type": "nonsense"}}}, 400, "nonsense"),
        ({"structured_outputs": {"grammar": "root ::= missing"}}, 400, "grammar"),
        ({"prompt_logprobs": 10**6}, 400, "prompt_logprobs"),
        ({"n": 0}, 400, "n"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"prompt": None}, 400, "prompt"),
        ({"model": "another"}, 404, "another"),
    ],
)
def test_bad_request(pipeline: Cluster, changes: Request, status: int, says: str) -> None:
    body = {"model": pipeline.model, **make_completion([5, 6, 7]), **changes}
    body = {name: value for name, value in body.items() if value is not None}
    response = pipeline.http.post("/v1/completions", json=body)
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


def test_malformed_body(pipeline: Cluster) -> None:
    headers = {"content-type": "application/json"}
    response = pipeline.http.post("/v1/completions", content=b'{"prompt": ', headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_aborted_requests_free_their_memory(pipeline: Cluster, reference: Cluster) -> None:
    """Clients that hang up in mid-stream leave nothing, and a full batch then runs right."""
    prompts = make_prompts([100] * MAX_NUM_SEQS)
    with ExitStack() as hang_up:
        for prompt in prompts:
            request = make_completion(prompt, max_tokens=400, ignore_eos=True)
            events = stream(pipeline, request)
            hang_up.callback(events.close)
            next(events)
        assert pipeline.metrics()["vllm:num_requests_running"] == MAX_NUM_SEQS
        assert pipeline.metrics()["vllm:kv_cache_usage_perc"] > 0

    def is_idle() -> bool:
        metrics = pipeline.metrics()
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(metrics[f"vllm:{name}"] for name in names)

    eventually(is_idle, 15, "aborted requests leave the engine")
    requests = [make_completion(prompt, max_tokens=50, ignore_eos=True) for prompt in prompts]
    assert_equal(requests, pipeline, reference)
    eventually(is_idle, 15, "finished requests leave the engine")


def test_health(pipeline: Cluster) -> None:
    assert pipeline.http.get("/health").status_code == 200


def test_metrics(pipeline: Cluster) -> None:
    """vLLM's own series and ours; counters grow with what is asked."""
    before = pipeline.metrics()
    names = ["stage_steps_total", "stage_compute_seconds_total", "stage_waiting_seconds_total"]
    names += ["link_bytes_total"]
    assert {"vllm:num_requests_running", "vllm:generation_tokens_total"} <= before.keys()
    gauges = {"steps_in_flight", "link_frames_queued", "link_round_trip_seconds", "serving"}
    assert {f"molink_{name}" for name in gauges} <= before.keys()
    assert before["molink_serving"] == 1
    pipeline.ask([make_completion(make_prompt(30, seed=5))])

    def have_grown() -> bool:
        now = pipeline.metrics()
        return all(now[f"molink_{name}"] > before[f"molink_{name}"] for name in names)

    eventually(have_grown, 10, "the stages' and links' counters grow")


def test_cluster(pipeline: Cluster) -> None:
    before = pipeline.view()
    assert before.serving
    assert [node.name for node in before.nodes] == ["head", "node1"]
    assert {(link.source, link.destination) for link in before.links} == (
        {("head", "node1"), ("node1", "head")}
    )
    pipeline.ask([make_completion(make_prompt(30, seed=6), max_tokens=12)])

    def have_grown() -> bool:
        now = pipeline.view()
        return all(
            new.counters.steps >= old.counters.steps + 12 and new.counters.compute_s > 0
            for old, new in zip(before.stages, now.stages, strict=True)
        )

    eventually(have_grown, 10, "the stages' steps grow")
