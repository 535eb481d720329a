"""What `molink doctor` looks at: each check says what it found, and how to mend what is wrong."""

import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import psutil

from molink.checkpoint.model import read_model
from molink.cluster.view import ClusterView
from molink.core.cluster import Versions
from molink.core.errors import HubError, LinkError, MolinkError, TokenError, UsageError
from molink.core.plan import LayerRange
from molink.planning.split import needed_bytes
from molink.transport.credentials import ACCEPTED, diagnose
from molink.transport.identity import NodeIdentity
from molink.transport.token import JoinToken

TIMEOUT_S = 3.0
TRIES = 5
SLOW_S = 0.1  # of a round trip, which every token pays
SKEW_S = 60.0  # certificates allow an hour; more than this is worth mending
SPARE_BYTES = 1 << 30  # of a disk


class Class(IntEnum):
    """Of what is wrong; the exit status of `molink doctor`, the first that is found."""

    NETWORK = 10
    IDENTITY = 11
    CLOCK = 12
    VERSIONS = 13
    MODEL = 14
    MACHINE = 15


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was found; `mend` says what to do, None: it is well."""

    of: Class
    name: str
    text: str
    mend: str | None = None


Proof = JoinToken | NodeIdentity


def check_network(address: str) -> list[Finding]:
    """Name, port and round trip of HOST:PORT; the rest is of no use if one of them has a mend."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port)})
    except OSError as error:
        mend = f"give the head's IP address, or mend the DNS entry of {host}"
        return [Finding(Class.NETWORK, "name", f"{host}: {error.strerror or error}", mend)]
    name = Finding(Class.NETWORK, "name", f"{host} is {', '.join(found)}")
    return [name, _check_port(host, int(port))]


def _check_port(host: str, port: int) -> Finding:
    times = []
    try:
        for _ in range(TRIES):
            began = time.perf_counter()
            with socket.create_connection((host, port), TIMEOUT_S):
                times.append(time.perf_counter() - began)
    except ConnectionRefusedError:
        text = f"{host} refuses connections to {port}"
        mend = "start molink serve there, or give the port that it has printed"
        return Finding(Class.NETWORK, "port", text, mend)
    except TimeoutError:
        text = f"{host} does not answer on port {port}"
        mend = (
            f"let TCP port {port} through its firewall; behind a router, forward the port and "
            f"start molink serve with --advertise HOST:{port}; in a container or WSL, publish it"
        )
        return Finding(Class.NETWORK, "port", text, mend)
    except OSError as error:
        mend = "mend this machine's network, or its route to the head"
        return Finding(Class.NETWORK, "port", f"{host} cannot be reached: {error}", mend)
    rtt_s = statistics.median(times)
    text = f"{port} answers, round trip {rtt_s * 1e3:.1f} ms"
    if rtt_s < SLOW_S:
        return Finding(Class.NETWORK, "port", text)
    mend = "every token waits for it once: fewer, larger stages, or speculative decoding, help"
    return Finding(Class.NETWORK, "port", f"{text}: slow", mend)


def check_identity(address: str, proof: Proof | None) -> Finding:
    """Whether the head knows this machine, or its token."""
    if proof is None:
        mend = "give the token that molink serve has printed: --token or --token-file"
        return Finding(Class.IDENTITY, "identity", "this machine has no token", mend)
    try:
        if isinstance(proof, JoinToken):
            proof.check_not_expired()
    except TokenError as error:
        mend = "make another one on the head: molink token create"
        return Finding(Class.IDENTITY, "token", str(error), mend)
    found = diagnose(address, proof)
    what = "token" if isinstance(proof, JoinToken) else "certificate"
    if ACCEPTED in str(found):
        return Finding(Class.IDENTITY, what, "the head accepts it")
    mends = {
        TokenError: "make another one on the head: molink token create",
        LinkError: "join anew with a token, or check that this is the head's agent's port",
    }
    return Finding(Class.IDENTITY, what, str(found), mends[type(found)])


def check_clock(view: ClusterView, now: float) -> Finding:
    """Certificates and tokens have dates."""
    skew_s = now - view.at
    text = f"{abs(skew_s):.0f} s {'before' if skew_s > 0 else 'behind'} the head's"
    mend = "set this machine's clock, for example with chrony or systemd-timesyncd"
    return Finding(Class.CLOCK, "clock", text, mend if abs(skew_s) > SKEW_S else None)


def check_versions(view: ClusterView, own: Versions) -> Finding:
    """Both machines must have the same."""
    mine = f"MoLink {own.molink}, vLLM {own.vllm}"
    head = f"MoLink {view.molink}, vLLM {view.vllm}"
    if mine == head:
        return Finding(Class.VERSIONS, "versions", mine)
    mend = "install the same on both: scripts/install of one commit"
    return Finding(Class.VERSIONS, "versions", f"{mine} here, {head} on the head", mend)


def check_model(name: str, home: Path) -> list[Finding]:
    """Its files, and whether this machine could hold one layer of it."""
    try:
        facts = read_model(name)
    except (UsageError, HubError) as error:
        mend = "give its folder on this machine with --model, or set HF_TOKEN for a gated one"
        return [Finding(Class.MODEL, "model", str(error), mend)]
    size = facts.num_layers * facts.layer_bytes + facts.edge_bytes
    found = [Finding(Class.MODEL, "model", f"{name}: {facts.num_layers} layers, {_gib(size)}")]
    least = needed_bytes(facts, LayerRange(0, 1))
    return [*found, *check_machine(least, home)]


def check_machine(least_bytes: int, home: Path) -> list[Finding]:
    """Memory for `least_bytes`, and a disk that is not full."""
    free = psutil.virtual_memory().available
    mend = f"a stage of one layer needs {_gib(least_bytes)}: end other programs, or take no part"
    memory = Finding(
        Class.MACHINE, "memory", f"{_gib(free)} free", mend if free < least_bytes else None
    )
    left = shutil.disk_usage(home).free
    full = f"make room on the disk of {home}: logs, state and downloads go there"
    disk = Finding(
        Class.MACHINE, "disk", f"{_gib(left)} free", full if left < SPARE_BYTES else None
    )
    return [memory, disk]


def check_device(build: str, run: Callable[[list[str]], str] | None = None) -> Finding:
    """Whether the driver answers, where vLLM was installed for CUDA.

    Args:
        build: the distribution of vLLM that is installed.
        run: runs a command and returns what it prints; raises OSError or CalledProcessError.
    """
    if build != "vllm":
        return Finding(Class.MACHINE, "device", "vLLM's build for CPUs: no driver is needed")
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.free", "--format=csv,noheader"]
    try:
        said = (run or _run)(command).strip()
    except (OSError, subprocess.SubprocessError) as error:
        mend = "install NVIDIA's driver; in a container, start it with --gpus all"
        return Finding(Class.MACHINE, "device", f"nvidia-smi: {error}", mend)
    return Finding(Class.MACHINE, "device", "; ".join(said.splitlines()))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def why(error: MolinkError) -> Finding:
    """The head answers, and does not say how its cluster is."""
    return Finding(Class.IDENTITY, "head", str(error), "join anew with a token")
