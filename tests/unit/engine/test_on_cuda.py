"""What only an accelerator shows: work that is queued and not yet done. Skipped without one."""

import threading
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from vllm import ir
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from molink.engine.activations import StepId, pack, unpack
from molink.engine.compat import _skip_draws
from molink.engine.exact_sum import HIDDEN, RESIDUAL, put_together, take_apart
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


def test_a_generator_is_turned_to_where_it_was() -> None:
    sampler = TopKTopPSampler()
    batch = SimpleNamespace(vocab_size=1536)
    runner = SimpleNamespace(sampler=SimpleNamespace(topk_topp_sampler=sampler), input_batch=batch)
    drawing, turned = (torch.Generator(device=GPU).manual_seed(7) for _ in range(2))
    for _ in range(5):
        sampler.forward_native(torch.zeros(1, 1536, device=GPU), {0: drawing}, None, None)
    _skip_draws(runner, turned, 5)
    assert torch.equal(drawing.get_state(), turned.get_state())


def busy() -> None:
    """Keep the device at work for some milliseconds, so that what follows is only queued."""
    torch.cuda._sleep(20_000_000)


@pytest.mark.parametrize("has_sum", [False, True])
def test_an_output_is_sent_as_it_was_though_its_memory_is_written_again(has_sum: bool) -> None:
    arrivals = Arrivals()
    send = CudaSender(arrivals)
    send.format = HopFormat(has_sum=has_sum)
    static = {name: torch.zeros(SHAPE, device=GPU) for name in (HIDDEN, RESIDUAL)}
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
    payload = bytearray(b"".join(pack({HIDDEN: torch.full(SHAPE, -1.0)})))
    for number in range(20):
        busy()
        send(StepId(1, number), {HIDDEN: torch.full(SHAPE, float(number), device=GPU)})
        unpack(payload, GPU)  # the next step's input takes that memory
    arrivals.wait(20)
    for number, tensors in arrivals.tensors.items():
        assert torch.equal(tensors[HIDDEN], torch.full(SHAPE, float(number)))


def test_received_memory_may_be_reused_at_once() -> None:
    found = []
    for number in range(20):
        payload = bytearray(b"".join(pack({HIDDEN: torch.full(SHAPE, float(number))})))
        busy()
        found.append(unpack(payload, GPU)[HIDDEN])
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "rounds_first"), [("vllm_c", True), ("native", False)])
def test_norms_cannot_tell_the_sum_without_loss(
    kernel: str, rounds_first: bool, dtype: torch.dtype
) -> None:
    """The rounded sum they can, unless they round it themselves before they use it."""
    add_and_norm = ir.ops.fused_add_rms_norm.impls[kernel].impl_fn
    weight = torch.randn(SHAPE[1], device=GPU).to(dtype)
    both = {name: torch.randn(SHAPE, device=GPU).to(dtype) for name in (HIDDEN, RESIDUAL)}
    total = both[HIDDEN] + both[RESIDUAL]

    def normed(hidden: torch.Tensor, residual: torch.Tensor) -> list[torch.Tensor]:
        return list(add_and_norm(hidden.clone(), residual.clone(), weight, 1e-6))

    expected = normed(both[HIDDEN], both[RESIDUAL])
    pair = put_together(take_apart(both), dtype)
    assert all(map(torch.equal, normed(pair[HIDDEN], pair[RESIDUAL]), expected))
    rounded = normed(torch.zeros_like(total), total)
    assert torch.equal(rounded[0], expected[0]) == rounds_first
