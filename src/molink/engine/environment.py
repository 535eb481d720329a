"""What a process of ours is given by its parent, and how it dies with it."""

import ctypes
import os
import signal

PARENT_VARIABLE = "MOLINK_PARENT"  # process id of who starts a process of ours
SOCKET_VARIABLE = "MOLINK_AGENT_SOCKET"  # path of the local agent's socket
SERVER_FLAGS_VARIABLE = "MOLINK_SERVER_FLAGS"  # JSON list: all of the user's vLLM flags
GATEWAY_VARIABLE = "MOLINK_GATEWAY"  # JSON of a gateway's options
FLAGS_VARIABLE = "MOLINK_ENGINE_FLAGS"  # JSON list: the user's vLLM engine flags
PACING_VARIABLE = "MOLINK_PACING"  # JSON: how the pipeline is filled
OUTAGE_VARIABLE = "MOLINK_MAX_OUTAGE"  # seconds that requests wait for a lost stage
WIRE_VARIABLE = "MOLINK_WIRE"  # JSON: how stages write their activations

_PR_SET_PDEATHSIG = 1

_DEFAULTS = {
    # Runner V2 opens torch groups of its own over the pipeline.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # A fork would copy our threads' locks, and begin without `die_with_parent`.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # vLLM would bind every stage of a machine to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # The gateway keeps its connections, and closes them itself.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(24 * 3600),
    # Stages may download for hours before they load.
    "VLLM_ENGINE_READY_TIMEOUT_S": str(7 * 24 * 3600),
    # Processes of ours talk to nobody but their agent.
    "VLLM_NO_USAGE_STATS": "1",
}

# The ranks of a stage share a machine; torch would listen where the host's name leads.
_LOOPBACK_ONLY = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def prepare_environment() -> None:
    """Set what vLLM reads while it is imported, unless the user has set it."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in _LOOPBACK_ONLY:
        os.environ[name] = "lo"


def export(name: str, value: str) -> None:
    """Set a variable for this process and those it starts."""
    os.environ[name] = value


def set_partition(partition: list[int]) -> None:
    """Layers of every stage, for vLLM's `get_pp_indices`."""
    os.environ["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, partition))


def die_with_parent() -> None:
    """Ask the kernel to end this process when the thread that started it ends (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):  # it ended before the kernel was asked
        os._exit(1)
