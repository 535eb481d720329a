"""What cannot work over stages is refused by name; everything else passes."""

from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import VllmConfig

from molink.core.errors import UsageError
from molink.engine.refusals import refuse_indivisible, refuse_unsupported

from .conftest import MakeConfig

sizes = st.lists(st.sampled_from([1, 2, 4, 8]), min_size=2, max_size=5)


def changed(config: Any, path: str, value: Any) -> Any:
    """A copy with one field set as vLLM would have left it; what vLLM checks itself is not asked.

    Instances' dictionaries win over vLLM's cached properties.
    """
    name, _, rest = path.partition(".")
    other = copy(config)
    other.__dict__[name] = changed(getattr(config, name), rest, value) if rest else value
    return other


@given(sizes)
def test_a_plain_configuration_passes(head_config: VllmConfig, sizes: list[int]) -> None:
    refuse_unsupported(head_config, sizes)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (
            [
                '--speculative-config={"method": "ngram_gpu", "num_speculative_tokens": 1}',
            ],
            "speculative decoding by ngram_gpu",
        ),
        (
            ['--kv-transfer-config={"kv_connector": "NixlConnector", "kv_role": "kv_both"}'],
            "a KV connector",
        ),
        (["--data-parallel-size=2"], "data parallelism"),
    ],
)
def test_flags_for_one_machine_are_refused_by_name(
    make_config: MakeConfig, flags: list[str], name: str
) -> None:
    config = make_config(*flags)
    with pytest.raises(UsageError, match=f"^{name}.* does not work over stages"):
        refuse_unsupported(config, [1, 1])


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (
            "speculative_config",
            SimpleNamespace(method="eagle", num_speculative_tokens_per_batch_size=None),
            "speculative decoding by eagle",
        ),
        ("watermark_config", object(), "watermarking"),
        ("model_config.is_diffusion", True, "a diffusion model"),
        ("model_config.is_encoder_decoder", True, "an encoder-decoder model"),
        ("parallel_config.prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("parallel_config.decode_context_parallel_size", 2, "decode context parallelism"),
        ("parallel_config.data_parallel_size", 2, "data parallelism"),
        ("kv_transfer_config", object(), "a KV connector"),
        ("ec_transfer_config", object(), "an encoder-cache connector"),
        ("scheduler_config.async_scheduling", True, "async scheduling"),
    ],
)
def test_every_feature_is_refused_by_name(
    head_config: VllmConfig, path: str, value: Any, name: str
) -> None:
    with pytest.raises(UsageError, match=f"^{name}.* does not work over stages"):
        refuse_unsupported(changed(head_config, path, value), [1, 1])


def test_runner_v2_is_refused_by_name(
    head_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(UsageError, match="model runner V2"):
        refuse_unsupported(head_config, [1, 1])


@given(sizes)
def test_mixed_attention_wants_stages_of_equal_size(
    head_config: VllmConfig, sizes: list[int]
) -> None:
    text = SimpleNamespace(layer_types=["sliding_attention", "full_attention"] * 2)
    mixed = changed(head_config, "model_config.hf_text_config", text)
    refuse_unsupported(mixed, sizes[:1] * len(sizes))
    if len(set(sizes)) > 1:
        with pytest.raises(UsageError, match=r"mixes kinds of attention.* tensor parallel size"):
            refuse_unsupported(mixed, sizes)


def test_a_model_that_vllm_cannot_split_is_refused(head_config: VllmConfig) -> None:
    refuse_indivisible(head_config.model_config)
    other = changed(head_config.model_config, "_model_info.supports_pp", False)
    with pytest.raises(UsageError, match=r"LlamaForCausalLM.* cannot be split over nodes"):
        refuse_indivisible(other)


@pytest.mark.parametrize("layer_types", [None, [], ["full_attention"] * 4])
def test_one_kind_of_attention_takes_stages_of_any_size(
    head_config: VllmConfig, layer_types: list[str] | None
) -> None:
    text = SimpleNamespace(layer_types=layer_types)
    refuse_unsupported(changed(head_config, "model_config.hf_text_config", text), [1, 2])
