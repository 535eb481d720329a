"""Process of one rank of a stage; started by the node's agent."""

import argparse
import fcntl
import logging
import os
import sys
from pathlib import Path
from typing import Any

from molink.core.errors import HubError, LinkError, UsageError
from molink.core.ids import Address, NodeId, Port
from molink.engine.environment import die_with_parent, export, prepare_environment
from molink.node.download import StageFiles, Tell
from molink.node.processes import EXIT_HUB_FAILED, EXIT_USAGE
from molink.wire.to_stage import LoadStage


def main() -> None:
    die_with_parent()
    options = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    prepare_environment()
    export("VLLM_RPC_BASE_PATH", str(options.socket.parent))
    # vLLM reads the environment while it is imported.
    from molink.engine.config import engine_parser
    from molink.engine.kept import StaleStageError
    from molink.engine.probe import measure
    from molink.engine.stage import StageLoop
    from molink.engine.types import build_codec
    from molink.engine.worker import StageOptions
    from molink.transport.local import LocalSocket
    from molink.wire import to_agent
    from molink.wire.frames import Kind
    from molink.wire.to_agent import Downloading, Notice

    parser = engine_parser("molink join")
    parser.parse_args([f"--model={options.model}", *options.flags])
    agent = Address(NodeId(options.node), Port.AGENT)
    socket = LocalSocket(options.socket, Address(NodeId(options.node), Port.STAGE), options.rank)

    def tell(message: Downloading | Notice) -> None:
        socket.send(Kind.CONTROL, agent, [to_agent.encode(message)])

    settings = StageOptions(
        find_model=lambda load: _bring(_files(options, parser, load), tell),
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
    except StaleStageError as error:
        sys.stderr.write(f"{error}: starting anew\n")
        sys.stderr.flush()
        os._exit(1)
    except (UsageError, HubError) as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_HUB_FAILED)


def _files(options: argparse.Namespace, parser: Any, load: LoadStage) -> StageFiles:
    head_flags = [f"--model={options.model}", *load.engine_flags]
    flags = parser.parse_args([*head_flags, *options.flags])
    return StageFiles(
        model=options.model,
        revision=parser.parse_args(head_flags).revision,  # one for all nodes
        layers=load.layers,
        num_layers=sum(load.partition),
        load_format=str(flags.load_format),
        with_code=flags.trust_remote_code,
        cache=Path(flags.download_dir) if flags.download_dir else None,
        run_folder=options.run_folder,
    )


def _bring(files: StageFiles, tell: Tell) -> str:
    """Have the stage's files here, one rank after the other. Raises UsageError or HubError."""
    with (files.run_folder / "files.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return files.bring(tell)


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
