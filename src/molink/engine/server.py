"""vLLM's own OpenAI server over a pipeline."""

import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import vllm.envs as envs
from pydantic import ValidationError
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, setup_server

from molink.core.errors import UsageError
from molink.engine.config import FlagParser, engine_flags_of
from molink.engine.environment import set_partition
from molink.engine.executor import PipelineExecutor
from molink.engine.refusals import refuse_indivisible

SCHEDULER = "molink.engine.scheduler.PipelineScheduler"


def parse_flags(model: str, host: str, port: int, flags: list[str]) -> tuple[Any, list[str]]:
    """vLLM's arguments, and the user's engine flags, for the stages.

    Exits with status 2 and vLLM's message for what it does not take.
    """
    parser = FlagParser(prog="molink serve", allow_abbrev=False)
    own = [f"--model={model}", f"--host={host}", f"--port={port}"]
    arguments = make_arg_parser(parser).parse_args([*own, *flags])
    if arguments.served_model_name is None:
        arguments.served_model_name = [model]
    validate_parsed_serve_args(arguments)
    with _saying_what_is_wrong():
        refuse_indivisible(AsyncEngineArgs.from_cli_args(arguments).create_model_config())
    of_user = [flag for flag in parser.normalised if flag not in own]
    return arguments, engine_flags_of(of_user)


@contextmanager
def _saying_what_is_wrong() -> Iterator[None]:
    """End like the parser, in one line, when vLLM's configuration or MoLink refuses the model."""
    try:
        yield
        return
    except ValidationError as error:
        reasons = "; ".join(" ".join(reason["msg"].split()) for reason in error.errors())
    except UsageError as error:
        reasons = str(error)
    print(f"molink serve: error: {reasons}", file=sys.stderr)  # noqa: T201
    raise SystemExit(2)


async def serve(
    arguments: Namespace, partition: list[int], customise: Callable[[Any], None]
) -> None:
    """Run the server until it is told to end.

    Args:
        partition: layers of every stage, in order.
        customise: gets the FastAPI application before it starts.
    """
    set_partition(partition)
    arguments.pipeline_parallel_size = len(partition)
    arguments.distributed_executor_backend = PipelineExecutor
    arguments.scheduler_cls = SCHEDULER
    arguments.async_scheduling = False
    _, listening = setup_server(arguments, reuse_port=False)
    async with AsyncExitStack() as stack:
        with _saying_what_is_wrong():
            client = await stack.enter_async_context(build_async_engine_client(arguments))
        tasks = await client.get_supported_tasks()
        app = build_app(arguments, tasks, client.model_config)
        customise(app)
        await init_app_state(client, app.state, arguments, tasks)
        shutdown = await _serve_http(app, listening, arguments)
    try:
        await shutdown
    finally:
        listening.close()


async def _serve_http(app: Any, listening: socket.socket, arguments: Namespace) -> Any:
    return await serve_http(
        app,
        sock=listening,
        enable_ssl_refresh=arguments.enable_ssl_refresh,
        host=arguments.host,
        port=arguments.port,
        log_level=arguments.uvicorn_log_level,
        access_log=not arguments.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        ssl_keyfile=arguments.ssl_keyfile,
        ssl_certfile=arguments.ssl_certfile,
        ssl_ca_certs=arguments.ssl_ca_certs,
        ssl_cert_reqs=arguments.ssl_cert_reqs,
        ssl_ciphers=arguments.ssl_ciphers,
        h11_max_incomplete_event_size=arguments.h11_max_incomplete_event_size,
        h11_max_header_count=arguments.h11_max_header_count,
    )
