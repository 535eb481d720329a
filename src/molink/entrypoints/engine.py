"""Process of the engine: vLLM's OpenAI server over the pipeline; started by the head's agent."""

import argparse
import json
import os
from pathlib import Path

from molink.engine.environment import (
    FLAGS_VARIABLE,
    OUTAGE_VARIABLE,
    PACING_VARIABLE,
    PARENT_VARIABLE,
    SERVER_FLAGS_VARIABLE,
    SOCKET_VARIABLE,
    WIRE_VARIABLE,
    die_with_parent,
    export,
    prepare_environment,
)


def main() -> None:
    die_with_parent()
    export(PARENT_VARIABLE, str(os.getpid()))  # of vLLM's engine core
    options = _parser().parse_args()
    prepare_environment()
    export("VLLM_RPC_BASE_PATH", str(options.run_folder))
    # vLLM reads the environment while it is imported.
    import uvloop

    from molink.engine.agent_client import AgentClient
    from molink.engine.server import parse_flags, serve

    flags = json.loads(os.environ.pop(SERVER_FLAGS_VARIABLE))
    arguments, engine_flags = parse_flags(options.model, str(options.http), flags)
    export(SOCKET_VARIABLE, str(options.socket))
    export(FLAGS_VARIABLE, json.dumps(engine_flags))
    export(WIRE_VARIABLE, options.wire)
    export(PACING_VARIABLE, options.pacing)
    export(OUTAGE_VARIABLE, str(options.max_outage))
    agent = AgentClient(options.socket)
    pipeline = agent.wait_for_pipeline()
    uvloop.run(serve(arguments, pipeline.stages, agent.report_serving))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="molink-engine", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--run-folder", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--http", type=Path, required=True, help="socket to answer at")
    parser.add_argument("--wire", required=True, help="JSON of a WireFormat")
    parser.add_argument("--pacing", required=True, help="JSON of a Pacing")
    parser.add_argument("--max-outage", type=float, required=True, help="seconds")
    return parser


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # vLLM's engine core begins here: a spawned process imports its parent's main module first, and
    # would otherwise wait for a parent that was killed meanwhile.
    die_with_parent()
