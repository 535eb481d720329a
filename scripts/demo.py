"""What scripts/demo runs once MoLink is installed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "molink-mini"
MOLINK = ROOT / ".venv" / "bin" / "molink"
QUESTION = "What is the capital of France?"
START_TIMEOUT_S = 180.0
VLLM_FLAGS = ["--enforce-eager", "--max-model-len=1024", "--served-model-name=molink-mini"]


class DemoError(Exception):
    """The two nodes do not serve; their logs tell more."""


class Demo:
    """Two nodes as two processes, each with a home of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        token = self._folder / "token"
        serve = ["serve", str(MODEL), "--nodes=2", "--name=alpha", f"--port={self.port}"]
        self._run([*serve, "--listen=127.0.0.1:0", f"--token-file={token}", *VLLM_FLAGS], "alpha")
        self._wait(lambda: token.exists() and token.read_text().endswith("\n"))
        join = ["join", f"--token-file={token}", "--name=beta", "--listen=127.0.0.1:0"]
        self._run(join, "beta")
        self._wait(self._is_up)

    def _run(self, arguments: list[str], home: str) -> None:
        print(f"$ MOLINK_HOME={self._folder / home} molink {' '.join(arguments)}", flush=True)
        environment = os.environ | {
            "MOLINK_HOME": str(self._folder / home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        process = subprocess.Popen([MOLINK, *arguments], env=environment, start_new_session=True)
        self._processes.append(process)

    def _wait(self, is_done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_done():
            if any(process.poll() is not None for process in self._processes):
                raise DemoError("a node has ended; its last words are above")
            if time.monotonic() > deadline:
                raise DemoError(f"not up after {START_TIMEOUT_S:.0f} s")
            time.sleep(0.1)

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2.0).status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, question: str) -> None:
        """Stream the answer to the terminal."""
        print(f"\n> {question}\n", flush=True)
        body = {
            "model": "molink-mini",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 64,
            "stream": True,
        }
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                    print(delta.get("content") or "", end="", flush=True)
        print("\n", flush=True)

    def show(self) -> None:
        """`molink status`, as a person would run it on the head."""
        time.sleep(2.5)  # nodes report once a second
        environment = os.environ | {"MOLINK_HOME": str(self._folder / "alpha")}
        subprocess.run([MOLINK, "status"], env=environment, check=True)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="molink-demo-"))
    demo = Demo(folder)
    try:
        demo.start()
        demo.ask(QUESTION)
        demo.show()
        if "--once" not in sys.argv:
            print(f"\nthe API is at {demo.url}/v1 (model «molink-mini»); Ctrl-C ends it")
            signal.pause()
    except KeyboardInterrupt:
        print()
    except (DemoError, httpx.HTTPError, subprocess.CalledProcessError) as error:
        sys.exit(f"{error}; the logs are in {folder}")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # one is enough; what runs ends in seconds
            signal.signal(number, signal.SIG_IGN)
        demo.stop()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
