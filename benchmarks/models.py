"""Models to measure with: seeded random weights in a cache folder, and the bundled model."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "models" / "molink-mini"
SEED = 20261121
ADAPTER_RANK = 16
ADAPTER_SCALE = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama; the embedding is also the head."""

    num_layers: int
    hidden_size: int = 768
    intermediate_size: int = 2048
    vocab_size: int = 4096
    num_heads: int = 12
    num_kv_heads: int = 12
    initializer_range: float = 0.08  # smaller ones give one token over and over at this width

    @property
    def kv_size(self) -> int:
        return self.hidden_size // self.num_heads * self.num_kv_heads

    @property
    def name(self) -> str:
        return f"llama-{self.num_layers}x{self.hidden_size}"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model on disk and what the workload needs to know of it."""

    path: Path
    num_layers: int
    vocab_size: int

    @property
    def name(self) -> str:
        return self.path.name


RANDOM = Shape(num_layers=12)  # 88 M parameters
WIDE = Shape(  # 1.46 B parameters, for a GPU
    24, 2048, 8192, vocab_size=1536, num_heads=32, num_kv_heads=8, initializer_range=0.05
)
HALF = Shape(num_layers=6)  # what one of two stages computes, with both embedding and head


def existing(path: Path) -> Subject:
    """A model that is already there."""
    config = json.loads((path / "config.json").read_text())
    return Subject(path, config["num_hidden_layers"], config["vocab_size"])


def random_model(shape: Shape) -> Subject:
    """The model of this shape, made if the cache does not hold it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    path = cache / "molink" / "benchmarks" / shape.name
    if not (path / "model.safetensors").exists():
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(_config(shape), indent=2))
        _write_tokenizer(path, shape.vocab_size)
        _write_weights(path, shape)
    return Subject(path, shape.num_layers, shape.vocab_size)


def random_adapter(shape: Shape) -> Path:
    """A LoRA adapter of the attention of `random_model(shape)`, made if it is not there."""
    import torch
    from safetensors.torch import save_file

    folder = random_model(shape).path / "adapter"
    if not (folder / "adapter_config.json").exists():
        folder.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(SEED)
        shapes = {"A": (ADAPTER_RANK, shape.hidden_size), "B": (shape.hidden_size, ADAPTER_RANK)}
        tensors = {
            f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_{part}.weight": (
                torch.randn(size, generator=generator) * ADAPTER_SCALE
            )
            for layer in range(shape.num_layers)
            for name in "qkvo"
            for part, size in shapes.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
        config |= {"r": ADAPTER_RANK, "lora_alpha": ADAPTER_RANK}
        config |= {"target_modules": [f"{name}_proj" for name in "qkvo"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": shape.initializer_range,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": 2048,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": shape.vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    """One made-up word for each token: detokenizing costs what it costs elsewhere."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {f"w{index}": index for index in range(vocab_size)}
    Tokenizer(WordLevel(vocabulary, unk_token="w0")).save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1", "unk_token": "w0"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_weights(path: Path, shape: Shape) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(SEED)
    hidden, inner = shape.hidden_size, shape.intermediate_size

    def matrix(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator) * shape.initializer_range
        return values.to(torch.bfloat16)

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    weights = {
        "model.embed_tokens.weight": matrix(shape.vocab_size, hidden),
        "model.norm.weight": ones.clone(),
    }
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            rows = shape.kv_size if name in "kv" else hidden
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(rows, hidden)
        weights[f"{prefix}.mlp.gate_proj.weight"] = matrix(inner, hidden)
        weights[f"{prefix}.mlp.up_proj.weight"] = matrix(inner, hidden)
        weights[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, inner)
        weights[f"{prefix}.input_layernorm.weight"] = ones.clone()
        weights[f"{prefix}.post_attention_layernorm.weight"] = ones.clone()
    unfinished = path / "model.safetensors.part"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.rename(path / "model.safetensors")
