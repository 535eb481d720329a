"""What one plain vLLM process answers.

Importing vLLM takes longer than all that a tiny model is asked, so it is imported once, by a server
that forks a process for every model.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.e2e.cluster import ENVIRONMENT, FLAGS, Request

TIMEOUT_S = 180.0
ENDS_S = 10.0
LOG = "reference.log"
NO_CHANGES: Mapping[str, str] = {}
PRELOADED = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
]
OWN = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class ReferenceError(Exception):
    """vLLM cannot run the model on this machine; the message is its log and its last exception."""


def reference_tokens(
    model: Path,
    requests: Sequence[Request],
    flags: Sequence[str],
    environment: Mapping[str, str] = NO_CHANGES,
) -> list[list[int]]:
    """The tokens that one process answers each request with.

    Args:
        environment: of this process and those it starts; a PYTHONPATH with a `sitecustomize.py`.

    Raises:
        ReferenceError: it does not run.
    """
    os.environ.update(ENVIRONMENT | OWN)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    arguments = (model, requests, flags, sender, dict(environment))
    process = context.Process(target=_answer, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT_S):
            raise ReferenceError(f"no answer in {TIMEOUT_S:.0f} s")
        answer = receiver.recv()
    except EOFError:
        answer = f"the process ended with {process.exitcode}"
    finally:
        process.join(ENDS_S)
        process.kill()
        process.join()
    if isinstance(answer, str):
        raise ReferenceError((model / LOG).read_text() + "\n" + answer)
    return answer


def _answer(
    model: Path,
    requests: Sequence[Request],
    flags: Sequence[str],
    sender: Connection,
    environment: dict[str, str],
) -> None:
    with (model / LOG).open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    if path := environment.get("PYTHONPATH"):
        runpy.run_path(f"{path}/sitecustomize.py")
    try:
        sender.send(_generate(model, requests, flags))
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}")
        raise


def _generate(model: Path, requests: Sequence[Request], flags: Sequence[str]) -> list[list[int]]:
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = EngineArgs.from_cli_args(parser.parse_args([f"--model={model}", *FLAGS, *flags]))
    llm = LLM.from_engine_args(args)
    outputs = [_ask(llm, request, SamplingParams) for request in requests]
    return [list(output.outputs[0].token_ids) for output in outputs]


def _ask(llm: Any, request: Request, sampling_params: Any) -> Any:
    names = ("temperature", "seed", "max_tokens")
    params = sampling_params(**{name: request[name] for name in names if name in request})
    if "messages" in request:
        return llm.chat(request["messages"], params, use_tqdm=False)[0]
    return llm.generate({"prompt_token_ids": request["prompt"]}, params, use_tqdm=False)[0]
