"""Process of one rank of a stage; started by the node's agent."""

import argparse
import logging
import os
from pathlib import Path

from molink.core.errors import LinkError
from molink.core.ids import Address, NodeId, Port
from molink.engine.environment import die_with_parent, export, prepare_environment


def main() -> None:
    die_with_parent()
    options = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    prepare_environment()
    export("VLLM_RPC_BASE_PATH", str(options.socket.parent))
    # vLLM reads the environment while it is imported.
    from molink.engine.config import engine_parser
    from molink.engine.probe import measure
    from molink.engine.stage import StageLoop
    from molink.engine.types import build_codec
    from molink.engine.worker import StageOptions
    from molink.transport.local import LocalSocket
    from molink.wire import to_agent
    from molink.wire.frames import Kind

    engine_parser("molink join").parse_args([f"--model={options.model}", *options.flags])
    agent = Address(NodeId(options.node), Port.AGENT)
    socket = LocalSocket(options.socket, Address(NodeId(options.node), Port.STAGE), options.rank)
    settings = StageOptions(
        model=options.model,
        rank=options.rank,
        tensor_parallel_size=options.tensor_parallel_size,
        node_flags=options.flags,
        run_folder=options.run_folder,
    )
    socket.send(Kind.CONTROL, agent, [to_agent.encode(measure(options.tensor_parallel_size))])
    try:
        StageLoop(socket, build_codec(), settings).run()
    except LinkError:
        os._exit(0)  # the agent is gone, and with it every reason to run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="molink-stage", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--tensor-parallel-size", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--run-folder", type=Path, required=True)
    parser.add_argument("flags", nargs="*", help="the node's own vLLM engine flags")
    return parser


if __name__ == "__main__":
    main()
