"""Quantized checkpoints over two stages, or why not; MOLINK_TEST_ALL=1 tries every format."""

import os
from pathlib import Path

import pytest
from tests.e2e.architectures.reference import reference_tokens
from tests.e2e.cluster import ENVIRONMENT, START_S, Cluster, free_port, tokens
from tests.e2e.conftest import BUNDLED
from tests.e2e.models import MAX_MODEL_LEN
from tests.e2e.quantized import METHODS, make_quantized
from tests.e2e.test_cli import fails
from tests.factories import make_completion, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

IS_COMPLETE = bool(os.environ.get("MOLINK_TEST_ALL"))
LENGTHS = (1, 17, 63, 64, 65, 100, 130, 190)
# The activations are as wide as in the checkpoint, not float32 as in other tests.
COMMON = (f"--max-model-len={MAX_MODEL_LEN}", "--max-num-batched-tokens=64", "--dtype=auto")

RUN = (
    "awq",
    "compressed-tensors-w8a8",
    "gptq-4",
    "auto-round",
    "compressed-tensors-w4a16",
    "compressed-tensors-fp8",
    "online-int8",
)
REFUSED = {  # seen in the configuration
    "gptq-4-desc-act": "GPTQ group activation ordering (desc_act=True) is no longer supported",
    "bitsandbytes": "Unknown quantization method: bitsandbytes",
    "torchao": "Please install torchao",
}
WITHOUT_KERNEL = {  # seen when a stage loads; the others on a CPU without AMX
    "gptq-8": "ValueError: Marlin does not support weight_bits = uint8b128",
    "fp8": "static_scaled_fp8_quant() expected",
    "fp8-static": "static_scaled_fp8_quant() expected",
    "modelopt-fp8": "static_scaled_fp8_quant() expected",
    "online-fp8": "static_scaled_fp8_quant() expected",
    "fp8-blocks": "requires AMX tile support",
}


@pytest.mark.parametrize("name", RUN if IS_COMPLETE else RUN[:2])
def test_two_stages_answer_as_one_process(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    model = make_quantized(method, BUNDLED, tmp_path / "model")
    flags = (*COMMON, *method.flags)
    requests = [make_completion(p, max_tokens=24) for p in make_prompts(LENGTHS)]
    expected = reference_tokens(model, requests, flags)
    assert len({tuple(answer) for answer in expected}) == len(requests)
    with Cluster(model, nodes=2, flags=flags) as cluster:
        assert tokens(cluster.ask(requests)) == expected


@pytest.mark.parametrize("name", list(REFUSED) if IS_COMPLETE else list(REFUSED)[:1])
def test_a_format_that_vllm_does_not_take_is_refused_at_once(name: str, tmp_path: Path) -> None:
    model = make_quantized(METHODS[name], BUNDLED, tmp_path / "model")
    environment = os.environ | ENVIRONMENT | {"MOLINK_HOME": str(tmp_path / "home")}
    ports = ("--port", free_port(), "--listen", "127.0.0.1:0")
    status, said = fails(environment, "serve", model, "--nodes", 2, *ports)
    assert status == 2
    assert REFUSED[name] in said


@pytest.mark.parametrize("name", list(WITHOUT_KERNEL) if IS_COMPLETE else list(WITHOUT_KERNEL)[:1])
def test_a_format_without_a_kernel_ends_the_cluster(name: str, tmp_path: Path) -> None:
    model = make_quantized(METHODS[name], BUNDLED, tmp_path / "model")
    cluster = Cluster(model, nodes=2, flags=(*COMMON, *METHODS[name].flags))
    try:
        cluster.start_head()
        member = cluster.add_member()
        assert cluster.head.wait(START_S) == 1
        assert member.wait() == 0
        assert WITHOUT_KERNEL[name] in cluster.head.log.splitlines()[-1]
        assert "Traceback" not in cluster.head.log + member.log
    finally:
        cluster.end()
