"""Tiny checkpoints with random weights, whose answers differ from prompt to prompt."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.e2e.architectures.remote import CONFIGURATION, remote_shapes
from tests.e2e.architectures.table import COMMON, Architecture
from tests.e2e.models import copy_tokenizer, vocabulary_size
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

SEED = 20
NOISE = 0.05  # on biases and norms, which are born equal
IMAGE_TOKEN = "<image>"


def make_checkpoint(architecture: Architecture, tokenizer: Path, folder: Path) -> Path:
    """Save a tiny model of `architecture` into `folder`, which is made."""
    sizes = {**COMMON, **architecture.sizes}
    sizes["vocab_size"] = sizes["padded_vocab_size"] = vocabulary_size(tokenizer)
    folder.mkdir(parents=True)
    torch.manual_seed(SEED)
    if architecture.is_remote:
        _save_remote(architecture, sizes, folder)
        copy_tokenizer(tokenizer, folder)
    elif architecture.vision:
        _save_vision(architecture, sizes, tokenizer, folder)
    else:
        config = AutoConfig.for_model(
            architecture.model_type, initializer_range=architecture.spread, **sizes
        )
        _save(AutoModelForCausalLM.from_config(config), architecture, folder)
        copy_tokenizer(tokenizer, folder)
    return folder


def _save(model: PreTrainedModel, architecture: Architecture, folder: Path) -> None:
    assert type(model).__name__ == architecture.name
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += NOISE * torch.randn_like(parameter)
    model.save_pretrained(folder)


def _save_remote(architecture: Architecture, sizes: dict[str, Any], folder: Path) -> None:
    """As a repository that brings its own code: without a model class, which vLLM does not use."""
    config = sizes | {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "auto_map": {"AutoConfig": "configuration.Configuration"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration.py").write_text(CONFIGURATION.format(architecture.model_type))
    tensors = {
        name: (1 + NOISE * torch.randn(shape))
        if len(shape) == 1
        else architecture.spread * torch.randn(shape)
        for name, shape in remote_shapes(architecture.name, sizes).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _save_vision(
    architecture: Architecture, sizes: dict[str, Any], tokenizer: Path, folder: Path
) -> None:
    """A Llama behind a CLIP; one more token stands for an image."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.processing_llava import LlavaProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    own = {name: sizes.pop(name) for name in architecture.sizes}
    text_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    text_tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    sizes["vocab_size"] = len(text_tokenizer)
    spread = {"initializer_range": architecture.spread}
    config = AutoConfig.for_model(
        architecture.model_type,
        text_config={"model_type": "llama", **sizes, **spread},
        vision_config={**(architecture.vision or {}), **spread},
        image_token_index=text_tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        **own,
    )
    _save(AutoModelForImageTextToText.from_config(config), architecture, folder)
    _rename_as_published(folder / "model.safetensors")
    side = config.vision_config.image_size
    image_sizes = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    is_next = architecture.model_type == "llava_next"
    if is_next:
        image_processor = LlavaNextImageProcessorPil(
            **image_sizes, image_grid_pinpoints=config.image_grid_pinpoints
        )
    else:
        image_processor = CLIPImageProcessorPil(**image_sizes)
    processor = (LlavaNextProcessor if is_next else LlavaProcessor)(
        image_processor,
        text_tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


def _rename_as_published(file: Path) -> None:
    """transformers now saves a CLIP tower without the level that published checkpoints have."""
    tower = "vision_tower."
    tensors = {
        name.replace(tower, f"{tower}vision_model."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
