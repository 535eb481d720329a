"""Touches on vLLM 0.32.0 that are not public API, with what would break each.

The scheduler overrides `schedule` and `update_from_output`, and the server wraps `build_app`: those
stand where they are read with the rest.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.distributed import parallel_state
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker import gpu_worker

from molink.core.plan import LayerRange
from molink.engine.environment import FLAGS_VARIABLE
from molink.engine.group import StageGroup
from molink.engine.loop import Outputs, StepLoop
from molink.engine.replay import Restored

Tokens = npt.NDArray[np.int32]


def engine_flags() -> list[str]:
    """The user's engine flags; the engine's process inherits them from the server's."""
    flags: list[str] = json.loads(os.environ.get(FLAGS_VARIABLE, "[]"))
    return flags


def is_pooling(config: VllmConfig) -> bool:
    """Pooling models answer in `execute_model`; breaks if `runner_type` is renamed."""
    return bool(config.model_config.runner_type == "pooling")


def use_own_loop() -> None:
    """Have the engine of this process take results in the order of their coming.

    `EngineCore` steps by this method when it has several steps in flight, and asks `batch_queue`
    only whether it is empty. Breaks if it looks into it, or waits for results elsewhere.
    """

    def step(core: Any) -> tuple[Outputs, bool]:
        if not isinstance(core.batch_queue, StepLoop):
            core.batch_queue = StepLoop(core)
        return core.batch_queue.turn()

    EngineCore.step_with_batch_queue = step


def strip_for_wire(output: SchedulerOutput) -> None:
    """Leave out whole token lists, which runner V1 reads only under async scheduling.

    Breaks if the runner of a stage reads `all_token_ids` elsewhere (gpu_model_runner, resumed
    requests).
    """
    output.scheduled_cached_reqs.all_token_ids = {}


def says_something(output: SchedulerOutput) -> bool:
    """Whether a step without tokens changes anything on a stage."""
    return bool(
        output.finished_req_ids
        or output.free_encoder_mm_hashes
        or output.new_block_ids_to_zero
        or output.kv_cache_block_copies
    )


def worker_modules() -> list[Any]:
    """The modules of vLLM that a worker of this platform comes from.

    That of the CPU's is imported on a CPU alone: it replaces `torch.cuda.Event` and its like by
    ones that wait for nothing (`v1/worker/cpu/shm.py`).
    """
    if not current_platform.is_cpu():
        return [gpu_worker]
    from vllm.v1.worker import cpu_worker

    return [gpu_worker, cpu_worker]


@contextmanager
def stage_alone(config: VllmConfig, group: StageGroup) -> Iterator[None]:
    """While a worker initialises torch.distributed, the world is this stage's own ranks.

    Afterwards the pipeline group is ours. Worker modules import
    `init_worker_distributed_environment` by name, and `parallel_state._PP` is what `get_pp_group`
    returns; renaming either breaks this.
    """
    parallel, modules = config.parallel_config, worker_modules()
    original = gpu_worker.init_worker_distributed_environment

    def initialise(*args: Any, **kwargs: Any) -> None:
        whole = parallel.pipeline_parallel_size, parallel.world_size
        parallel.pipeline_parallel_size = 1
        parallel.world_size = parallel.tensor_parallel_size
        with shared_groups() if parallel.world_size == 1 else nullcontext():
            original(*args, **kwargs)
        parallel.pipeline_parallel_size, parallel.world_size = whole
        parallel_state._PP = group

    for module in modules:
        module.init_worker_distributed_environment = initialise
    try:
        yield
    finally:
        for module in modules:
            module.init_worker_distributed_environment = original


@contextmanager
def shared_groups() -> Iterator[None]:
    """Make groups of the same ranks and backend one group; for a stage of one rank.

    vLLM makes a dozen groups. Nothing passes through those of one rank, but a thread of each gloo
    group wakes a hundred times a second: 2.5 % of a core for an idle stage (measured).
    """
    new_group, made = torch.distributed.new_group, {}

    def shared(ranks: Any = None, *args: Any, backend: Any = None, **kwargs: Any) -> Any:
        key = (None if ranks is None else tuple(ranks), backend)
        if key not in made:
            made[key] = new_group(ranks, *args, backend=backend, **kwargs)
        return made[key]

    torch.distributed.new_group = shared
    try:
        yield
    finally:
        torch.distributed.new_group = new_group


def unlink_shared_memory() -> None:
    """Remove the names of the shared memory between a stage's ranks, which all hold it by now.

    A name would outlive a process that is killed. `ShmRingBuffer` leaves naming to Python, which
    begins with `psm_`; `_CPUSHMDistributed` ends its names with `cpushm` and a number.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, found, name = line.partition(" /dev/shm/")
        if found and (name.startswith("psm_") or "-cpushm_" in name):
            Path("/dev/shm", name).unlink(missing_ok=True)


def place_stage(config: VllmConfig, layers: LayerRange, index: int) -> None:
    """Tell the configuration which layers are here.

    vLLM computes them from rank and tensor parallel size, which is wrong when stages differ in it.
    """
    model, parallel = config.model_config, config.parallel_config
    parallel.rank = index * parallel.tensor_parallel_size
    object.__setattr__(model, "get_layers_start_end_indices", lambda _: (layers.start, layers.end))


def allocate_input(worker: Any) -> None:
    """Give a later stage its input buffers, which vLLM makes in a warm-up that eager CPU skips."""
    runner = worker.model_runner
    if parallel_state.get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
        return
    runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=worker.model_config.dtype, device=runner.device
    )


def take_rows(worker: Any) -> None:
    """Let a later stage take a step's own rows as its input, and no more.

    With CUDA graphs a step computes more rows than it has tokens, and vLLM wants as many from the
    stage before; which may pad otherwise, or not at all. What the other rows hold, nobody reads.
    Breaks if the runner fills `intermediate_tensors` elsewhere.
    """
    runner = worker.model_runner

    def gather(num_rows: int, received: Any, sync_self: bool) -> IntermediateTensors:
        own = runner.intermediate_tensors
        if sync_self:
            for name, tensor in received.items():
                own[name][: len(tensor)].copy_(tensor, non_blocking=True)
        return IntermediateTensors({name: tensor[:num_rows] for name, tensor in own.items()})

    runner.sync_and_gather_intermediate_tensors = gather


def guard_input_buffers(worker: Any) -> None:
    """Have the runner wait, before it lays out a step, until the last one's inputs are copied.

    It fills the same pinned memory every time, and relies on sampling to wait for the device. A
    stage that does not sample would fill it anew while the device still reads. vLLM has the event
    for async scheduling; breaks if the runner stops asking for it (`synchronize_input_prep`).
    """
    runner = worker.model_runner
    if runner.device.type == "cuda" and runner.prepare_inputs_event is None:
        runner.prepare_inputs_event = torch.cuda.Event(blocking=True)


def known_requests(worker: Any) -> set[str]:
    """Ids of the requests the runner keeps state of."""
    return set(worker.model_runner.requests)


def empty_batch(worker: Any) -> None:
    """Have the runner lay out its next batch afresh, in the order of the step's own lists.

    It keeps rows from step to step, and activations cross as rows. Stages that ran steps in
    different orders would disagree whose they are. Requests come back from the runner's own state,
    as they do anyway when micro-batches alternate.
    """
    batch = worker.model_runner.input_batch
    if worker.model_runner.prepare_inputs_event is not None:  # its tables may still be copied
        worker.model_runner.prepare_inputs_event.synchronize()
    with torch.inference_mode():
        for request_id in list(batch.req_id_to_index):
            batch.remove_request(request_id)


def order_rows_alike(worker: Any) -> None:
    """Have every stage put the rows of a step into the same order, whatever its attention backend.

    Some backends want decodes before prompts, by thresholds of their own, and others want nothing:
    two stages would disagree whose rows are whose. vLLM says that each bears a lower threshold than
    its own. Breaks if the runner finds its threshold elsewhere.
    """
    runner = worker.model_runner

    def calculate() -> None:
        runner.reorder_batch_threshold = 1

    runner.calculate_reorder_batch_threshold = calculate


def forget_requests(worker: Any) -> None:
    """Clear the runner's state of all requests, by telling it that they have finished."""
    output = SchedulerOutput.make_empty()
    output.finished_req_ids = known_requests(worker)
    worker.model_runner.execute_model_state = None
    with torch.inference_mode():
        worker.model_runner.execute_model(output)
    worker.model_runner.reset_encoder_cache()


def restore_requests(worker: Any, requests: Sequence[Restored]) -> None:
    """Give the runner the state of requests in mid-generation, as a step that resumes them expects.

    It makes the state of new requests in a step without tokens; then come the tokens they have.
    Breaks if the state holds more that depends on what was sampled.
    """
    runner = worker.model_runner
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [request for request, _ in requests]
    output.num_scheduled_tokens = {request.req_id: 1 for request, _ in requests}  # rows are sorted
    with torch.inference_mode():
        runner.execute_model(output)
    for request, tokens in requests:
        state = runner.requests[request.req_id]
        state.output_token_ids.extend(tokens)
        runner.num_prompt_logprobs.pop(request.req_id, None)  # they came with the first token
        if state.generator is not None and parallel_state.get_pp_group().is_last_rank:
            _skip_draws(runner, state.generator, len(tokens))


def _skip_draws(runner: Any, generator: torch.Generator, number: int) -> None:
    """Turn a request's generator to where it is after it has sampled so many tokens.

    A token takes one number where a fused kernel samples, otherwise one for each entry of the
    vocabulary, which moves a GPU's generator by a fixed offset. Breaks if `TopKTopPSampler` draws
    otherwise.
    """
    sampler, device = runner.sampler.topk_topp_sampler, generator.device
    is_fused = sampler.forward == sampler.forward_cpu and not sampler.use_fp64_gumbel
    dtype = torch.float64 if sampler.use_fp64_gumbel else torch.float32
    noise = torch.empty(runner.input_batch.vocab_size, dtype=dtype, device=device)
    if device.type == "cuda":
        before = generator.get_offset()
        noise.exponential_(generator=generator)
        generator.set_offset(before + number * (generator.get_offset() - before))
        return
    for _ in range(number):
        if is_fused:
            torch.randint(0, 2**31, (1,), generator=generator)
        else:
            noise.exponential_(generator=generator)


def ngram_search(config: VllmConfig) -> Callable[[Tokens], list[int]]:
    """What vLLM's n-gram drafter drafts to follow a text: what came the last time after its end.

    Its class drafts for a batch, and takes ten times as long for each request. Compiled here, which
    takes seconds. Breaks if the function is renamed or its arguments change.
    """
    from vllm.v1.spec_decode import ngram_proposer  # numba takes a second

    speculative = config.speculative_config
    assert speculative is not None
    shortest, longest = speculative.prompt_lookup_min, speculative.prompt_lookup_max
    most, max_model_len = config.num_speculative_tokens, config.model_config.max_model_len
    find = ngram_proposer._find_longest_matched_ngram_and_propose_tokens

    def draft(text: Tokens) -> list[int]:
        tokens: list[int] = find(text, shortest, longest, max_model_len, most).tolist()
        return tokens

    draft(np.zeros(2, np.int32))
    return draft


def leave_drafting_to_engine(worker: Any) -> None:
    """Have no stage draft: the engine does (`engine.drafter`).

    vLLM's last stage drafts after every step, and the others ask for a drafter that they have
    not. Numba comes with it, and must not come before the worker is initialised: on a CPU vLLM
    looks for kernels in every module, and fails in numba's. Breaks if the runner keeps drafters
    elsewhere.
    """
    if worker.vllm_config.speculative_config is None:
        return
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    class NoDrafts(NgramProposer):
        def __init__(self) -> None:
            """Compiles nothing."""

        def propose(self, num_drafted: int, sampled: list[list[int]], *_: Any, **__: Any) -> Any:
            return [[] for _ in sampled]

    worker.model_runner.drafter = NoDrafts()


@contextmanager
def unpadded(scheduler: Scheduler) -> Iterator[None]:
    """Have vLLM's `schedule` put no placeholders of drafts, -1, into a step: they are tokens of no
    vocabulary where no drafter on the stage replaces them. It puts them where `num_spec_tokens` is
    not 0; breaks if it asks something else.
    """
    num_spec_tokens, scheduler.num_spec_tokens = scheduler.num_spec_tokens, 0
    try:
        yield
    finally:
        scheduler.num_spec_tokens = num_spec_tokens


@contextmanager
def unsampled_generators(worker: Any, output: SchedulerOutput) -> Iterator[None]:
    """Keep seeded generators out of a step for requests whose prompt is not finished.

    vLLM samples for them too and then turns the generator back by an offset, which generators on
    the CPU do not have. Breaks if `InputBatch.generators` stops being the dictionary that sampling
    reads.
    """
    runner = worker.model_runner
    generators = runner.input_batch.generators
    saved = {}
    if generators and runner.device.type == "cpu":
        for request_id, index in runner.input_batch.req_id_to_index.items():
            request = runner.requests[request_id]
            done = request.num_computed_tokens + output.num_scheduled_tokens.get(request_id, 0)
            if index in generators and done < request.num_tokens:
                saved[index] = generators.pop(index)
    try:
        yield
    finally:
        generators.update(saved)


def before_each_adapter(worker: Any, check: Callable[[LoRARequest], None]) -> None:
    """Call `check` whenever the worker reads an adapter: it reads one that it has dropped again,
    in the step that needs it. Breaks if `_load_adapter` stops being what all ways lead through.
    """
    manager = worker.model_runner.lora_manager
    load_adapter = manager._load_adapter

    def load(request: LoRARequest) -> Any:
        check(request)
        return load_adapter(request)

    manager._load_adapter = load


def spare_tokens_without_adapter(config: VllmConfig) -> None:
    """Keep tokens of requests without an adapter free of the adapters of others, on a CPU.

    vLLM marks them with index -1, and its operations in plain torch take that for the last slot.
    """
    if config.lora_config is None or not current_platform.is_cpu():
        return
    shrink = lora_ops.bgmv_shrink

    def bgmv_shrink(
        inputs: Any, weights: Any, output: Any, indices: torch.Tensor, scaling: float = 1.0
    ) -> None:
        shrink(inputs, weights, output, indices, scaling)
        output[indices < 0] = 0.0

    lora_ops.bgmv_shrink = bgmv_shrink  # `sgmv_shrink`, the one that is used, looks it up there
