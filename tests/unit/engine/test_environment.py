"""What vLLM reads from the environment is what we set there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import envs
from vllm.distributed.utils import get_pp_indices

from molink.engine.environment import PARENT_VARIABLE, prepare_environment, set_partition

MORTAL = """
from molink.engine.environment import die_with_parent
die_with_parent()
print("lives")
"""

IN_CONTAINER = (
    """
import os
os.getppid = lambda: 1
"""
    + MORTAL
)

# What vLLM's server does: it starts the engine core, which imports the entry point anew.
ENGINE = """
import importlib.util, multiprocessing, sys
from molink.entrypoints import engine

def start_core():
    core = multiprocessing.get_context("spawn").Process(target=engine.die_with_parent)
    core.start()
    core.join()
    sys.exit(core.exitcode)

sys.modules["__main__"].__spec__ = importlib.util.find_spec("molink.entrypoints.engine")
sys.argv += ["--socket=s", "--run-folder=r", "--model=m", "--http=h"]
sys.argv += ["--wire={}", "--pacing={}", "--max-outage=0"]
engine.prepare_environment = start_core
engine.main()
"""


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_vllm_knows_every_variable_of_its_own_that_we_set() -> None:
    os.environ.clear()
    prepare_environment()
    ours = {name for name in os.environ if name.startswith("VLLM_")}
    assert ours
    assert ours <= set(envs.environment_variables)


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    prepare_environment()
    assert envs.VLLM_CPU_OMP_THREADS_BIND == "0-3"
    assert envs.VLLM_USE_V2_MODEL_RUNNER is False


def test_ranks_of_a_stage_listen_on_loopback_whatever_was_set() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    prepare_environment()
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_vllm_reads_the_layers_of_every_stage(partition: list[int]) -> None:
    set_partition(partition)
    for index in range(len(partition)):
        expected = sum(partition[:index]), sum(partition[: index + 1])
        assert get_pp_indices(sum(partition), index, len(partition)) == expected


def run(program: str, parent: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {PARENT_VARIABLE: str(parent)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(("program", "parent"), [(MORTAL, os.getpid()), (IN_CONTAINER, 1)])
def test_a_process_lives_while_the_one_that_started_it_does(program: str, parent: int) -> None:
    assert run(program, parent).stdout == "lives\n"


def test_a_process_whose_parent_ended_first_ends() -> None:
    ended = run(MORTAL, parent=os.getppid())
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "")


def test_a_process_dies_with_the_one_that_started_it() -> None:
    child = f"{MORTAL}\nimport sys, time; sys.stdout.flush(); time.sleep(60)"
    program = f"""
import os, subprocess, sys
os.environ["{PARENT_VARIABLE}"] = str(os.getpid())
with subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE) as child:
    print(child.pid, child.stdout.readline().decode(), flush=True)
    os.kill(os.getpid(), {signal.SIGKILL.value})
"""
    pid, said = run(program, os.getpid()).stdout.split()
    assert said == "lives"
    for _ in range(100):
        if is_over(int(pid)):
            return
        time.sleep(0.01)
    pytest.fail("it lives on")


def is_over(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_engine_core_is_a_child_of_the_engine() -> None:
    """Both when it imports the engine's module and when its executor begins."""
    ended = run(ENGINE, os.getpid())
    assert ended.returncode == 0, ended.stderr
