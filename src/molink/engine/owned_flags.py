"""vLLM's flags that a pipeline decides itself, or cannot have. Imports nothing of vLLM."""

import re
from collections.abc import Iterable

from molink.core.errors import UsageError

_NODES = "the number of nodes decides it; use --nodes or --layers"
_REPLICAS = "run one cluster for each replica"
_MACHINES = "machines join with molink join"
_HTTP = "the API is served over HTTP and TCP; use --host and --port"

_WITH_VALUE = re.compile(r"(-[nr])\d+")  # argparse takes `-n2` for `-n 2`
_OWNED = {
    "--pipeline-parallel-size": _NODES,
    "-pp": _NODES,
    "--distributed-executor-backend": "MoLink brings its own executor",
    "--scheduler-cls": "MoLink brings its own scheduler",
    "--worker-cls": "MoLink brings its own worker",
    "--async-scheduling": "several steps are in flight over a pipeline anyway",
    "--api-server-count": "one HTTP server answers for a pipeline",
    "-asc": "one HTTP server answers for a pipeline",
    "--nnodes": _MACHINES,
    "-n": _MACHINES,
    "--node-rank": _MACHINES,
    "-r": _MACHINES,
    "--master-addr": _MACHINES,
    "--master-port": _MACHINES,
    "--headless": _MACHINES,
    "--model": "it is the command's first argument, and an option of molink join",
    "--uds": _HTTP,
    "--grpc": _HTTP,
    "--grpc-port": _HTTP,
}


def refuse_owned(flags: Iterable[str]) -> None:
    """Raises UsageError that names the first flag which contradicts a pipeline, and says why."""
    for flag in flags:
        name = name_of(flag)
        is_of_replicas = name.startswith(("--data-parallel-", "-dp"))
        reason = _REPLICAS if is_of_replicas else _OWNED.get(_WITH_VALUE.sub(r"\1", name))
        if reason is not None:
            raise UsageError(f"{name} cannot be given: {reason}")


def name_of(flag: str) -> str:
    """A flag without its value, in vLLM's spelling: dashes, no underscores."""
    name = flag.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else name
