"""What the READMEs of earlier versions say, typed as it stands there but for host, port and model.

Two servers each, with the flags of version 0 and of version 1; every request goes to the first
server's port and to the second one's.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e.cluster import Machine, eventually, free_port
from tests.e2e.conftest import BUNDLED

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

RUN_MODULE = """
import runpy
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
raise SystemExit
"""
COMMON = f"--model {BUNDLED} --host 127.0.0.1 --dtype=float32 --enforce-eager"

FIRST = {
    "v0": "--max_model_len 512 --serving_layers 0,3 --use_dht True",
    "v1": "--molink-enabled --molink-grpc-port {agent} --molink-start-layer 0 "
    "--molink-end-layer 4 --max-model-len 512",
}
SECOND = {
    "v0": "--max_model_len 512 --serving_layers 4,7 --initial_peer {peer}",
    "v1": "--molink-enabled --molink-grpc-port {agent} --molink-start-layer 4 "
    "--molink-end-layer -1 --max-model-len 512 --molink-initial-peer {peer}",
}
MODULES = {"v0": "molink.entrypoints.api_server", "v1": "molink.entrypoints.openai.api_server"}

GENERATE = """curl -s http://localhost:8080/generate \\
    -H "Content-Type: application/json" \\
    -d '{
        "prompt": "San Francisco is a",
        "max_tokens": 20,
        "temperature": 0
    }'"""
COMPLETIONS = GENERATE.replace("/generate", "/v1/completions")
CHAT = """curl -s http://localhost:8080/v1/chat/completions \\
    -H "Content-Type: application/json" \\
    -H "Authorization: Bearer YOUR_API_KEY" \\
    -d '{
        "model": "Qwen/Qwen3-14B",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello!"}
        ],
        "temperature": 0.7,
        "max_tokens": 100
    }'"""
PYTHON_V0 = """
from openai import OpenAI
client = OpenAI(
    base_url="http://localhost:8080/v1",
    api_key="token-abc123",
)

completion = client.chat.completions.create(
  model="Qwen/Qwen3-14B",
  messages=[
    {"role": "user", "content": "Hello!"}
  ]
)

print(completion.choices[0].message)
"""
PYTHON_V1 = """
from openai import OpenAI

client = OpenAI(
    base_url="http://localhost:8080/v1",
    api_key="your-api-key-here"
)

response = client.chat.completions.create(
    model="Qwen/Qwen3-14B",
    messages=[
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Explain the theory of relativity."}
    ],
    temperature=0.7,
    max_tokens=200
)

print(response.choices[0].message.content)
"""


class Servers:
    """The two servers of one README."""

    def __init__(self, version: str) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="mo-", dir="/tmp"))
        self.version = version
        self.ports = free_port(), free_port()
        self._machines: list[Machine] = []

    def start(self) -> None:
        first = self._start("first", FIRST[self.version], self.ports[0])
        first.wait_for("MoLink gRPC server works at ")
        address = re.search(r"MoLink gRPC server works at (\S+);", first.log)
        assert address
        second = self._start("second", SECOND[self.version], self.ports[1], address[1])
        second.wait_for("leads to the head's API")
        first.wait_for("serving at")

    def _start(self, name: str, flags: str, port: int, peer: str = "") -> Machine:
        flags = flags.format(agent=free_port(), peer=peer)
        machine = Machine(
            self._root / name,
            f"--port {port} {COMMON} {flags}".split(),
            # The second server finds the token in the first one's folder.
            environment={"MOLINK_HOME": str(self._root / "home")},
            preamble=RUN_MODULE.format(module=MODULES[self.version]),
        )
        self._machines.append(machine)
        return machine

    @property
    def first(self) -> Machine:
        return self._machines[0]

    @property
    def second(self) -> Machine:
        return self._machines[1]

    def end(self) -> None:
        for machine in self._machines:
            machine.end()
        shutil.rmtree(self._root, ignore_errors=True)


@pytest.fixture(scope="module", params=["v0", "v1"])
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    servers = Servers(request.param)
    try:
        servers.start()
        yield servers
    finally:
        servers.end()


@pytest.fixture(params=["first", "second"])
def port(request: pytest.FixtureRequest, servers: Servers) -> int:
    """Of either server."""
    return servers.ports[("first", "second").index(request.param)]


def said(command: list[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def curl(command: str, port: int) -> Any:
    command = command.replace("localhost:8080", f"127.0.0.1:{port}")
    return json.loads(said(["bash", "-c", command.replace("Qwen/Qwen3-14B", str(BUNDLED))]))


def python(program: str, port: int) -> str:
    program = program.replace("localhost:8080", f"127.0.0.1:{port}")
    return said([sys.executable, "-c", program.replace("Qwen/Qwen3-14B", str(BUNDLED))])


def test_generate_and_completions(servers: Servers, port: int) -> None:
    (text,) = curl(GENERATE, port)["text"]
    (choice,) = curl(COMPLETIONS, port)["choices"]
    assert text == "San Francisco is a" + choice["text"]
    assert curl(GENERATE, servers.ports[0])["text"] == [text]


def test_chat_by_curl(port: int) -> None:
    (choice,) = curl(CHAT, port)["choices"]
    assert choice["message"]["content"]


@pytest.mark.parametrize("program", [PYTHON_V0, PYTHON_V1])
def test_the_openai_client(port: int, program: str) -> None:
    assert python(program, port).strip()


def test_a_stream_through_either_port(servers: Servers, port: int) -> None:
    body = {"prompt": "San Francisco is a", "max_tokens": 20, "temperature": 0, "stream": True}
    arrived: list[str] = []
    url = f"http://127.0.0.1:{port}/generate"
    with httpx.stream("POST", url, json=body, trust_env=False, timeout=30) as response:
        arrived.extend(response.iter_lines())
    texts = [json.loads(line)["text"][0] for line in arrived]
    assert len(texts) > 5
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert [texts[-1]] == curl(GENERATE, servers.ports[0])["text"]


def test_health_of_either_port(port: int) -> None:
    assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200


def test_what_has_a_successor_is_said(servers: Servers) -> None:
    says = "the head's coordinator is in the place of the DHT" in servers.first.log
    assert says == (servers.version == "v0")


def test_a_request_waits_for_a_lost_stage(servers: Servers) -> None:
    servers.second.kill_stage()
    url = f"http://127.0.0.1:{servers.ports[1]}"

    def is_down() -> bool:
        answer = httpx.get(f"{url}/health", trust_env=False, timeout=30)
        return answer.status_code == 503 and "retry-after" in answer.headers

    eventually(is_down, 10, "/health answers 503")
    answer = httpx.post(f"{url}/generate", json={"prompt": "x"}, trust_env=False, timeout=60)
    assert answer.status_code == 200


def test_503_at_the_second_port_when_the_first_server_has_gone(servers: Servers) -> None:
    servers.first.process.send_signal(signal.SIGKILL)
    url = f"http://127.0.0.1:{servers.ports[1]}/health"

    def refuses() -> bool:
        answer = httpx.get(url, trust_env=False)
        return answer.status_code == 503 and "retry-after" in answer.headers

    eventually(refuses, 10, "the second server's port answers 503")
    assert servers.second.process.poll() is None
