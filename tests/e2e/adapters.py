"""LoRA adapters with random weights, strong enough to change a model's answers."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 8
SCALE = 0.05


def make_adapter(model: Path, folder: Path, seed: int) -> Path:
    """Save an adapter of every projection of `model` into `folder`, which is made, as PEFT does."""
    generator = torch.Generator().manual_seed(seed)
    tensors, targets = {}, set()
    with safe_open(model / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            module = name.removesuffix(".weight")
            if not module.endswith("_proj"):
                continue
            size_out, size_in = weights.get_slice(name).get_shape()
            targets.add(module.rpartition(".")[2])
            for part, shape in (("lora_A", (RANK, size_in)), ("lora_B", (size_out, RANK))):
                values = torch.randn(shape, generator=generator) * SCALE
                tensors[f"base_model.model.{module}.{part}.weight"] = values
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    config |= {"task_type": "CAUSAL_LM", "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
