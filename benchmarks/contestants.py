"""The servers that are compared, as real processes: vLLM's own, and clusters of ours.

All get the same engine flags and one core a stage; all are asked over HTTP. vLLM's pipeline workers
spin on shared memory, so `suspend` stops vLLM's processes while another contestant is measured.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import httpx
import psutil
from models import Subject

ENGINE_FLAGS = (
    "--enforce-eager",
    "--dtype=bfloat16",
    "--max-model-len=512",
    "--max-num-seqs=64",
    "--max-num-batched-tokens=2048",
    "--no-enable-prefix-caching",
    "--disable-uvicorn-access-log",
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
IN_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
VLLM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
MOLINK = (str(Path(sys.executable).with_name("molink")),)


class ServerError(Exception):
    """A server did not start; carries the end of its log."""


class Contestant:
    """A server of one model: its processes, and what they use. Ends them on leaving `with`."""

    is_suspendable: ClassVar[bool] = False

    def __init__(self, name: str, subject: Subject) -> None:
        self.name = name
        self.subject = subject
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = tempfile.TemporaryDirectory(prefix="molink-bench-")
        self.folder = Path(self._folder.name)
        self._roots: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the processes; returns before they serve."""
        raise NotImplementedError

    def spawn(self, command: tuple[str, ...], **environment: str) -> Path:
        """Start one process of the server; returns its log."""
        log = self.folder / f"{len(self._roots)}.log"
        own = {"VLLM_RPC_BASE_PATH": str(self.folder)}  # otherwise sockets stay in /tmp
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **own, **environment},
                start_new_session=True,  # Ctrl-C reaches the benchmark alone, which ends them
            )
        self._roots.append(process)
        return log

    def wait_until_serving(self) -> None:
        """Raises ServerError if a process ends first, or after START_TIMEOUT_S."""
        with httpx.Client(base_url=self.url, timeout=2.0, verify=False) as client:
            for _ in self.waiting():
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/health").status_code == httpx.codes.OK:
                        return

    def waiting(self) -> Iterator[None]:
        """Ticks while all processes live."""
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_at and all(root.poll() is None for root in self._roots):
            yield
            time.sleep(0.2)
        logs = (path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))
        raise ServerError(f"{self.name} did not start:\n" + "\n".join(logs))

    def processes(self) -> list[tuple[str, psutil.Process]]:
        """Every process of the server with the name of what it does."""
        found = []
        for index, root in enumerate(self._roots):
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(root.pid)
                found += [(_role(p, index), p) for p in (top, *top.children(recursive=True))]
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """User and system seconds of every process since it started."""
        return self._sums(lambda process: sum(process.cpu_times()[:2]))

    def resident_bytes(self) -> dict[str, float]:
        return self._sums(lambda process: float(process.memory_info().rss))

    def _sums(self, figure: Callable[[psutil.Process], float]) -> dict[str, float]:
        used: dict[str, float] = {}
        for role, process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                used[role] = used.get(role, 0.0) + figure(process)
        return used

    def cluster(self) -> dict[str, Any] | None:
        """What `/cluster` says; None where there is none."""
        return None

    def suspend(self) -> None:
        """Stop the processes where waiting costs CPU."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.is_suspendable:
            for _, process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def stop(self) -> None:
        """End every process: politely first, then for certain."""
        self.resume()
        processes = [process for _, process in self.processes()]
        for root in self._roots:
            root.terminate()
        _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for root in self._roots:
            root.wait()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Vllm(Contestant):
    """vLLM's own server on one core, or its own pipeline, mended for the CPU.

    One stage runs inside the engine's process: the executor that vLLM takes on a CPU would put it
    into a second one, and the first would spin on shared memory, on a second core.
    """

    is_suspendable = True

    def __init__(
        self, name: str, subject: Subject, stages: int = 1, flags: tuple[str, ...] = ()
    ) -> None:
        super().__init__(name, subject)
        self._stages = stages
        self._flags = flags

    def start(self) -> None:
        flags = [f"--model={self.subject.path}", f"--port={self.port}", *ENGINE_FLAGS, *self._flags]
        if self._stages == 1:
            self.spawn((*VLLM, *flags, f"--distributed-executor-backend={IN_PROCESS}"))
            return
        flags += [f"--pipeline-parallel-size={self._stages}", "--distributed-executor-backend=mp"]
        flags += ["--worker-cls=mended_worker.MendedWorker"]
        self.spawn((*VLLM, *flags), PYTHONPATH=str(Path(__file__).parent))


class VllmDefault(Contestant):
    """vLLM's own server with the executor that it chooses itself."""

    is_suspendable = True

    def start(self) -> None:
        self.spawn((*VLLM, f"--model={self.subject.path}", f"--port={self.port}", *ENGINE_FLAGS))


class MolinkAlone(Contestant):
    """`molink serve MODEL` without other nodes."""

    is_suspendable = True

    def start(self) -> None:
        flags = ("serve", str(self.subject.path), f"--port={self.port}", *ENGINE_FLAGS)
        self.spawn((*MOLINK, *flags))


class Molink(Contestant):
    """A cluster of ours on loopback: real agents, mutual TLS, one node for each stage.

    Args:
        source: another checkout, to run MoLink as it is there.
    """

    def __init__(
        self,
        name: str,
        subject: Subject,
        stages: int,
        flags: tuple[str, ...] = (),
        source: Path | None = None,
    ) -> None:
        super().__init__(name, subject)
        self._ranges = split_evenly(subject.num_layers, stages)
        self._flags = flags
        self._environment = {"MOLINK_HOME": str(self.folder / "home")}
        if source is not None:
            self._environment["PYTHONPATH"] = str(source.resolve() / "src")

    def start(self) -> None:
        token = self.folder / "token"
        head = ["serve", str(self.subject.path), f"--port={self.port}", "--name=node-0"]
        head += [f"--layers={self._ranges[0]}", "--listen=127.0.0.1:0", f"--token-file={token}"]
        self.spawn((*MOLINK, *head, *ENGINE_FLAGS, *self._flags), **self._environment)
        for _ in self.waiting():
            if token.exists() and token.read_text():
                break
        for index, layers in enumerate(self._ranges[1:], start=1):
            member = ["join", f"--token-file={token}", "--listen=127.0.0.1:0"]
            member += [f"--name=node-{index}", f"--layers={layers}"]
            log = self.spawn((*MOLINK, *member), **self._environment)
            for _ in self.waiting():  # so that nodes are numbered like stages
                if "joined cluster" in log.read_text():
                    break

    def cluster(self) -> dict[str, Any]:
        view: dict[str, Any] = httpx.get(f"{self.url}/cluster", timeout=5.0, verify=False).json()
        return view


def split_evenly(num_layers: int, stages: int) -> list[str]:
    """Layer ranges as the command line takes them; earlier stages get what is left over."""
    bounds = [-(-num_layers * index // stages) for index in range(stages + 1)]
    return [f"{start}:{end}" for start, end in pairwise(bounds)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _role(process: psutil.Process, index: int) -> str:
    """What a process of the tree of root number `index` does."""
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return "other"
    if found := re.search(r"molink\.entrypoints\.stage .*--node=(\d+)", command):
        return f"stage {found[1]}"
    if found := re.search(r"VLLM::Worker(?:_PP(\d+))?", command):
        return f"stage {found[1] or 0}"
    if "VLLM::EngineCore" in command:
        return "engine core"
    if "entrypoints.openai.api_server" in command or "molink.entrypoints.engine" in command:
        return "api server"
    if "molink.entrypoints.gateway" in command:
        return "gateway"
    return f"agent {index}" if re.search(r"molink (serve|join) ", command) else "other"
