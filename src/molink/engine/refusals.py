"""What vLLM 0.32.0 can do on one machine and not over stages: refused at start, by name."""

from collections.abc import Sequence

from vllm.config import ModelConfig, VllmConfig

from molink.core.errors import UsageError


def refuse_indivisible(model: ModelConfig) -> None:
    """Raises UsageError for a model whose layers vLLM cannot put into stages."""
    if not model.is_pp_supported:
        raise UsageError(
            f"vLLM does not support pipeline parallelism for {model.architecture}, so it cannot be "
            "split over nodes: use one node"
        )


def refuse_unsupported(config: VllmConfig, tensor_parallel_sizes: Sequence[int]) -> None:
    """Raises UsageError that names the first feature that cannot work over stages.

    Args:
        tensor_parallel_sizes: of every stage.
    """
    parallel, model = config.parallel_config, config.model_config
    speculation = config.speculative_config
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ())
    features = {
        f"speculative decoding by {speculation and speculation.method} (only ngram does)": (
            speculation is not None and speculation.method != "ngram"
        ),
        # Rejected tokens would stay in the state, since each step lays its batch out afresh.
        "speculative decoding of a model that keeps a state (Mamba, GDN and the like)": (
            speculation is not None and (model.is_hybrid or model.is_attention_free)
        ),
        "num_speculative_tokens_per_batch_size (measured costs decide; see --drafts)": bool(
            speculation is not None and speculation.num_speculative_tokens_per_batch_size
        ),
        "watermarking (it needs model runner V2)": config.watermark_config is not None,
        "HiSparse (it needs model runner V2)": config.attention_config.hisparse_config is not None,
        "a diffusion model": model.is_diffusion,
        "an encoder-decoder model": model.is_encoder_decoder,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "data parallelism inside one engine": parallel.data_parallel_size > 1,
        "a KV connector": config.kv_transfer_config is not None,
        "an encoder-cache connector": config.ec_transfer_config is not None,
        "model runner V2": config.use_v2_model_runner,
        "async scheduling": bool(config.scheduler_config.async_scheduling),
        # vLLM would keep one group of KV blocks for each kind and size, and waste most of them.
        "a model that mixes kinds of attention, on stages of different tensor parallel size,": (
            len(kinds) > 1 and len(set(tensor_parallel_sizes)) > 1
        ),
    }
    for feature, is_wanted in features.items():
        if is_wanted:
            raise UsageError(f"{feature} does not work over stages; leave it out, or use one node")
