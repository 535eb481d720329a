"""vLLM's own OpenAI server over a pipeline."""

import asyncio
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.usage.usage_lib import UsageContext

from molink.core.errors import MolinkError, UsageError
from molink.engine.config import FlagParser, engine_flags_of
from molink.engine.environment import set_partition
from molink.engine.executor import PipelineExecutor
from molink.engine.objections import in_one_line, one_line
from molink.engine.owned_flags import refuse_owned
from molink.engine.refusals import refuse_indivisible
from molink.engine.types import dtype_name
from molink.planning.dtypes import shared_dtype
from molink.wire.to_engine import StagePlace

logger = logging.getLogger("molink.engine")
WATCH_S = 0.05
SCHEDULER = "molink.engine.scheduler.PipelineScheduler"


def parse_flags(model: str, socket: str, flags: list[str]) -> tuple[Any, list[str]]:
    """vLLM's arguments, and the user's engine flags, for the stages.

    Exits with status 2 and vLLM's message for what it does not take.
    """
    parser = FlagParser(prog="molink serve", allow_abbrev=False)
    own = [f"--model={model}", f"--uds={socket}"]
    arguments = make_arg_parser(parser).parse_args([*own, *flags])
    if arguments.served_model_name is None:
        arguments.served_model_name = [model]
    validate_parsed_serve_args(arguments)
    of_user = [flag for flag in parser.normalised if flag not in own]
    with _saying_what_is_wrong():
        refuse_owned(of_user)  # again: there may have been a file of flags
        _refuse_gateways(arguments)
        _check(arguments)
    return arguments, engine_flags_of(of_user)


def _refuse_gateways(arguments: Namespace) -> None:
    """Raises UsageError for flags of the gateway, which takes them from the command line."""
    for name in ("api_key", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "enable_ssl_refresh"):
        if getattr(arguments, name):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} cannot be given here: only on the command line of a head")


def _check(arguments: Namespace) -> None:
    """Have vLLM judge model and flags before any node is waited for. Raises UsageError."""
    args = AsyncEngineArgs.from_cli_args(arguments)
    args.distributed_executor_backend = PipelineExecutor  # so it looks for no devices
    with in_one_line():
        config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    refuse_indivisible(config.model_config)


@contextmanager
def _saying_what_is_wrong() -> Iterator[None]:
    """End like the parser, in one line, when vLLM's configuration or MoLink refuses the model."""
    try:
        yield
    except (MolinkError, ValidationError) as error:
        print(f"molink serve: error: {one_line(error)}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


async def serve(
    arguments: Namespace, stages: Sequence[StagePlace], answers: Callable[[int], None]
) -> None:
    """Run the server until it is told to end, or its engine core is gone.

    Args:
        stages: of the pipeline, in order.
        answers: called when it answers, with the requests that the engine computes at once.
    """
    set_partition([stage.end - stage.start for stage in stages])
    arguments.pipeline_parallel_size = len(stages)
    arguments.distributed_executor_backend = PipelineExecutor
    arguments.scheduler_cls = SCHEDULER
    arguments.async_scheduling = False
    with _customised_app(answers), _saying_what_is_wrong():
        _settle_dtype(arguments, stages)
        await entry.run_server(arguments)


def _settle_dtype(arguments: Namespace, stages: Sequence[StagePlace]) -> None:
    """What «auto» means here may be more than the device of another stage can do."""
    model = AsyncEngineArgs.from_cli_args(arguments).create_model_config()
    wanted = dtype_name(model.dtype)
    of_nodes = {stage.name: stage.dtypes for stage in stages}
    arguments.dtype = shared_dtype(wanted, of_nodes, is_fixed=arguments.dtype != "auto")
    if arguments.dtype != wanted:
        logger.warning("computing in %s: not every stage can in %s", arguments.dtype, wanted)


@contextmanager
def _customised_app(answers: Callable[[int], None]) -> Iterator[None]:
    """Watch over the application that `run_server` builds.

    `run_server` finds `build_app` in its own module; breaks if it gets it from elsewhere.
    """
    build_app = entry.build_app

    def build(*args: Any, **kwargs: Any) -> Any:
        app = build_app(*args, **kwargs)
        # vLLM has built its stack already, so ours goes around it instead of into it.
        stack = app.middleware_stack or app.build_middleware_stack()
        app.middleware_stack = _Watch(app, stack, answers)
        return app

    entry.build_app = build
    try:
        yield
    finally:
        entry.build_app = build_app


class _Watch:
    """ASGI: says when the application has started, and ends the process with the engine core.

    vLLM looks for a dead core every 5 s, and closes politely: the gateway would wait for that long
    before another engine could begin.
    """

    def __init__(self, app: Any, stack: Any, answers: Callable[[int], None]) -> None:
        self._app = app
        self._stack = stack
        self._answers = answers
        self._watching: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._stack(scope, receive, send)
            return

        async def forward(message: Any) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                core = self._app.state.engine_client
                self._watching = asyncio.create_task(self._watch(core))
                self._answers(core.vllm_config.scheduler_config.max_num_seqs)

        await self._stack(scope, receive, forward)

    async def _watch(self, core: Any) -> None:
        while not core.errored:  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(WATCH_S)
        logger.error("the engine core is gone, and so is this process")
        os._exit(os.EX_SOFTWARE)
