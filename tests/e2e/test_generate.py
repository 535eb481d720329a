"""One machine with SGLang's flags: `/generate` in both forms, the name `default`, chat templates.

The commands are those of the README of the layer over SGLang, but for port and model.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.e2e.cluster import Machine, eventually, free_port
from tests.e2e.conftest import BUNDLED
from tests.e2e.running import LONG

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

TEMPLATE = {
    "name": "my_model",
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "sep_style": "NO_COLON_SINGLE",
    "sep": "<|end|>",
    "stop_str": ["<|user|>", "."],
}
USER_TOKEN = 2  # <|user|>, which is special: vLLM leaves it out of the text
CURL = """curl -s http://localhost:30000/generate \\
  -H "Content-Type: application/json" \\
  -d '{
    "text": "Once upon a time,",
    "sampling_params": {
      "max_new_tokens": 16,
      "temperature": 0
    }
  }'"""
PYTHON = """
import openai
client = openai.Client(
    base_url="http://127.0.0.1:30000/v1", api_key="EMPTY")

# Text completion
response = client.completions.create(
	model="default",
	prompt="The capital of France is",
	temperature=0,
	max_tokens=32,
)
print(response)

# Chat completion
response = client.chat.completions.create(
    model="default",
    messages=[
        {"role": "system", "content": "You are a helpful AI assistant"},
        {"role": "user", "content": "List 3 countries and their capitals."},
    ],
    temperature=0,
    max_tokens=64,
)
print(response)
"""

Json = dict[str, Any]


class Server:
    """What the tests ask."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0, trust_env=False)

    def ask(self, path: str, **body: Any) -> Any:
        response = self.http.post(path, json=body)
        assert response.is_success, response.text
        return response.json()

    def complete(self, prompt: str, **parameters: Any) -> str:
        """The text of a greedy completion."""
        answer = self.ask("/v1/completions", prompt=prompt, temperature=0, **parameters)
        text: str = answer["choices"][0]["text"]
        return text

    def aborted(self) -> bool:
        """Whether a request was aborted, and none runs."""
        lines = self.http.get("/metrics").text.splitlines()
        running = [line for line in lines if line.startswith("vllm:num_requests_running")]
        aborted = [line for line in lines if 'finished_reason="abort"' in line]
        return _sum(running) == 0 < _sum(aborted)


def _sum(samples: list[str]) -> float:
    return sum(float(sample.rpartition(" ")[2]) for sample in samples)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sglang")
    template = folder / "my_model_template.json"
    template.write_text(json.dumps(TEMPLATE))
    port = free_port()
    flags = f"--model-path {BUNDLED} --port {port} --tp 1 --mem-fraction-static 0.7"
    more = f"--chat-template {template} --attention-reduce-in-fp32 --host 127.0.0.1"
    vllm = "--max-model-len 512 --dtype float32 --enforce-eager"
    machine = Machine(folder / "head", ["serve", *f"{flags} {more} {vllm}".split()])
    try:
        machine.wait_for("Application startup complete")
        server = Server(port)
        yield server
        server.http.close()
    finally:
        machine.end()


def said(command: list[str], server: Server) -> str:
    command = [word.replace(":30000/", f":{server.port}/") for word in command]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_readmes_curl(server: Server) -> None:
    answer = json.loads(said(["bash", "-c", CURL], server))
    assert answer["text"] == server.complete("Once upon a time,", max_tokens=16)
    meta = answer["meta_info"]
    assert meta["completion_tokens"] == len(answer["output_ids"]) <= 16
    assert meta["prompt_tokens"] > 0


def test_the_readmes_openai_client(server: Server) -> None:
    printed = said([sys.executable, "-c", PYTHON], server)
    assert "Completion(" in printed
    assert "ChatCompletion(" in printed


def test_the_model_has_its_own_name_and_default(server: Server) -> None:
    models = server.http.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == [str(BUNDLED), "default"]


@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_streams_end_where_whole_answers_do(server: Server, form: str) -> None:
    whole = server.complete("Once upon a time,", max_tokens=16)
    sampling = {"temperature": 0, "max_new_tokens": 16}
    body: Json = {"text": "Once upon a time,", "sampling_params": sampling, "stream": True}
    if form == "vllm":
        body = {"prompt": "Once upon a time,", "temperature": 0, "max_tokens": 16, "stream": True}
    with server.http.stream("POST", "/generate", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    if form == "sglang":
        assert lines.pop() == "[DONE]"
        assert json.loads(lines[-1])["text"] == whole
    else:
        assert json.loads(lines[-1])["text"] == ["Once upon a time," + whole]
    assert len(lines) > 3


def test_several_prompts_and_several_outputs(server: Server) -> None:
    prompts = ["Once upon a time,", "The sun"]
    texts = [server.complete(prompt) for prompt in prompts]
    vllm = server.ask("/generate", prompt=prompts, temperature=0)
    assert vllm["text"] == [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    sglang = server.ask("/generate", text=prompts, sampling_params={"temperature": 0})
    assert [answer["text"] for answer in sglang] == texts
    two = server.ask("/generate", text="The sun", sampling_params={"n": 2, "temperature": 1.5})
    assert len(two) == 2


def test_token_ids_and_their_logprobs(server: Server) -> None:
    ids = server.ask("/tokenize", prompt="Once upon a time,")["tokens"]
    body = {"input_ids": ids, "return_logprob": True, "top_logprobs_num": 2}
    answer = server.ask("/generate", **body, sampling_params={"temperature": 0})
    meta = answer["meta_info"]
    assert meta["prompt_tokens"] == len(ids)
    assert [token for _, token, _ in meta["output_token_logprobs"]] == answer["output_ids"]
    best = [candidates[0][:2] for candidates in meta["output_top_logprobs"]]
    assert best == [[logprob, token] for logprob, token, _ in meta["output_token_logprobs"]]


def test_grammars_of_sglangs_form(server: Server) -> None:
    sampling = {"regex": "(yes|no)", "temperature": 0}
    assert server.ask("/generate", text="Well,", sampling_params=sampling)["text"] in ("yes", "no")


def test_the_models_own_temperature_does_not_count(server: Server) -> None:
    """Its generation_config.json says 0.1, with which such texts agree; 1.0 makes them differ."""
    texts = server.ask("/generate", prompt=["I like"] * 8, max_tokens=32)["text"]
    assert len(set(texts)) > 4


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "give a `prompt`"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "top_p": 5}, "top_p"),
        ({"prompt": "x " * 600}, "512"),
        ({"text": "x", "sampling_params": {"n": 0}}, "n"),
    ],
)
def test_bad_input_is_a_400_with_its_reason(server: Server, body: Json, words: str) -> None:
    response = server.http.post("/generate", json=body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_a_client_that_leaves_ends_its_request(server: Server) -> None:
    body = {"prompt": "Once upon a time,", "stream": True, **LONG}
    with server.http.stream("POST", "/generate", json=body) as response:
        next(response.iter_lines())
    eventually(server.aborted, 10, "the request is aborted")


# The template in SGLang's JSON form

QUESTION = [{"role": "user", "content": "Tell me a story."}]


def test_a_chat_has_the_templates_prompt_and_ends_at_its_stop_string(server: Server) -> None:
    rendered = "<|system|>\n<|user|>Tell me a story.<|end|><|assistant|>"
    without_stop = server.complete(rendered, max_tokens=64)
    body = {"model": "default", "messages": QUESTION, "temperature": 0, "max_tokens": 64}
    (choice,) = server.ask("/v1/chat/completions", **body)["choices"]
    assert "." in without_stop
    assert choice["message"]["content"] == without_stop.partition(".")[0]
    assert choice["finish_reason"] == "stop"


def test_a_stop_string_that_is_a_special_token_ends_a_chat_too(server: Server) -> None:
    bias = {str(USER_TOKEN): 100}
    body = {"messages": QUESTION, "logit_bias": bias, "max_tokens": 8}
    (choice,) = server.ask("/v1/chat/completions", **body)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", USER_TOKEN)
    answer = server.ask("/v1/completions", prompt="x", logit_bias=bias, max_tokens=8)
    assert answer["choices"][0]["finish_reason"] == "length"  # completions are not chats
