"""Every architecture that is compared, as a tiny model of four layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NUM_LAYERS = 4
HIDDEN = 256
HEADS = 4
MAX_MODEL_LEN = 256

Sizes = Mapping[str, Any]

COMMON: Sizes = {
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "float32",
}
OLD_NAMES: Sizes = {"n_layer": NUM_LAYERS, "n_head": HEADS, "n_embd": HIDDEN}
MANY_HEADS: Sizes = {"num_key_value_heads": HEADS}
SLIDING: Sizes = {"sliding_window": 32}
TWO_KINDS: Sizes = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"] * 2}
ROPE: Sizes = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
LATENT: Sizes = {
    **MANY_HEADS,
    # As published. With the default type, vLLM's kernel for CPU misreads queries of three
    # dimensions, and the tokens of a batch mix.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": MAX_MODEL_LEN // 4,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
CLIP: Sizes = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
DEEPSEEK_EXPERTS: Sizes = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
QWEN_EXPERTS: Sizes = {
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a tiny model of one architecture is made.

    `sizes` come over COMMON. A remote model has no class in transformers: its checkpoint holds the
    tensors that `remote_shapes` lists, and a configuration class of its own.
    """

    name: str  # in `architectures` of config.json
    model_type: str
    traits: str  # what sets it apart
    sizes: Sizes = field(default_factory=dict)
    is_remote: bool = False
    spread: float = 0.15  # standard deviation of its weights
    vision: Sizes | None = None


# Those of the systems that MoLink replaces.
NAMED = (
    Architecture("BaichuanForCausalLM", "baichuan", "Baichuan 1 and 2", is_remote=True),
    Architecture(
        "BloomForCausalLM",
        "bloom",
        "ALiBi, tied embeddings",
        {**OLD_NAMES, "tie_word_embeddings": True},
    ),
    Architecture(
        "ChatGLMModel",
        "chatglm",
        "ChatGLM 2 and 3: half of each head rotated, in pairs",
        {
            "num_layers": NUM_LAYERS,
            "kv_channels": HIDDEN // HEADS,
            "ffn_hidden_size": 512,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "add_qkv_bias": True,
            "seq_length": MAX_MODEL_LEN,
            "original_rope": True,
        },
        is_remote=True,
    ),
    Architecture(
        "CohereForCausalLM",
        "cohere",
        "Command-R: parallel attention and MLP, scaled logits",
        {"logit_scale": 0.5, "use_qk_norm": True, "tie_word_embeddings": True},
    ),
    Architecture(
        "DbrxForCausalLM",
        "dbrx",
        "experts, clipped projections",
        {
            "d_model": HIDDEN,
            "n_heads": HEADS,
            "n_layers": NUM_LAYERS,
            "max_seq_len": MAX_MODEL_LEN,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
            "ffn_config": {
                "hidden_size": HIDDEN,
                "ffn_hidden_size": 128,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
    ),
    Architecture(
        "DeepseekForCausalLM",
        "deepseek",
        "experts, a shared expert",
        {**DEEPSEEK_EXPERTS, **ROPE, "hidden_act": "silu", "rms_norm_eps": 1e-6},
        is_remote=True,
    ),
    Architecture(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        "latent attention, experts in groups",
        {**LATENT, **DEEPSEEK_EXPERTS, "n_group": 2, "topk_group": 1},
    ),
    Architecture(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        "latent attention, experts with a correction bias",
        {
            **LATENT,
            **DEEPSEEK_EXPERTS,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "num_mtp_layers": 0,
        },
    ),
    Architecture(
        "FalconForCausalLM",
        "falcon",
        "one key-value head, parallel attention and MLP",
        {"multi_query": True, "parallel_attn": True},
    ),
    Architecture(
        "GemmaForCausalLM",
        "gemma",
        "tied and scaled embeddings",
        {"head_dim": 64, "tie_word_embeddings": True},
    ),
    Architecture(
        "Gemma2ForCausalLM",
        "gemma2",
        "sliding and full attention in turn, capped logits",
        {**SLIDING, "head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
        spread=0.02,
    ),
    Architecture("GlmForCausalLM", "glm", "GLM 4, by transformers' code", {"head_dim": 64}),
    Architecture(
        "GPT2LMHeadModel",
        "gpt2",
        "learned positions, tied embeddings",
        {**OLD_NAMES, "n_positions": MAX_MODEL_LEN, "tie_word_embeddings": True},
    ),
    Architecture("LlamaForCausalLM", "llama", "Llama 1, 2 and 3, Yi"),
    Architecture("MambaForCausalLM", "mamba", "state space", {"state_size": 16}),
    Architecture("MistralForCausalLM", "mistral", "sliding attention", SLIDING),
    Architecture("MixtralForCausalLM", "mixtral", "experts", {"num_local_experts": 4}),
    Architecture(
        "OPTForCausalLM",
        "opt",
        "learned positions",
        {"ffn_dim": 512, "word_embed_proj_dim": HIDDEN, "tie_word_embeddings": True},
    ),
    Architecture(
        "PhiForCausalLM", "phi", "part of each head rotated; by transformers' code", MANY_HEADS
    ),
    Architecture("Phi3ForCausalLM", "phi3", "fused projections"),
    Architecture("QWenLMHeadModel", "qwen", "Qwen 1", is_remote=True),
    Architecture("Qwen2ForCausalLM", "qwen2", "biased projections"),
    Architecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        "experts, a shared expert",
        {**QWEN_EXPERTS, "shared_expert_intermediate_size": 256},
    ),
    Architecture("Qwen3ForCausalLM", "qwen3", "normalised queries and keys", {"head_dim": 64}),
    Architecture("Qwen3MoeForCausalLM", "qwen3_moe", "experts", {**QWEN_EXPERTS, "head_dim": 64}),
    Architecture("StableLmForCausalLM", "stablelm", "part of each head rotated"),
    Architecture(
        "LlavaForConditionalGeneration",
        "llava",
        "LLaVA 1.5: CLIP before a Llama",
        {"vision_feature_layer": -2},
        vision=CLIP,
    ),
    Architecture(
        "LlavaNextForConditionalGeneration",
        "llava_next",
        "LLaVA 1.6: images in tiles",
        {"vision_feature_layer": -2, "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]},
        vision=CLIP,
    ),
    Architecture(
        "LlavaLlamaForCausalLM", "llava", "Yi-VL and LLaVA as first published", is_remote=True
    ),
)

OTHERS = (
    Architecture(
        "Cohere2ForCausalLM",
        "cohere2",
        "Command-R7B: sliding and full attention in turn",
        {**TWO_KINDS, "logit_scale": 0.5, "tie_word_embeddings": True},
    ),
    Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        "sliding and full attention in turn",
        {**TWO_KINDS, "head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
        spread=0.02,
    ),
    Architecture("Glm4ForCausalLM", "glm4", "norms after each block", {"head_dim": 64}),
    Architecture(
        "GptOssForCausalLM",
        "gpt_oss",
        "attention sinks, experts",
        {**TWO_KINDS, "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Architecture(
        "GraniteForCausalLM",
        "granite",
        "scaled residuals and logits",
        {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1},
    ),
    Architecture(
        "Lfm2ForCausalLM",
        "lfm2",
        "convolution and attention in turn",
        {
            "layer_types": ["conv", "full_attention"] * 2,
            "block_auto_adjust_ff_dim": False,
            "block_dim": HIDDEN,
            "block_ff_dim": 512,
            "conv_dim": HIDDEN,
            "conv_dim_out": HIDDEN,
            "tie_word_embeddings": True,
        },
    ),
    Architecture(
        "Mamba2ForCausalLM",
        "mamba2",
        "state space",
        {"num_heads": 8, "head_dim": 64, "state_size": 16, "n_groups": 1, "chunk_size": 64},
    ),
    Architecture(
        "OlmoeForCausalLM", "olmoe", "experts", {"num_experts": 4, "num_experts_per_tok": 2}
    ),
    Architecture(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        "gated delta net and attention, experts",
        {
            **QWEN_EXPERTS,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "head_dim": 64,
            "shared_expert_intermediate_size": 128,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
)
ARCHITECTURES = {architecture.name: architecture for architecture in (*NAMED, *OTHERS)}
