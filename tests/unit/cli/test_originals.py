"""Earlier versions' command lines, translated."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from molink.cli import originals
from molink.cli.originals import translate
from molink.core.errors import UsageError

from .conftest import Run


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


HTTP = "--host 0.0.0.0 --port 8000"
V0 = "--model M --port 8080 --dtype=half --max_model_len 4096"
V1 = "--model M --molink-enabled --molink-grpc-port 50061 --port 8080 --max-model-len 4096"


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        # what the two READMEs say, first and second server
        (
            f"{V0} --serving_layers 0,39",
            "serve M --host 0.0.0.0 --port 8080 --layers 0:40 --listen 0.0.0.0:7 "
            "--dtype=half --max_model_len 4096",
        ),
        (
            f"{V0} --serving_layers 40,79 --initial_peer 172.17.0.15:50051",
            "join 172.17.0.15:50051 --model M --layers 40:80 --host 0.0.0.0 --port 8080 "
            "--dtype=half --max_model_len 4096",
        ),
        (
            f"{V1} --molink-start-layer 0 --molink-end-layer 20",
            "serve M --host 0.0.0.0 --port 8080 --layers 0:20 --listen 0.0.0.0:50061 "
            "--max-model-len 4096",
        ),
        (
            f"{V1} --molink-start-layer 20 --molink-end-layer -1 --molink-initial-peer h:50061",
            "join h:50061 --model M --layers 20:-1 --host 0.0.0.0 --port 8080 "
            "--listen 0.0.0.0:50061 --max-model-len 4096",
        ),
        # one server alone
        ("--model M", f"serve M {HTTP}"),
        (V0, "serve M --host 0.0.0.0 --port 8080 --dtype=half --max_model_len 4096"),
        ("--model-path M --host 127.0.0.1 --port 30000", "serve M --host 127.0.0.1 --port 30000"),
        ("--model M --use_dht True", f"serve M {HTTP}"),
        # both spellings, the last of two counts
        ("--model=M --serving-layers=0,3", f"serve M {HTTP} --layers 0:4 --listen 0.0.0.0:7"),
        (
            "--model M --molink_enabled --molink_start_layer=1 --molink_end_layer=2",
            f"serve M {HTTP} --layers 1:2 --listen 0.0.0.0:7",
        ),
        ("--serving_layers 0,3 --model A --model B", "serve B"),
        # what is not said
        ("--model M --molink-enabled", f"serve M {HTTP} --layers 0:-1 --listen 0.0.0.0:7"),
        ("--model M --molink-enabled --molink-initial-peer h:1", "join h:1 --model M"),
        ("--model M --initial_peer h:1", "join h:1 --model M"),
        ("--model M --serving_layers 0,3 --initial_peer=", f"serve M {HTTP} --layers 0:4"),
        (
            "--model M --molink-enabled --molink-grpc-port 0 --molink-start-layer 0 "
            "--molink-end-layer 4",
            f"serve M {HTTP} --layers 0:4 --listen 0.0.0.0:7",
        ),
    ],
)
def test_translation(typed: str, command: str) -> None:
    assert " ".join(translate(typed.split(), 7).command).startswith(command)


def test_nothing_is_added_to_a_joining_node_that_was_not_said() -> None:
    assert translate(["--model", "M", "--initial_peer", "h:1"], 7).command == [
        *("join", "h:1", "--model", "M")
    ]


@pytest.mark.parametrize(
    "flag",
    [
        "--use_dht",
        "--use-dht=True",
        "--in_autodl True",
        "--autodl-worker-num 2",
        "--molink-enabled --molink-max-message-size-mb 200",
        "--molink-enabled --molink_connection_timeout_s=30",
        "--molink-enabled --molink-heartbeat-interval-s 5",
        "--molink-enabled --molink-enable-compression",
        "--molink-enabled --molink-num-delivery-workers 2",
    ],
)
def test_what_does_nothing_any_more_says_so_in_one_line(flag: str) -> None:
    command, (note,) = translate(["--model", "M", *flag.split(), "--seed", "5"], 7)
    assert re.fullmatch(r"--[a-z-]+ does nothing any more: .+", note)
    assert command[-2:] == ["--seed", "5"]


def test_the_dht_has_a_successor() -> None:
    _, notes = translate(["--model", "M", "--use_dht"], 7)
    assert notes == [
        "--use-dht does nothing any more: the head's coordinator is in the place of the DHT"
    ]


def test_the_http_servers_flags_stay_with_the_head() -> None:
    http = "--api-key secret --chat_template=t.jinja --lora-modules a=b c=d --enable-ssl-refresh"
    typed = f"--model M --serving_layers 4,7 {http} --dtype half -tp 2".split()
    assert set(http.split()) <= set(translate(typed, 7).command)
    command, (note,) = translate([*typed, "--initial_peer", "h:1"], 7)
    assert command == [
        "join",
        "h:1",
        "--model",
        "M",
        "--layers",
        "4:8",
        "--dtype",
        "half",
        "-tp",
        "2",
    ]
    assert note.startswith("--api-key, --chat-template, --lora-modules, --enable-ssl-refresh: said")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("", "--model is missing"),
        ("--port 8080", "--model is missing"),
        ("--model", "--model needs a value"),
        ("--model --port 8080", "--model needs a value"),
        ("--model M --serving_layers", "--serving-layers needs a value"),
        ("--model M --serving_layers 39,0", "--serving-layers 39,0: the first layer comes after"),
        ("--model M --serving_layers 0-39", "--serving-layers «0-39»: expected FIRST,LAST"),
        ("--model M --serving_layers 0,-1", "--serving-layers «0,-1»: expected FIRST,LAST"),
        ("--model M --serving_layers some", "--serving-layers «some»: expected FIRST,LAST"),
        ("--model M --serving_layers 0,3 --initial_peer h", "the initial peer «h»: expected HOST"),
        ("--model M --initial_peer h:99999", "the initial peer «h:99999»: expected HOST:PORT"),
        (
            "--model M --serving_layers 0,3 --molink-enabled",
            "--serving-layers and --molink-enabled belong to two versions",
        ),
        (
            "--model M --use_dht --molink-initial-peer h:1",
            "--use-dht and --molink-initial-peer belong to two versions",
        ),
        (
            "--model M --molink-start-layer 0 --molink-end-layer 4",
            "--molink-end-layer has no effect without --molink-enabled",
        ),
        (
            "--model M --molink-enabled --molink-start-layer 0",
            "--molink-start-layer needs --molink-end-layer beside it",
        ),
        (
            "--model M --molink-enabled --molink-end-layer 4",
            "--molink-end-layer needs --molink-start-layer beside it",
        ),
        (
            "--model M --molink-enabled --molink-start-layer 4 --molink-end-layer 4",
            "layers 4 to 4: the start is inclusive, the end exclusive",
        ),
        (
            "--model M --molink-enabled --molink-start-layer -1 --molink-end-layer 4",
            "layers -1 to 4",
        ),
        (
            "--model M --molink-enabled --molink-start-layer a --molink-end-layer 4",
            "--molink-start-layer «a»: expected the number of a layer",
        ),
        (
            "--model M --molink-enabled --molink-grpc-port many",
            "--molink-grpc-port «many»: expected the number of a port",
        ),
        ("--model M --molink-enabled --molink-grpc-port 70000", "--molink-grpc-port «70000»"),
    ],
)
def test_what_makes_no_sense(typed: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        translate(typed.split(), 7)


@pytest.mark.parametrize("module", ["api_server", "openai.api_server"])
@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--model M --serving_layers 39,0", "molink  --serving-layers 39,0: the first layer"),
        ("--model /no/such --port {port}", "there is no model folder /no/such"),
        ("--model /no/such --port {port} --serving_layers 0,3", "there is no model folder"),
        ("--model M --initial_peer 127.0.0.1:1", "give the token that molink serve printed"),
    ],
)
def test_the_commands_end_in_one_line(
    home: Path, unused_port: int, module: str, typed: str, words: str
) -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            f"molink.entrypoints.{module}",
            *typed.format(port=unused_port).split(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert words in ended.stderr


def test_help_is_that_of_serve(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        originals.run(["--help"])
    assert ending.value.code == 0
    assert "--layers" in capsys.readouterr().out


def test_every_flag_of_vllms_http_server_is_told_from_the_engines() -> None:
    parser = FlexibleArgumentParser()
    AsyncEngineArgs.add_cli_args(parser)
    of_engine = set(parser._option_string_actions)
    names = set(make_arg_parser(FlexibleArgumentParser())._option_string_actions) - of_engine
    names -= {"--host", "--port", "--config"}  # ours, and a file that may hold both kinds
    assert {name for name in names if not originals._is_of_http(name)} == set()
    assert {name for name in of_engine if originals._is_of_http(name)} == set()


@given(st.integers(0, 999), st.integers(0, 999))
def test_inclusive_and_exclusive_are_the_same_layers(first: int, more: int) -> None:
    last = first + more
    v0 = ["--model", "M", "--serving_layers", f"{first},{last}"]
    v1 = ["--model=M", "--molink-enabled", "--molink-start-layer", str(first)]
    assert translate(v0, 7).command == translate([*v1, f"--molink_end_layer={last + 1}"], 7).command


FLAGS = [*originals._V0, *originals._V1, *originals._OF_SERVER, "--seed", "-tp", "0,3", "-1", "x"]


@given(st.lists(st.sampled_from(FLAGS), max_size=8))
def test_any_line_is_translated_or_refused(arguments: list[str]) -> None:
    try:
        command, _ = translate(arguments, 7)
    except UsageError:
        return
    assert command[0] in ("serve", "join")
    assert not [word for word in command if word.startswith(("--molink", "--serving"))]
