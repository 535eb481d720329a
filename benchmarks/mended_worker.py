"""vLLM's own CPU worker, able to be a later stage of vLLM's own pipeline.

With eager execution the CPU backend skips the warm-up in which a later stage's input buffers are
made, and the first step asserts (vLLM 0.32.0). The baseline needs them made here; nothing else
differs from vLLM.
"""

from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker


class MendedWorker(CPUWorker):
    """Makes the input buffers after the weights are loaded."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights=load_dummy_weights)
        runner = self.model_runner
        if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
            return
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
