"""Process of the gateway: what clients talk to; started by the head's agent."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import uvloop

from molink.core.errors import UsageError
from molink.engine.environment import GATEWAY_VARIABLE, die_with_parent
from molink.gateway.admission import Admission
from molink.gateway.agent_client import AgentClient
from molink.gateway.gateway import Gateway
from molink.gateway.keys import Keys
from molink.gateway.options import GatewayOptions
from molink.gateway.server import GatewayServer
from molink.gateway.upstream import Upstream
from molink.node.processes import EXIT_USAGE

logger = logging.getLogger("molink.gateway")
DRAIN_S = 0.1  # how often the agent hears what is left
REFRESH_S = 2.0  # how often the file of keys is looked at


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
    given = GatewayOptions.from_json(os.environ.pop(GATEWAY_VARIABLE))
    keys = Keys(given.key_hashes, given.keys_file)
    agent = AgentClient(options.socket, given.max_outage_s)
    admission = Admission(given.limits, lambda: agent.view.at_once if agent.view else None)
    seconds = given.limits.seconds
    engine = Upstream(options.engine_socket)
    gateway = Gateway(agent, engine, keys, admission, seconds)
    server = GatewayServer(gateway, keys.tenant_of)
    await agent.knows.wait()  # it would send clients away that may wait
    await server.start(given.host, given.port, given.tls)
    tasks = [asyncio.create_task(_refresh(keys)), asyncio.create_task(_drain(agent, admission))]
    await ended.wait()
    for task in tasks:
        task.cancel()
    await server.stop()
    engine.close()


async def _drain(agent: AgentClient, admission: Admission) -> None:
    await agent.drains.wait()
    while True:
        agent.report_drained(admission.present)
        await asyncio.sleep(DRAIN_S)


async def _refresh(keys: Keys) -> None:
    said = None
    while True:
        await asyncio.sleep(REFRESH_S)
        await asyncio.to_thread(keys.refresh)
        if keys.trouble not in (None, said):
            logger.warning("%s; the keys of before count", keys.trouble)
        said = keys.trouble


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="molink-gateway", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="of the agent")
    parser.add_argument("--engine-socket", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
