"""Configurations as the head's vLLM makes them, of the bundled model; and an agent in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext

from molink.engine.config import engine_parser
from molink.engine.executor import PipelineExecutor

MODEL = str(Path(__file__).parents[3] / "models" / "molink-mini")
MakeConfig = Callable[..., VllmConfig]


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    """What decides vLLM's defaults is the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_PP_LAYER_PARTITION"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def make_config(_environment: None) -> MakeConfig:
    """The head's configuration: `make_config(*flags, num_stages=2)`."""

    def make(*flags: str, num_stages: int = 2) -> VllmConfig:
        args = AsyncEngineArgs.from_cli_args(
            engine_parser().parse_args([f"--model={MODEL}", "--max-model-len=512", *flags])
        )
        args.pipeline_parallel_size = num_stages
        args.distributed_executor_backend = PipelineExecutor
        args.scheduler_cls = "molink.engine.scheduler.PipelineScheduler"
        return args.create_engine_config(UsageContext.OPENAI_API_SERVER)

    return make


@pytest.fixture(scope="session")
def head_config(make_config: MakeConfig) -> VllmConfig:
    """Two stages, no flags of the user's. Shared: change only what you put back."""
    return make_config()
