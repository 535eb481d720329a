"""What only an accelerator shows: work that is queued and not yet done. Skipped without one."""

import threading
from collections.abc import Iterator, Mapping

import pytest
import torch
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm

from molink.engine.activations import StepId, pack, unpack
from molink.engine.exact_sum import put_together, take_apart
from molink.engine.hop_format import HopFormat
from molink.engine.senders import CudaSender
from molink.engine.step_timer import CudaTimer, StepKind

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
GPU = torch.device("cuda")
SHAPE = (512, 4096)
DTYPES = [torch.bfloat16, torch.float16]


class Arrivals:
    """What a sender has sent, copied as an agent would."""

    def __init__(self) -> None:
        self.tensors: dict[int, dict[str, torch.Tensor]] = {}
        self._all_there = threading.Semaphore(0)

    def __call__(self, step: StepId, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors[step.sequence] = {name: t.clone() for name, t in tensors.items()}
        self._all_there.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self._all_there.acquire(timeout=30)


def busy() -> None:
    """Keep the device at work for some milliseconds, so that what follows is only queued."""
    torch.cuda._sleep(20_000_000)


@pytest.mark.parametrize("has_sum", [False, True])
def test_an_output_is_sent_as_it_was_though_its_memory_is_written_again(has_sum: bool) -> None:
    arrivals = Arrivals()
    send = CudaSender(arrivals)
    send.format = HopFormat(has_sum=has_sum)
    static = {name: torch.zeros(SHAPE, device=GPU) for name in ("hidden_states", "residual")}
    for number in range(20):
        busy()
        for tensor in static.values():
            tensor.fill_(number)
        send(StepId(1, number), static)
    arrivals.wait(20)
    for number, tensors in arrivals.tensors.items():
        for tensor in tensors.values():
            assert torch.equal(tensor, torch.full(SHAPE, float(number * (2 if has_sum else 1))))


def test_an_output_is_sent_as_it_was_though_its_memory_is_freed() -> None:
    arrivals = Arrivals()
    send = CudaSender(arrivals)
    payload = bytearray(b"".join(pack({"hidden_states": torch.full(SHAPE, -1.0)})))
    for number in range(20):
        busy()
        send(StepId(1, number), {"hidden_states": torch.full(SHAPE, float(number), device=GPU)})
        unpack(payload, GPU)  # the next step's input takes that memory
    arrivals.wait(20)
    for number, tensors in arrivals.tensors.items():
        assert torch.equal(tensors["hidden_states"], torch.full(SHAPE, float(number)))


def test_received_memory_may_be_reused_at_once() -> None:
    found = []
    for number in range(20):
        payload = bytearray(b"".join(pack({"hidden_states": torch.full(SHAPE, float(number))})))
        busy()
        found.append(unpack(payload, GPU)["hidden_states"])
        payload[64:] = bytes(len(payload) - 64)
    for number, tensor in enumerate(found):
        assert torch.equal(tensor, torch.full(SHAPE, float(number), device=GPU))


def test_a_step_takes_as_long_as_its_work_and_not_as_its_queueing() -> None:
    timer = CudaTimer()
    busy()
    torch.cuda.synchronize()
    for tokens in (1, 2):
        timer.start()
        busy()
        timer.stop(StepKind(tokens, is_prefill=False))
    torch.cuda.synchronize()
    (first, first_s), (second, second_s) = timer.finished()
    assert (first.tokens, second.tokens) == (1, 2)
    assert first_s > 0.005  # 20 million cycles
    assert 0.7 < second_s / first_s < 1.4  # the second did not begin before the first was over
    assert not list(timer.finished())


@pytest.fixture(params=["vllm_c", "native"])
def kernel(request: pytest.FixtureRequest, head_config: VllmConfig) -> Iterator[str]:
    with set_current_vllm_config(head_config), torch.inference_mode():
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_cannot_tell_the_sum_without_loss(kernel: str, dtype: torch.dtype) -> None:
    add_and_norm = RMSNorm(SHAPE[1]).to(GPU, dtype)
    add_and_norm.weight.normal_()
    both = {name: torch.randn(SHAPE).to(dtype) for name in ("hidden_states", "residual")}
    with ir.ops.fused_add_rms_norm.set_priority([kernel]):
        expected, found = (
            add_and_norm(pair["hidden_states"].to(GPU), pair["residual"].to(GPU))
            for pair in (both, put_together(take_apart(both), dtype))
        )
    assert all(map(torch.equal, found, expected))
