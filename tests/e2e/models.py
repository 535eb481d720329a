"""Small models with random weights, whose answers differ from prompt to prompt."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
NUM_LAYERS = 8
MAX_MODEL_LEN = 512
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_model(family: str, tokenizer: Path, folder: Path) -> Path:
    """Save a model of `family` into `folder`, which is made.

    The weights are drawn wider than is usual: fresh models of this size otherwise repeat one token
    whatever they are asked, and two wrong engines agree.
    """
    config_class, model_class = FAMILIES[family]
    config = config_class(**sizes(tokenizer), dtype="float32")
    torch.manual_seed(20)
    model_class(config).save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    return folder


def sizes(tokenizer: Path) -> dict[str, Any]:
    """What the configurations of all families say alike."""
    return {
        "vocab_size": vocabulary_size(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": MAX_MODEL_LEN,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }


def vocabulary_size(tokenizer: Path) -> int:
    """How many tokens the tokenizer in this folder knows."""
    return len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Give the model in `folder` the tokenizer of another."""
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder)
