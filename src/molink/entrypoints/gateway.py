"""Process of the gateway: what clients talk to; started by the head's agent."""

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

import uvloop

from molink.core.errors import UsageError
from molink.engine.environment import die_with_parent
from molink.gateway.agent_client import AgentClient
from molink.gateway.gateway import Gateway
from molink.gateway.server import GatewayServer, Tls
from molink.gateway.upstream import Upstream
from molink.node.processes import EXIT_USAGE


def main() -> None:
    die_with_parent()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    options = _parser().parse_args()
    try:
        uvloop.run(_serve(options))
    except UsageError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_USAGE)


async def _serve(options: argparse.Namespace) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    agent = AgentClient(options.socket, options.max_outage)
    server = GatewayServer(Gateway(agent, Upstream(options.engine_socket)))
    await server.start(options.host, options.port, Tls.from_json(options.tls))
    await ended.wait()
    await server.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="molink-gateway", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="of the agent")
    parser.add_argument("--engine-socket", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tls", required=True, help="JSON of a Tls")
    parser.add_argument("--max-outage", type=float, required=True, help="seconds")
    return parser


if __name__ == "__main__":
    main()
