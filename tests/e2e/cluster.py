"""Real clusters on this machine: `molink serve` and `molink join` as a person would run them.

    with Cluster(model, nodes=2, flags=["--max-model-len", "512"]) as cluster:
        cluster.client.completions.create(model=cluster.model, prompt="Hello")
        cluster.view().stages

Every command is a `Machine`: its own MOLINK_HOME, its own TMPDIR, its own log. All that a machine
starts inherits a mark in its environment, by which it is found again, whatever session it is in.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import openai
import psutil
import torch

from molink.cluster.view import ClusterView, decode_view

START_S = 120.0  # four stages on two cores need about 40 s
STOP_S = 20.0
LINGER_S = 3.0
TAIL_LINES = 25
POLL_S = 0.05
MARK = "MOLINK_TEST_MACHINE"  # holds the machine's folder
COMMAND = "from molink.cli.main import app; app()"
LIST_SOCKETS = """
import json, psutil, socket, sys
sockets = [s for pid in sys.argv[1:] for s in psutil.Process(int(pid)).net_connections("inet")]
waiting = lambda s: s.status == "LISTEN" or s.type == socket.SOCK_DGRAM and not s.raddr
print(json.dumps([s.laddr for s in sockets if waiting(s)]))
"""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # as in a pipeline: the other one draws other samples
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles for 10 s when it is first asked for logprobs
    "NO_COLOR": "1",
}
FLAGS = ("--dtype=float32", "--enforce-eager")
if torch.cuda.is_available():  # all engines share it, and none may take it for itself
    FLAGS += ("--gpu-memory-utilization=0.05", f"--kv-cache-memory-bytes={1 << 30}")

Request = dict[str, Any]
"""The body of a request, without the model."""
Answer = dict[str, Any]


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    """The ids of every choice of every answer, in order."""
    return [choice["token_ids"] for answer in answers for choice in answer["choices"]]


class ClusterError(AssertionError):
    """A machine did not do what it was waited for; the message ends with the tails of its logs."""


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait until `condition` holds. Raises ClusterError if it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(POLL_S)


class Machine:
    """One `molink` command that runs, with everything it started.

    Args:
        folder: its own; short, because unix sockets lie in it.
        arguments: of `molink`.
        prefix: put before the command, for example `ip netns exec NAME`.
        preamble: Python that runs before the command, to make it another version of itself.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        preamble: str = "",
    ) -> None:
        self.name = folder.name
        self.folder = folder
        self.home = folder / "home"
        self.tmp = folder / "tmp"
        self.tmp.mkdir(parents=True)
        self._log = folder / "log"
        self._prefix = prefix
        own = {"MOLINK_HOME": str(self.home), "TMPDIR": str(self.tmp), MARK: str(folder)}
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-c", f"{preamble}\n{COMMAND}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT | own | (environment or {}),
                cwd=folder,
                start_new_session=True,
                preexec_fn=_end_with_tests,
            )

    @property
    def log(self) -> str:
        """What the command has said."""
        return self._log.read_text(errors="replace")

    def logs(self) -> str:
        """The ends of all its logs: the command's, the engine's, the stages'."""
        files = [self._log, *sorted(self.home.glob("*/logs/*.log"))]
        return "\n".join(
            f"--- {self.name}: {file.name}\n" + "\n".join(_tail(file)) for file in files
        )

    def wait_for(self, text: str, timeout_s: float = START_S) -> None:
        """Wait until the command has said `text`. Raises ClusterError if it ends before."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log:
            if self.process.poll() is not None and text not in self.log:
                raise ClusterError(
                    f"{self.name} ended with {self.process.returncode} before it said «{text}»\n"
                    + self.logs()
                )
            if time.monotonic() > deadline:
                raise ClusterError(f"{self.name} did not say «{text}»\n" + self.logs())
            time.sleep(POLL_S)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """The exit status. Raises ClusterError if it does not end."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{self.name} does not end\n" + self.logs()) from None

    def processes(self, part: str = "") -> list[psutil.Process]:
        """All of its processes that live and whose command line contains `part`.

        Parts of note: `molink.entrypoints.engine`, `molink.entrypoints.stage`.
        """
        return [process for process in _marked(self.folder) if part in _command(process)]

    def listening(self, part: str = "") -> list[tuple[str, int]]:
        """(host, port) of every TCP and UDP socket on which those processes wait for others.

        Looked up by a process on the machine itself: the kernel shows it only its own network.
        """
        pids = [str(process.pid) for process in self.processes(part)]
        command = [*self._prefix, sys.executable, "-c", LIST_SOCKETS, *pids]
        found = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        return [(host.removeprefix("::ffff:"), port) for host, port in json.loads(found)]

    def signal(self, number: signal.Signals) -> None:
        """Signal the command alone, as `kill` does."""
        self.process.send_signal(number)

    def kill_stage(self) -> None:
        """Kill the one process of its stage."""
        (stage,) = self.processes("molink.entrypoints.stage")
        stage.kill()

    def end(self) -> None:
        """End all of its processes for certain."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(STOP_S)

    def shared_memory(self) -> set[Path]:
        """Files in /dev/shm that its processes have mapped now."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                found |= {line.split()[5] for line in maps.splitlines() if " /dev/shm/" in line}
        return {Path(name) for name in found}

    def left_over(self) -> list[str]:
        """Processes and run folders that are still there."""
        processes = [f"process {p.pid}: {_command(p)}" for p in self.processes()]
        return processes + [f"folder {path}" for path in self.tmp.glob("molink-*")]


class Cluster:
    """A head and its members, from start to end; a context manager.

    Leaving it stops the head, and asserts that the members end with it and that no process, run
    folder or shared memory is left.

    Args:
        model: folder of the model.
        nodes: how many machines, the head counted. 1 is plain vLLM, without MoLink.
        layers: pins, one per machine, head first ("A:B", "none", None); instead of `--nodes`.
        flags: vLLM's flags for the head, besides float32 and eager mode.
        head_arguments: further arguments of `molink serve`.
        member_arguments: further arguments of every `molink join`.
    """

    def __init__(
        self,
        model: Path,
        nodes: int = 2,
        *,
        layers: Sequence[str | None] = (),
        flags: Sequence[str] = (),
        head_arguments: Sequence[str] = (),
        member_arguments: Sequence[str] = (),
    ) -> None:
        self.model = str(model)
        self.url = f"http://127.0.0.1:{free_port()}"
        self.members: list[Machine] = []
        self._nodes = len(layers) or nodes
        self._layers = layers
        self._arguments = [*FLAGS, *flags, *head_arguments]
        self._member_arguments = member_arguments
        self._root = Path(tempfile.mkdtemp(prefix="mo-", dir="/tmp"))
        self._shared_memory: set[Path] = set()

    @property
    def machines(self) -> list[Machine]:
        return [self.head, *self.members]

    @property
    def token_file(self) -> Path:
        return self._root / "token"

    def start(self) -> Self:
        """Start all machines and wait until the cluster serves."""
        self.start_head()
        if self._nodes > 1:
            for pin in self._layers[1:] or [None] * (self._nodes - 1):
                self.add_member(layers=pin)
        self.wait_until_serving()
        return self

    def start_head(self, name: str = "head", **options: Any) -> Machine:
        """Start the head alone and wait until it takes members; `options` are Machine's."""
        arguments = ["serve", self.model, f"--port={self.url.rpartition(':')[2]}"]
        if self._nodes > 1:
            arguments += ["--listen=127.0.0.1:0", f"--token-file={self.token_file}", "--name=head"]
            arguments += (
                [f"--layers={self._layers[0]}"] if self._layers else [f"--nodes={self._nodes}"]
            )
        self.head = Machine(self._root / name, [*arguments, *self._arguments], **options)
        if self._nodes > 1:
            self.head.wait_for("molink join --token")
        return self.head

    def add_member(
        self,
        *,
        layers: str | None = None,
        arguments: Sequence[str] = (),
        name: str | None = None,
        **options: Any,
    ) -> Machine:
        """Start another machine that joins; does not wait. `options` are Machine's."""
        name = name or f"node{len(self.members) + 1}"
        pin = [f"--layers={layers}"] if layers else []
        own = [f"--token-file={self.token_file}", "--listen=127.0.0.1:0", f"--name={name}", *pin]
        all_arguments = ["join", *own, *self._member_arguments, *arguments]
        self.members.append(Machine(self._root / name, all_arguments, **options))
        return self.members[-1]

    def wait_until_serving(self, timeout_s: float = START_S) -> None:
        if self._nodes > 1:
            self.head.wait_for("serving at", timeout_s)
            eventually(lambda: self.view().serving, 5, "/cluster says that it serves")
        else:
            self.head.wait_for("Application startup complete", timeout_s)
        for machine in self.machines:
            self._shared_memory |= machine.shared_memory()

    @cached_property
    def http(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=None)
        return httpx.Client(base_url=self.url, timeout=60.0, trust_env=False, limits=limits)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False, timeout=60.0),
        )

    def ask(self, requests: Sequence[Request], path: str = "/v1/completions") -> list[Answer]:
        """Send all requests at the same time; answers in their order. Raises for one refused."""

        def send(request: Request) -> Answer:
            response = self.http.post(path, json={"model": self.model, **request})
            assert response.is_success, response.text
            answer: Answer = response.json()
            return answer

        with ThreadPoolExecutor(max_workers=len(requests)) as threads:
            return list(threads.map(send, requests))

    def view(self) -> ClusterView:
        """`/cluster`."""
        return decode_view(self.http.get("/cluster").raise_for_status().content)

    def has_status(self, status: int) -> bool:
        """Whether `/health` answers so."""
        return self.http.get("/health").status_code == status

    def metrics(self) -> dict[str, float]:
        """`/metrics`: for each name the sum over its labels."""
        sums: dict[str, float] = {}
        for line in self.http.get("/metrics").raise_for_status().text.splitlines():
            if line and not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                name = series.partition("{")[0]
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def logs(self) -> str:
        return "\n".join(machine.logs() for machine in self.machines)

    def stop(self) -> None:
        """Stop the head politely, wait for the members to end with it, check what is left."""
        try:
            if self.head.process.poll() is None:
                self.head.signal(signal.SIGTERM)
            for machine in self.machines:
                machine.wait()
            self.check_nothing_left()
        finally:
            self.end()

    def check_nothing_left(self) -> None:
        """Raises ClusterError with what the machines left behind.

        Python's own helpers end when they see that their parents have, a moment later.
        """
        deadline = time.monotonic() + LINGER_S
        while left := self._left_over():
            if time.monotonic() > deadline:
                raise ClusterError("left behind:\n" + "\n".join(left))
            time.sleep(POLL_S)

    def _left_over(self) -> list[str]:
        left = [f"{m.name}: {item}" for m in self.machines for item in m.left_over()]
        return left + [f"shared memory {path}" for path in self._shared_memory if path.exists()]

    def end(self) -> None:
        """End everything at once, and remove its files."""
        for name in self.__dict__.keys() & {"http", "client"}:
            self.__dict__[name].close()
        for machine in self.machines:
            machine.end()
        shutil.rmtree(self._root, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.end()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.stop()
        else:
            self.end()


def _end_with_tests() -> None:
    """Ask the kernel to stop this process when the one that started it is killed (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _tail(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines()[-TAIL_LINES:]


def _marked(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # vLLM writes its processes' titles over their environment; all keep their folder.
            places = (process.environ().get(MARK), process.cwd())
            if str(folder) in places and not _is_zombie(process):
                yield process


def _is_zombie(process: psutil.Process) -> bool:
    return bool(process.status() == psutil.STATUS_ZOMBIE)


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
