"""Checkpoints of models that transformers does not have: what their repositories hold."""

from collections.abc import Mapping
from typing import Any

CONFIGURATION = """
from transformers import PreTrainedConfig


class Configuration(PreTrainedConfig):
    model_type = "{}"
"""

Shapes = dict[str, tuple[int, ...]]


def remote_shapes(name: str, sizes: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the tensors of a checkpoint; none for what vLLM does not load."""
    makers = {"ChatGLMModel": _chatglm, "DeepseekForCausalLM": _deepseek}
    return makers[name](sizes) if name in makers else {"unused": (1,)}


def _chatglm(sizes: Mapping[str, Any]) -> Shapes:
    hidden, inner, vocabulary = (
        sizes[name] for name in ("hidden_size", "ffn_hidden_size", "vocab_size")
    )
    fused = hidden + 2 * sizes["multi_query_group_num"] * sizes["kv_channels"]
    shapes: Shapes = {
        "transformer.embedding.word_embeddings.weight": (vocabulary, hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocabulary, hidden),
    }
    for layer in range(sizes["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attention.query_key_value.weight": (fused, hidden),
            f"{prefix}.self_attention.query_key_value.bias": (fused,),
            f"{prefix}.self_attention.dense.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.dense_h_to_4h.weight": (2 * inner, hidden),
            f"{prefix}.mlp.dense_4h_to_h.weight": (hidden, inner),
        }
    return shapes


def _deepseek(sizes: Mapping[str, Any]) -> Shapes:
    hidden, vocabulary = sizes["hidden_size"], sizes["vocab_size"]
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
        if layer < sizes["first_k_dense_replace"]:
            shapes |= _gated(f"{prefix}.mlp", hidden, sizes["intermediate_size"])
            continue
        inner, experts = sizes["moe_intermediate_size"], sizes["n_routed_experts"]
        shapes[f"{prefix}.mlp.gate.weight"] = (experts, hidden)
        shapes |= _gated(f"{prefix}.mlp.shared_experts", hidden, inner * sizes["n_shared_experts"])
        for expert in range(experts):
            shapes |= _gated(f"{prefix}.mlp.experts.{expert}", hidden, inner)
    return shapes


def _gated(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }
