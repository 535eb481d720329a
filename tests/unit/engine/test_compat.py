"""The touches on what is not vLLM's public API, against vLLM's own objects."""

import dataclasses
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import parallel_state
from vllm.sequence import IntermediateTensors
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from molink.core.plan import LayerRange
from molink.engine import compat
from molink.engine.group import StageGroup
from molink.engine.senders import sender_for

from .conftest import MakeConfig

MODULES = compat.worker_modules()
no_send = sender_for("cpu", lambda step, tensors: None)


# --- which layers are here


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 4])), min_size=1, max_size=4))
def test_layers_are_those_of_the_plan_whatever_the_stages_sizes(
    head_config: VllmConfig, stages: list[tuple[int, int]]
) -> None:
    """Stages differ in tensor parallel size, from which vLLM would compute a stage's index."""
    end = 0
    for index, (num_layers, size) in enumerate(stages):
        start, end = end, end + num_layers
        model: Any = ModelConfig.__new__(ModelConfig)  # vLLM's methods, no fields
        parallel = dataclasses.replace(
            head_config.parallel_config, tensor_parallel_size=size, pipeline_parallel_size=2
        )
        config: Any = SimpleNamespace(model_config=model, parallel_config=parallel)
        compat.place_stage(config, LayerRange(start, end), index)
        assert model.get_layers_start_end_indices(parallel) == (start, end)
        assert model.get_num_layers(parallel) == num_layers
        assert parallel.rank // size == index


# --- a stage's own world


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(pipeline size, world size) of every time that a worker initialised torch.distributed."""
    seen: list[tuple[int, int]] = []

    def initialise(config: VllmConfig, *_: Any, **__: Any) -> None:
        parallel = config.parallel_config
        seen.append((parallel.pipeline_parallel_size, parallel.world_size))

    monkeypatch.setattr(parallel_state, "_PP", None)
    for module in MODULES:
        monkeypatch.setattr(module, "init_worker_distributed_environment", initialise)
    return seen


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("size", [1, 2])
def test_a_stage_is_alone_while_it_initialises(
    make_config: MakeConfig, worlds: list[tuple[int, int]], module: Any, size: int
) -> None:
    config = make_config(f"-tp={size}", num_stages=3)
    group = StageGroup(1, 3, no_send)
    with compat.stage_alone(config, group):
        assert config.parallel_config.world_size == 3 * size
        module.init_worker_distributed_environment(config, rank=0)
        assert parallel_state.get_pp_group() is group
    assert worlds == [(1, size)]
    assert config.parallel_config.pipeline_parallel_size == 3
    assert config.parallel_config.world_size == 3 * size


@pytest.mark.usefixtures("worlds")
def test_vllms_function_is_back_afterwards(head_config: VllmConfig) -> None:
    whole = gpu_worker.init_worker_distributed_environment

    def fail() -> None:
        with compat.stage_alone(head_config, StageGroup(0, 2, no_send)):
            assert gpu_worker.init_worker_distributed_environment is not whole
            raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no device"):
        fail()
    for module in MODULES:
        assert module.init_worker_distributed_environment is whole


def test_workers_initialise_through_a_name_in_their_own_module() -> None:
    name = "init_worker_distributed_environment"
    assert name in gpu_worker.Worker.init_device.__wrapped__.__code__.co_names
    for module in set(MODULES) - {gpu_worker}:
        assert name in module.CPUWorker.init_device.__code__.co_names


def test_a_stage_does_not_import_what_makes_waiting_for_a_gpu_a_joke() -> None:
    """vLLM's worker for CPUs replaces torch's events by ones that wait for nothing."""
    program = "import torch; event = torch.cuda.Event; import molink.engine.stage; "
    program += "raise SystemExit(event is not torch.cuda.Event)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_groups_of_one_rank_are_one_group_of_each_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[list[int], str]] = []

    def new_group(ranks: list[int], *, backend: str, timeout: None = None) -> int:
        made.append((ranks, backend))
        return len(made)

    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    with compat.shared_groups():
        new = torch.distributed.new_group
        groups = [new([0], backend=name, timeout=None) for name in ("gloo", "nccl", "gloo", "nccl")]
    assert groups == [1, 2, 1, 2]
    assert torch.distributed.new_group is new_group


# --- steps


def test_whole_token_lists_stay_behind_and_nothing_else() -> None:
    def output(all_token_ids: dict[str, list[int]]) -> SchedulerOutput:
        made = SchedulerOutput.make_empty()
        made.scheduled_cached_reqs = CachedRequestData(
            req_ids=["a"],
            resumed_req_ids={"a"},
            new_token_ids=[[5]],
            all_token_ids=all_token_ids,
            new_block_ids=[([1],)],
            num_computed_tokens=[3],
            num_output_tokens=[1],
        )
        made.num_scheduled_tokens = {"a": 1}
        made.total_num_scheduled_tokens = 1
        return made

    stripped = output({"a": [1, 2, 3, 5]})
    compat.strip_for_wire(stripped)
    assert stripped == output({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("finished_req_ids", {"a"}),
        ("free_encoder_mm_hashes", ["hash"]),
        ("new_block_ids_to_zero", [4]),
        ("kv_cache_block_copies", [KVCacheBlockCopy(4, 5)]),
    ],
)
def test_what_an_empty_step_can_say(name: str, value: Any) -> None:
    output = SchedulerOutput.make_empty()
    assert not compat.says_something(output)
    setattr(output, name, value)
    assert compat.says_something(output)


# --- rows of a step


def with_input(max_rows: int) -> Any:
    """A runner that has its input buffers, with vLLM's own method."""
    runner: Any = GPUModelRunner.__new__(GPUModelRunner)
    names = ("hidden_states", "residual")
    runner.intermediate_tensors = IntermediateTensors({n: torch.zeros(max_rows, 2) for n in names})
    return runner


def three_rows() -> IntermediateTensors:
    return IntermediateTensors({n: torch.ones(3, 2) for n in ("hidden_states", "residual")})


@pytest.mark.parametrize("num_rows", [3, 4])
def test_a_stage_takes_the_rows_of_a_step_and_computes_as_many_as_it_likes(num_rows: int) -> None:
    runner = with_input(8)
    compat.take_rows(SimpleNamespace(model_runner=runner))
    taken = runner.sync_and_gather_intermediate_tensors(num_rows, three_rows(), True)
    for name, tensor in taken.items():
        assert tensor.shape == (num_rows, 2)
        assert torch.equal(tensor[:3], torch.ones(3, 2))
        assert tensor.data_ptr() == runner.intermediate_tensors[name].data_ptr()


def test_a_warm_up_has_no_input() -> None:
    runner = with_input(8)
    compat.take_rows(SimpleNamespace(model_runner=runner))
    taken = runner.sync_and_gather_intermediate_tensors(5, None, False)
    assert [tensor.shape for _, tensor in taken.items()] == [(5, 2), (5, 2)]


def test_vllms_own_runner_wants_the_rows_that_it_computes() -> None:
    """Otherwise nothing would have to be done."""
    with pytest.raises(RuntimeError, match="size"):
        with_input(8).sync_and_gather_intermediate_tensors(4, three_rows(), True)


def test_the_runner_waits_for_what_it_is_told_to_wait_for() -> None:
    waited: list[str] = []
    runner: Any = GPUModelRunner.__new__(GPUModelRunner)
    runner.prepare_inputs_event = SimpleNamespace(
        synchronize=lambda: waited.append("copied"), record=lambda: waited.append("queued")
    )
    with runner.synchronize_input_prep():
        waited.append("laid out")
    runner.input_batch = SimpleNamespace(req_id_to_index={})
    compat.empty_batch(SimpleNamespace(model_runner=runner))
    assert waited == ["copied", "laid out", "queued", "copied"]


# --- seeded generators


@dataclasses.dataclass(frozen=True)
class Known:
    """A request of a runner's batch, in tokens."""

    num_computed_tokens: int
    num_tokens: int
    num_scheduled: int | None  # None: not in this step
    is_seeded: bool

    @property
    def is_sampled(self) -> bool:
        return self.num_computed_tokens + (self.num_scheduled or 0) >= self.num_tokens


known = st.builds(
    Known,
    st.integers(0, 40),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(1, 40)),
    st.booleans(),
)


def runner_of(requests: list[Known], device: str) -> tuple[Any, SchedulerOutput]:
    ids = [f"request-{index}" for index in range(len(requests))]
    batch = SimpleNamespace(
        req_id_to_index={name: index for index, name in enumerate(ids)},
        generators={i: torch.Generator() for i, known in enumerate(requests) if known.is_seeded},
    )
    runner = SimpleNamespace(
        input_batch=batch,
        requests=dict(zip(ids, requests, strict=True)),
        device=torch.device(device),
    )
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {
        name: known.num_scheduled
        for name, known in zip(ids, requests, strict=True)
        if known.num_scheduled is not None
    }
    return SimpleNamespace(model_runner=runner), output


@given(st.lists(known, max_size=6), st.booleans())
def test_generators_of_unfinished_prompts_stay_out_of_a_step(
    requests: list[Known], fails: bool
) -> None:
    worker, output = runner_of(requests, "cpu")
    generators = worker.model_runner.input_batch.generators
    before = dict(generators)

    with suppress(RuntimeError), compat.unsampled_generators(worker, output):
        assert generators == {i: g for i, g in before.items() if requests[i].is_sampled}
        if fails:
            raise RuntimeError
    assert generators == before


@given(st.lists(known, max_size=4))
def test_generators_on_an_accelerator_are_turned_back_by_vllm(requests: list[Known]) -> None:
    worker, output = runner_of(requests, "cuda")
    generators = worker.model_runner.input_batch.generators
    before = dict(generators)
    with compat.unsampled_generators(worker, output):
        assert generators == before


def test_generators_on_a_cpu_cannot_be_turned_back() -> None:
    """The reason for keeping them out; once torch can, this is not needed any more."""
    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator().get_offset()
