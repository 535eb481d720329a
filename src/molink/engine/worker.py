"""One rank of one stage: vLLM's own worker, with a pipeline group of ours."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.worker.worker_base import WorkerWrapperBase

from molink.core.errors import WireError
from molink.engine import compat
from molink.engine.activations import Emit, unpack
from molink.engine.adapters import check_adapter
from molink.engine.coder import Coder
from molink.engine.config import stage_config
from molink.engine.environment import set_partition
from molink.engine.group import StageGroup
from molink.engine.hop_format import HopFormat, check_device
from molink.engine.objections import in_one_line
from molink.engine.replay import Restored
from molink.engine.residual import uses_only_the_sum
from molink.engine.senders import sender_for
from molink.engine.types import dtype_name
from molink.wire.to_stage import LoadStage

logger = logging.getLogger("molink.stage")


@dataclass(frozen=True, slots=True)
class StageOptions:
    """What this node knows of its own stage."""

    find_model: Callable[[LoadStage], str]  # folder or hub id; brings the files of the layers
    rank: int
    tensor_parallel_size: int
    node_flags: list[str]  # the node's own vLLM engine flags
    run_folder: Path  # for the rendezvous of the stage's ranks


class StageWorker:
    """Loads only the layers of one stage and runs steps on them.

    Args:
        link_rate: bytes a second to the node of the next stage; None: not known.

    Raises:
        UsageError: this node's own flags, or its files, do not do.
    """

    def __init__(
        self,
        load: LoadStage,
        options: StageOptions,
        emit: Emit,
        link_rate: Callable[[], float | None],
    ) -> None:
        set_partition(load.partition)
        model = options.find_model(load)
        with in_one_line():
            config = stage_config(
                load,
                model=model,
                node_flags=options.node_flags,
                tensor_parallel_size=options.tensor_parallel_size,
            )
        index = load.stage_index
        self.nodes = load.nodes
        self.index = index
        self.layers = load.layers
        self._wire = load.wire
        self._dtype = dtype_name(config.model_config.dtype)
        self._coder = Coder(load.wire.coding, emit, link_rate)
        self._send = sender_for(current_platform.device_type, self._coder, rank=options.rank)
        self._send.format = self._format(takes_sum=False)
        self.group = StageGroup(index, len(load.partition), self._send)
        self._worker = WorkerWrapperBase(rpc_rank=0, global_rank=options.rank)
        self._worker.init_worker([self._arguments(config, options)])
        compat.place_stage(config, self.layers, index)
        with compat.stage_alone(config, self.group):
            self._worker.init_device()
        compat.unlink_shared_memory()
        check_device(load.wire.eight_bits, self.device)
        self._worker.load_model()
        current_platform.update_block_size_for_backend(config)
        for adapt in (
            compat.allocate_input,
            compat.leave_drafting_to_engine,
            compat.order_rows_alike,
            compat.take_rows,
            compat.guard_input_buffers,
        ):
            adapt(self._worker.worker)
        compat.spare_tokens_without_adapter(config)
        self._receive = self._agreed_format(config)
        self._digests: dict[int, str] = {}  # of adapters, by their numbers
        if config.lora_config is not None:
            compat.before_each_adapter(
                self._worker.worker,
                lambda request: check_adapter(request, self._digests[request.lora_int_id]),
            )

    def _agreed_format(self, config: VllmConfig) -> HopFormat:
        """What this stage takes as its input."""
        self._max_input = 0
        if self.index == 0:
            return HopFormat()
        runner = self._worker.worker.model_runner
        one_row = runner.model.make_empty_intermediate_tensors(
            batch_size=1, dtype=config.model_config.dtype, device=self.device
        ).tensors
        row_bytes = sum(tensor.nbytes for tensor in one_row.values())
        self._max_input = runner.max_num_tokens * row_bytes * 2  # with exceptions of a sum
        self._input_names = set(one_row)
        wanted = self._format(takes_sum=True)
        is_asked = wanted.has_sum or wanted.may_code_sum
        agreed = self._format(is_asked and uses_only_the_sum(runner.model, config, one_row))
        if self._wire.sum == "on" and not agreed.has_sum:
            logger.warning("--wire-sum on changes nothing: the layers of this model take no sum")
        logger.info("input comes as %s", agreed)
        return agreed

    def _format(self, takes_sum: bool) -> HopFormat:
        """Of a hop, by whether its later stage takes a sum."""
        return HopFormat(
            self._wire.eight_bits,
            has_sum=takes_sum and self._wire.wants_sum(self._dtype),
            may_code_sum=takes_sum and self._wire.may_code_sum(self._dtype),
        )

    def _arguments(self, config: Any, options: StageOptions) -> dict[str, Any]:
        # vLLM names shared memory after this file, so its name is that of no other stage.
        rendezvous = options.run_folder / "-".join(options.run_folder.parts[-2:])
        return {
            "vllm_config": config,
            "local_rank": options.rank,
            "rank": options.rank,
            "distributed_init_method": f"file://{rendezvous}",
            "is_driver_worker": options.rank == 0,
        }

    @property
    def device(self) -> torch.device:
        device: torch.device = self._worker.worker.device
        return device

    @property
    def previous_node(self) -> int | None:
        """Whose output is this stage's input; None for the first stage."""
        return self.nodes[self.index - 1] if self.index else None

    @property
    def next_node(self) -> int:
        return self.nodes[self.index + 1]

    @property
    def takes_sum(self) -> bool:
        """Whether the stage before may send a sum."""
        return self._receive.has_sum or self._receive.may_code_sum

    def send_sum(self, takes_sum: bool) -> None:
        """The next stage takes a sum, or it does not."""
        self._send.format = self._format(takes_sum)
        self._coder.may_code_sum = self._send.format.may_code_sum

    def unpack(self, payload: bytearray) -> dict[str, torch.Tensor]:
        """The input of a step. Raises WireError if it is not what was agreed on."""
        crossed = unpack(payload, self.device, max_bytes=self._max_input)
        found = self._receive.restore(crossed, self._worker.worker.model_config.dtype)
        if set(found) != self._input_names:  # vLLM would take what is missing from the last step
            raise WireError(f"{sorted(found)} came, expected {sorted(self._input_names)}")
        return found

    @property
    def max_waiting_input(self) -> int:
        """Bytes of input that may wait here: one step of the largest size for every stage."""
        return self._max_input * len(self.nodes)

    def execute_model(self, output: SchedulerOutput) -> Any:
        """Run the layers; None means that `sample` comes next."""
        compat.empty_batch(self._worker.worker)
        return self._worker.execute_model(output)

    def sample(self, output: SchedulerOutput, grammar: GrammarOutput | None) -> Any:
        """Finish the step; on the last stage, its output."""
        with compat.unsampled_generators(self._worker.worker, output):
            return self._worker.sample_tokens(grammar)

    def restore(self, requests: Sequence[Restored]) -> None:
        """Know requests as if all their tokens had been computed and sampled here."""
        if requests:
            compat.empty_batch(self._worker.worker)
            compat.restore_requests(self._worker.worker, requests)

    def serve_another(self, nodes: list[int]) -> None:
        """Forget what an engine has said that is gone; layers and cache stay.

        Args:
            nodes: of every stage now.
        """
        self.nodes = nodes
        self.forget_requests()
        for adapter in list(self._digests):
            self.call("remove_lora", (adapter,), {})
        self._digests.clear()

    def forget_requests(self) -> None:
        """Clear the state of all requests."""
        compat.forget_requests(self._worker.worker)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of vLLM's worker; `add_lora` brings the digest of the head's adapter."""
        if method == "add_lora":
            request, digest = args
            self._digests[request.lora_int_id] = digest
            args = (request,)
        return getattr(self._worker, method)(*args, **kwargs)
