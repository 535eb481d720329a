"""The command lines of MoLink's earlier versions, put into today's.

Version 0 said which layers a server holds with `--serving_layers 0,39`, both inclusive; version 1
with `--molink-start-layer 0 --molink-end-layer 20`, the end exclusive. A server without an initial
peer is a head, one with a peer joins it, and one that says nothing about layers is plain vLLM.
"""

import contextlib
import re
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from molink.cli.console import complain, say_all
from molink.cli.flags import check_addresses
from molink.core.errors import UsageError
from molink.engine.owned_flags import name_of

HOST = "0.0.0.0"  # vLLM's, and so the earlier versions': all interfaces
PORT = "8000"
FIRST_AGENT_PORT = 50051
AGENT_PORTS = 100  # tried in turn

_V0 = {
    "--serving-layers": "",
    "--initial-peer": "",
    "--use-dht": "the head's coordinator is in the place of the DHT",
    "--in-autodl": "a node dials out, whatever it runs in",
    "--autodl-worker-num": "a node dials out, whatever it runs in",
}
_V1 = {
    "--molink-enabled": "",
    "--molink-start-layer": "",
    "--molink-end-layer": "",
    "--molink-initial-peer": "",
    "--molink-grpc-port": "",
    "--molink-max-message-size-mb": "messages go in pieces and have no such bound",
    "--molink-connection-timeout-s": "a node that cannot reach the head says so and tries again",
    "--molink-heartbeat-interval-s": "links are watched all the time",
    "--molink-enable-compression": "activations go as they are",
    "--molink-num-delivery-workers": "each node's agent sends for itself",
}
"""Flags of the two versions; one that does nothing any more with the reason."""

_OF_SERVER = ("--model", "--model-path", "--host", "--port")
_HTTP_FLAGS = """
--allow-credentials --allowed-headers --allowed-methods --allowed-origins
--anthropic-disabled-thinking-effort --api-key --api-server-count --chat-template
--chat-template-content-format --cohere-format --cohere-is-reasoning-model
--data-parallel-supervisor-port --default-chat-template-kwargs --disable-access-log-for-endpoints
--disable-fastapi-docs --disable-uvicorn-access-log --dp-supervisor-probe-failure-threshold
--dp-supervisor-probe-interval-s --dp-supervisor-probe-timeout-s --enable-auto-tool-choice
--enable-flash-late-interaction --enable-force-include-usage --enable-log-deltas
--enable-log-outputs --enable-offline-docs --enable-per-request-metrics
--enable-prompt-tokens-details --enable-request-id-headers --enable-scale-out
--enable-server-load-tracking --enable-ssl-refresh --enable-tokenizer-info-endpoint
--exclude-tools-when-tool-choice-none --fingerprint-mode --fingerprint-value --grpc --grpc-port
--h11-max-header-count --h11-max-incomplete-event-size --headless --log-error-stack --lora-modules
--max-log-len --middleware --response-role --return-tokens-as-token-ids --root-path
--sse-keep-alive-interval --ssl-ca-certs --ssl-cert-reqs --ssl-certfile --ssl-ciphers --ssl-keyfile
--tokens-only --tool-call-parser --tool-parser-plugin --tool-server --tool-strict-level
--trust-request-chat-template --trust-request-mm-kwargs --uds --uvicorn-log-level -asc
"""
_OF_HTTP = frozenset(_HTTP_FLAGS.split())
"""The HTTP server's flags, which people copied from the first server's command to the others'."""
_SWITCHES = ("--molink-enabled", "--molink-enable-compression")
_OPTIONAL = ("--use-dht", "--in-autodl")  # took a word, which people left out
_NUMBER = re.compile(r"-?[0-9]{1,9}")


class Translation(NamedTuple):
    """What to run instead, as arguments of `molink`, and what to tell about it."""

    command: list[str]
    notes: list[str]


def run(arguments: Sequence[str]) -> None:
    """Run the command that an earlier version's `arguments` stand for; ends the process."""
    from molink.cli.main import app  # which knows this module's command

    if {"-h", "--help"} & set(arguments):
        app(["serve", "--help"], prog_name="molink")
    try:
        command, notes = translate(arguments, _free_port())
    except UsageError as error:
        raise SystemExit(complain(error)) from None
    say_all(notes)
    app(command, prog_name="molink")


def translate(arguments: Sequence[str], agent_port: int) -> Translation:
    """Put an earlier version's command line into today's.

    Args:
        agent_port: of a head whose command line does not name it.

    Raises:
        UsageError: the flags contradict one another or make no sense; names them.
    """
    given, others = _split(arguments)
    _check_one_version(given)
    model = given.get("--model") or given.get("--model-path")
    if not model:
        raise UsageError("--model is missing")
    peer = given.get("--initial-peer") or given.get("--molink-initial-peer")
    check_addresses({"the initial peer": peer})
    layers = _v0_layers(given) if given.keys() & _V0 else _v1_layers(given, peer)
    notes = _notes(given)
    if peer:
        command = ["join", peer, "--model", model, *_joining(given, layers)]
        others, dropped = _without_http(others)
        if dropped:
            notes.append(f"{', '.join(dropped)}: said to the head alone, which answers HTTP")
    else:
        command = ["serve", model, *_serving(given, layers, agent_port)]
    return Translation([*command, *others], notes)


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our own flags, in one spelling, with their last values; and the others as they are."""
    given: dict[str, str] = {}
    others: list[str] = []
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        name = name_of(argument)
        if name in (*_V0, *_V1, *_OF_SERVER):
            _, equals, value = argument.partition("=")
            given[name] = value if equals else _take_value(name, rest)
        else:
            others.append(argument)
    return given, others


def _take_value(name: str, rest: deque[str]) -> str:
    """The word after a flag; "" for a switch. Raises UsageError if there is none."""
    if name in _SWITCHES:
        return ""
    has_value = bool(rest) and (not rest[0].startswith("-") or _NUMBER.fullmatch(rest[0]))
    if has_value:
        return rest.popleft()
    if name in _OPTIONAL:
        return ""
    raise UsageError(f"{name} needs a value")


def _check_one_version(given: Mapping[str, str]) -> None:
    v0, v1 = sorted(given.keys() & _V0), sorted(given.keys() & _V1)
    if v0 and v1:
        raise UsageError(f"{v0[0]} and {v1[0]} belong to two versions of MoLink: use those of one")
    if v1 and "--molink-enabled" not in given:
        raise UsageError(f"{v1[0]} has no effect without --molink-enabled")


def _v0_layers(given: Mapping[str, str]) -> str | None:
    """`--serving-layers A,B`, both inclusive -> `A:B+1`."""
    text = given.get("--serving-layers")
    if not text:
        return None
    match = re.fullmatch(r"\s*([0-9]{1,6})\s*,\s*([0-9]{1,6})\s*", text)
    if match is None:
        raise UsageError(
            f"--serving-layers «{text}»: expected FIRST,LAST, both inclusive, for example 0,39"
        )
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise UsageError(f"--serving-layers {text}: the first layer comes after the last one")
    return f"{first}:{last + 1}"


def _v1_layers(given: Mapping[str, str], peer: str | None) -> str | None:
    """`--molink-start-layer A --molink-end-layer B`, end exclusive -> `A:B`.

    Without both, a head holds all layers, as it did; a node that joins takes what is free.
    """
    if "--molink-enabled" not in given:
        return None
    names = ("--molink-start-layer", "--molink-end-layer")
    start, end = (given.get(name) for name in names)
    if start is None and end is None:
        return None if peer else "0:-1"
    if start is None or end is None:
        missing, other = names if start is None else reversed(names)
        raise UsageError(f"{other} needs {missing} beside it")
    for name, text in zip(names, (start, end), strict=True):
        if not _NUMBER.fullmatch(text):
            raise UsageError(f"{name} «{text}»: expected the number of a layer")
    first, after = int(start), int(end)
    if first < 0 or after < -1 or 0 <= after <= first:
        raise UsageError(
            f"layers {first} to {after}: the start is inclusive, the end exclusive, -1 means last"
        )
    return f"{first}:{after}"


def _notes(given: Mapping[str, str]) -> list[str]:
    reasons = _V0 | _V1
    return [f"{name} does nothing any more: {reasons[name]}" for name in given if reasons.get(name)]


def _serving(given: Mapping[str, str], layers: str | None, agent_port: int) -> list[str]:
    """Arguments of `molink serve` after MODEL."""
    host, port = given.get("--host", HOST), given.get("--port", PORT)
    http = ["--host", host, "--port", port]
    if layers is None:
        return http
    listen = f"{HOST}:{_agent_port(given) or agent_port}"
    return [*http, "--layers", layers, "--listen", listen]


def _joining(given: Mapping[str, str], layers: str | None) -> list[str]:
    """Arguments of `molink join`; the API is forwarded if a port is given for it."""
    arguments = [] if layers is None else ["--layers", layers]
    if port := given.get("--port"):
        arguments += ["--host", given.get("--host", HOST), "--port", port]
    if agent_port := _agent_port(given):
        arguments += ["--listen", f"{HOST}:{agent_port}"]
    return arguments


def _without_http(flags: list[str]) -> tuple[list[str], list[str]]:
    """The flags of the engine, and the names of those of the HTTP server."""
    kept: list[str] = []
    dropped: list[str] = []
    drops = False
    for flag in flags:
        if flag.startswith("-") and not _NUMBER.fullmatch(flag):
            drops = _is_of_http(name_of(flag))
            if drops:
                dropped.append(name_of(flag))
        if not drops:
            kept.append(flag)
    return kept, dropped


def _is_of_http(name: str) -> bool:
    return name.replace("--no-", "--", 1) in _OF_HTTP


def _agent_port(given: Mapping[str, str]) -> int:
    """0: none was named, or any."""
    text = given.get("--molink-grpc-port", "0")
    if not text.isdecimal() or int(text) >= 1 << 16:
        raise UsageError(f"--molink-grpc-port «{text}»: expected the number of a port")
    return int(text)


def _free_port() -> int:
    """The first port from 50051 on that nobody listens on, as version 0 chose it."""
    for port in range(FIRST_AGENT_PORT, FIRST_AGENT_PORT + AGENT_PORTS):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port
    return 0
