"""`molink serve` with input that cannot work: refused before anything starts."""

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from molink.cli import head, serve
from molink.cli.head import _write_private
from molink.cli.serve import _slug
from molink.core.errors import UsageError
from molink.node.head import HeadAgent
from molink.node.surroundings import Place, Surroundings
from molink.transport.token import JoinToken

from .conftest import Run

LOCAL = ("--listen", "127.0.0.1:0")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
        return free


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def listen(self: HeadAgent) -> int:
        return 7171

    async def run(self: HeadAgent) -> str:
        return "this is as far as it goes"

    monkeypatch.setattr(HeadAgent, "listen", listen)
    monkeypatch.setattr(HeadAgent, "run", run)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0"], "--nodes"),
        (["--nodes", "2", "--wire-dtype", "int4"], "'int4' is not one of 'auto', 'int8', 'fp8'"),
        (["--nodes", "2", "--wire-sum", "yes"], "'yes' is not one of 'auto', 'on', 'off'"),
        (["--nodes", "2", "--wire-coding", "zstd"], "'zstd' is not one of 'auto', 'on', 'off'"),
        (["--nodes", "2", "--drafts", "some"], "'some' is not one of 'auto', 'all'"),
        (["--nodes", "2", "--drafts", "all"], "--drafts all: nothing drafts; add for example"),
        (["--port", "0"], "--port"),
        (["--port", "65536"], "--port"),
        (["--port", "http"], "--port"),
        (["--nodes", "2", "--listen", "nonsense"], "--listen «nonsense»: expected HOST:PORT"),
        (["--nodes", "2", "--advertise", "me"], "--advertise «me»: expected HOST:PORT"),
        (["--nodes", "2", "--host", "203.0.113.1"], "cannot serve HTTP on 203.0.113.1"),
        (["--nodes", "2", "--host", "no-such-host.invalid"], "cannot serve HTTP on no-such-host"),
        (["--layers", "nonsense"], "layers «nonsense»: expected START:END"),
        (["--layers", "4:2"], "layers 4:2 are empty"),
        (["--layers", "0:9"], "layers 0:9 lie outside the model, which has 8 layers"),
        (["--nodes", "2", "--device", "gpu"], "--device gpu: expected auto, cpu or cuda"),
        (["--nodes", "2", "-tp", "none"], "--tensor-parallel-size none"),
        (["--nodes", "2", "-pp", "2"], "-pp cannot be given: the number of nodes decides"),
        (["--nodes", "2", "stray"], "unexpected argument «stray»"),
        (["--nodes", "2", "--token-file", "/dev/null/x"], "cannot write the token file"),
    ],
)
def test_flags_that_cannot_work(
    run: Run, model: Path, port: int, arguments: list[str], words: str
) -> None:
    own_port = [] if "--port" in arguments else ["--port", port]
    listen = [] if "--listen" in arguments else LOCAL
    outcome = run("serve", model, *own_port, *listen, *arguments)
    assert (outcome.status, words in outcome.error) == (2, True), outcome.error


def test_the_model_comes_before_vllms_flags(run: Run, model: Path) -> None:
    outcome = run("serve", "--dtype", "float32", model, "--nodes", 2)
    assert outcome.status == 2
    assert "MODEL comes before vLLM's flags" in outcome.error


def test_the_http_port_is_taken(run: Run, model: Path, taken: int) -> None:
    outcome = run("serve", model, "--port", taken, "--nodes", 2, *LOCAL)
    assert outcome.status == 2
    assert f"cannot serve HTTP on 127.0.0.1:{taken}: Address already in use" in outcome.error


def test_there_is_no_such_model(run: Run, tmp_path: Path, port: int) -> None:
    outcome = run("serve", tmp_path / "none", "--port", port, "--nodes", 2, *LOCAL)
    assert outcome.status == 2
    assert f"there is no model folder {tmp_path / 'none'}" in outcome.error


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"num_hidden_layers": "many"}'])
def test_the_models_configuration_is_broken(run: Run, model: Path, port: int, text: str) -> None:
    (model / "config.json").write_text(text)
    outcome = run("serve", model, "--port", port, "--nodes", 2, *LOCAL)
    assert outcome.status == 2
    assert str(model) in outcome.error


@pytest.mark.parametrize("place", ["authority.pem", "state.sqlite"])
def test_the_clusters_files_are_damaged(
    run: Run, home: Path, model: Path, port: int, place: str
) -> None:
    arguments = ("serve", model, "--port", port, "--nodes", 2, *LOCAL)
    run(*arguments)
    file = home / "model" / place
    file.write_text("damaged " * 100)
    outcome = run(*arguments)
    assert outcome.status in (1, 2)
    assert str(file) in outcome.error


def test_a_cluster_whose_state_is_lost_is_a_new_one(
    run: Run, home: Path, model: Path, port: int
) -> None:
    arguments = ("serve", model, "--port", port, "--nodes", 2, *LOCAL)
    run(*arguments)
    authority = (home / "model" / "authority.pem").read_bytes()
    run(*arguments)
    assert (home / "model" / "authority.pem").read_bytes() == authority
    (home / "model" / "state.sqlite").unlink()
    run(*arguments)
    assert (home / "model" / "authority.pem").read_bytes() != authority


def test_home_cannot_be_made(
    run: Run, model: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLINK_HOME", "/dev/null/home")
    outcome = run("serve", model, "--port", port, "--nodes", 2, *LOCAL)
    assert outcome.status == 2
    assert "cannot make the folder /dev/null/home" in outcome.error


def test_the_line_to_paste_holds_the_token_of_the_file(
    run: Run, model: Path, port: int, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("an old one")
    file.chmod(0o644)
    outcome = run("serve", model, "--port", port, "--nodes", 2, *LOCAL, "--token-file", file)
    assert outcome.status == 0, outcome.error
    pasted = re.search(r"molink join --token (\S+)\n", outcome.said)
    assert pasted
    assert pasted[1] == file.read_text().strip()
    assert file.stat().st_mode & 0o777 == 0o600
    (address,) = JoinToken.decode(pasted[1]).addresses
    assert f"MoLink gRPC server works at {address}; token in {file}" in outcome.said  # an old line


def test_an_advertised_address_is_the_tokens_only_one(run: Run, model: Path, port: int) -> None:
    advertise = ("--advertise", "head.example:7000")
    said = run("serve", model, "--port", port, "--nodes", 2, *LOCAL, *advertise).said
    pasted = re.search(r"--token (\S+)", said)
    assert pasted
    assert JoinToken.decode(pasted[1]).addresses == ("head.example:7000",)


def test_no_run_folder_is_left(run: Run, model: Path, port: int, tmp_path: Path) -> None:
    run("serve", model, "--port", port, "--nodes", 2, *LOCAL)
    assert list(tmp_path.rglob("agent.sock")) == []


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "secret"], False),
        (["--host", "0.0.0.0", "--api_key=secret"], False),
        (["--host", "127.0.0.1"], False),
        ([], False),
    ],
)
def test_an_open_api_without_a_key_is_warned_of(
    run: Run, model: Path, port: int, arguments: list[str], warned: bool
) -> None:
    said = run("serve", model, "--port", port, "--nodes", 2, *LOCAL, *arguments).said
    assert ("warning: the API on 0.0.0.0" in said) == warned
    assert "secret" not in said


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What plain vLLM was started with; it does not start."""
    command: list[str] = []

    def execv(path: str, arguments: list[str]) -> None:
        command.extend(arguments[1:])
        raise SystemExit(0)

    monkeypatch.setattr(serve.os, "execv", execv)
    return command


def test_one_node_becomes_plain_vllm_and_says_so(
    run: Run, model: Path, port: int, vllm: list[str]
) -> None:
    outcome = run("serve", model, "--port", port, "--max-model-len", 512)
    assert "one node: this is plain vLLM, without any agent" in outcome.said
    assert vllm[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    own = vllm.index("--max-model-len")
    assert vllm[own:] == [
        *("--max-model-len", "512"),
        "--middleware=molink.gateway.generate.GenerateMiddleware",
        *("--served-model-name", str(model), "default"),
    ]


@pytest.mark.parametrize("given", [["--served-model-name", "a", "b"], ["--served_model_name=a"]])
def test_the_name_default_stands_beside_the_users_names(
    run: Run, model: Path, port: int, vllm: list[str], given: list[str]
) -> None:
    run("serve", model, "--port", port, *given)
    names = ["a", "b"] if len(given) == 3 else ["a"]
    assert vllm[-len(names) - 2 :] == ["--served-model-name", *names, "default"]


def test_names_in_a_configuration_file_stay_alone(
    run: Run, model: Path, port: int, vllm: list[str]
) -> None:
    run("serve", model, "--port", port, "--config", "vllm.yaml")
    assert "--served-model-name" not in vllm


@pytest.mark.parametrize("flag", ["--model-path", "--model"])
@pytest.mark.parametrize("joined", [True, False])
def test_sglangs_words_for_a_model_and_its_memory(
    run: Run, model: Path, port: int, vllm: list[str], flag: str, joined: bool
) -> None:
    named = [f"{flag}={model}"] if joined else [flag, model]
    fraction = ["--mem-fraction-static", "0.7", "--tokenizer-path=t"]
    run("serve", *named, "--port", port, "--tp", 2, *fraction)
    start = vllm.index("--tensor-parallel-size")
    assert vllm[2:4] == ["--model", str(model)]
    assert vllm[start : start + 5] == [
        *("--tensor-parallel-size", "2", "--gpu-memory-utilization", "0.7", "--tokenizer=t")
    ]


def test_a_flag_that_vllm_has_no_use_for(run: Run, model: Path, port: int, vllm: list[str]) -> None:
    outcome = run("serve", model, "--port", port, "--attention-reduce-in-fp32")
    assert "--attention-reduce-in-fp32 is not needed: vLLM's attention kernels" in outcome.said
    assert not [word for word in vllm if "fp32" in word]


def test_a_chat_template_by_name_with_its_stop_strings(
    run: Run, model: Path, port: int, vllm: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLINK_CHAT_STOP", "[]")
    run("serve", model, "--port", port, "--chat-template", "chatml")
    (template,) = [word for word in vllm if word.startswith("--chat-template=")]
    assert Path(template.removeprefix("--chat-template=")).is_file()
    assert "--middleware=molink.gateway.chat_stop.ChatStopMiddleware" in vllm
    assert json.loads(os.environ["MOLINK_CHAT_STOP"]) == ["<|im_end|>"]


@pytest.mark.parametrize("cluster", [[], ["--nodes", "2"]])
def test_a_chat_template_that_is_not_there(
    run: Run, model: Path, port: int, cluster: list[str]
) -> None:
    listen = LOCAL if cluster else ()
    outcome = run("serve", model, "--port", port, *cluster, *listen, "--chat-template", "chatmll")
    assert outcome.status == 2
    assert "--chat-template chatmll: no such file, nor one of chatml" in outcome.error


@pytest.mark.parametrize(
    ("model_name", "slug"),
    [
        ("/models/Qwen3-8B", "Qwen3-8B"),
        ("org/name", "name"),
        ("..", "cluster"),
        (".", "cluster"),
        ("/", "cluster"),
        ("/a/b c'd", "b-c-d"),
        ("x" * 100, "x" * 40),
    ],
)
def test_the_clusters_folder_is_named_after_the_model(model_name: str, slug: str) -> None:
    assert _slug(model_name) == slug


def test_a_token_may_go_to_something_that_is_no_file() -> None:
    _write_private(Path("/dev/null"), "secret")
    assert Path("/dev/null").is_char_device()


def test_a_token_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the token file"):
        _write_private(tmp_path, "secret")


@pytest.mark.parametrize(
    "flag", [("--token-file", "token"), ("--advertise", "example.org:1"), ("--cluster", "c")]
)
def test_flags_of_a_cluster_are_not_dropped_in_silence(
    run: Run, model: Path, port: int, flag: tuple[str, str]
) -> None:
    outcome = run("serve", model, "--port", port, *flag)
    assert outcome.status == 2
    assert f"{flag[0]} is for a cluster: add --nodes N or --layers A:B" in outcome.error


def test_one_node_without_the_models_folder(run: Run, tmp_path: Path, port: int) -> None:
    outcome = run("serve", tmp_path / "nothing", "--port", port)
    assert outcome.status == 2
    assert "there is no model folder" in outcome.error


def test_a_mistake_leaves_no_folder(run: Run, home: Path, model: Path, port: int) -> None:
    outcome = run("serve", model, "--port", port, "--layers", "5:2", *LOCAL)
    assert outcome.status == 2
    assert not home.exists() or list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "2"], ["-p 7171:7171", "the API on loopback"]),
        (["--nodes", "2", "--listen", "127.0.0.1:0"], ["the API on loopback"]),
        (["--nodes", "2", "--advertise", "192.168.1.5:7171"], ["the API on loopback"]),
        (["--nodes", "2", "--host", "0.0.0.0", "--advertise", "192.168.1.5:7171"], []),
        (["--nodes", "2", "-tp", "2"], ["-p 7171:7171", "the API on loopback", "64 MiB"]),
    ],
)
def test_what_a_container_means_is_said(
    run: Run,
    model: Path,
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    for module in (serve, head):
        monkeypatch.setattr(module, "recognise", lambda: Surroundings(Place.DOCKER, True, 64 << 20))
    said = run("serve", model, "--port", port, *arguments).said
    for note in ("-p 7171:7171", "the API on loopback", "64 MiB"):
        assert (note in said) == (note in words), said
