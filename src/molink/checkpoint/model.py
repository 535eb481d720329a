"""Reads what the cluster must know of a model from its files, without loading it.

Only `config.json` and the JSON headers of the safetensors files are read, so this costs
milliseconds for a model of any size in a local folder, and a few requests for one on the hub.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molink.checkpoint import hub
from molink.checkpoint.weights import INDEX, layer_of, read_header, read_index, read_json
from molink.core.errors import HubError, UsageError
from molink.core.model import ModelFacts

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_VOLATILE = ("_name_or_path", "transformers_version")  # differ between equal models
_NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")

_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model's configuration, and where it lies."""

    name: str  # a folder or a hub id
    folder: Path
    config: dict[str, Any]
    revision: str | None  # commit on the hub; None for a plain folder
    stamp: frozenset[tuple[str, int, int]]  # name, size and time of a plain folder's files

    @property
    def text_config(self) -> dict[str, Any]:
        """The numbers of the language model, which other towers' may surround."""
        text = self.config.get("text_config")
        return {**self.config, **text} if isinstance(text, dict) else self.config

    @property
    def is_tied(self) -> bool:
        """Whether the output head may be the embedding: only a plain no is one."""
        said = [c.get("tie_word_embeddings") for c in (self.config, self.text_config)]
        return True in said or False not in said


def find_model(name: str, revision: str | None = None) -> FoundModel:
    """Find a model in a local folder or, by its id, on the hub (or in the hub's local cache).

    Raises:
        UsageError: no such model, or its configuration cannot be read.
    """
    folder = _find(name, revision)
    config = read_json(folder / "config.json")
    if _COMMIT.fullmatch(folder.name):
        return FoundModel(name, folder, config, folder.name, frozenset())
    return FoundModel(name, folder, config, revision, _stamp(folder))


def _stamp(folder: Path) -> frozenset[tuple[str, int, int]]:
    found = ((path, path.stat()) for path in folder.iterdir() if path.is_file())
    return frozenset((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in found)


def read_model(name: str, revision: str | None = None) -> ModelFacts:
    """Facts of a model that `find_model` finds.

    Sizes come from the safetensors headers; where there are none, from the configuration's numbers.

    Raises:
        UsageError: no such model, or files that are damaged or describe no model with layers.
    """
    model = find_model(name, revision)
    text = model.text_config
    num_layers = _number(text, _NUM_LAYERS_KEYS, model.folder)
    hidden_size = _number(text, _HIDDEN_SIZE_KEYS, model.folder)
    sizes = _tensor_sizes(model.folder)
    if not sizes and not Path(name).expanduser().exists():
        with contextlib.suppress(HubError):  # it may be away, and all that is needed in its cache
            sizes = hub.tensor_sizes(name, model.revision)
    layers = {tensor: layer_of(tensor, num_layers) for tensor in sizes}
    in_layers = sum(size for tensor, size in sizes.items() if layers[tensor] is not None)
    if in_layers:
        layer_bytes, edge_bytes = in_layers // num_layers, sum(sizes.values()) - in_layers
    else:
        layer_bytes, edge_bytes = _estimate(text, hidden_size)
    return ModelFacts(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        config_hash=config_hash(model.config),
        revision=model.revision,
        layer_bytes=layer_bytes,
        edge_bytes=edge_bytes,
    )


def config_hash(config: dict[str, Any]) -> str:
    """sha256 (hex) of a configuration, whatever its key order and the tools that wrote it."""
    canonical = json.dumps(_stable(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE}
    if isinstance(value, list):
        return [_stable(item) for item in value]
    return value


def check_name(name: str) -> None:
    """Raises UsageError for what is nothing on this machine and no hub id either."""
    path = Path(name).expanduser()
    if not path.exists() and not _HUB_ID.fullmatch(name):
        raise _no_folder(path)


def _find(name: str, revision: str | None) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"{folder} has no config.json: give the model's own folder "
                "(on a node that joins, with --model PATH)"
            )
        return folder
    if folder.exists():
        raise _no_folder(folder)
    check_name(name)
    try:
        return hub.fetch_config(name, revision).parent
    except (UsageError, HubError) as error:
        raise type(error)(
            f"{name} is neither a folder on this machine nor a model the hub gives ({error}): "
            "give its folder (on a node that joins, with --model PATH)"
        ) from error


def _no_folder(folder: Path) -> UsageError:
    return UsageError(
        f"there is no model folder {folder} on this machine: give the folder that holds its "
        "config.json (on a node that joins, with --model PATH)"
    )


def _number(config: dict[str, Any], keys: Iterable[str], folder: Path) -> int:
    for key in keys:
        if _is_count(config.get(key)):
            return int(config[key])
    raise UsageError(f"{folder / 'config.json'} has none of {', '.join(keys)}: no layers to split")


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _tensor_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor in the folder's safetensors files; empty where there are none."""
    sizes: dict[str, int] = {}
    for path in _weight_files(folder):
        sizes |= read_header(path)
    return sizes


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the whole model. A hub's cache may hold some of it only: then none."""
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    files = [folder / name for name in sorted(set(read_index(index).values()))]
    return files if all(file.is_file() for file in files) else []


def _estimate(config: dict[str, Any], hidden: int) -> tuple[int, int]:
    """Bytes of a layer and of the edges of a Llama-like model, or of one with experts."""

    def number(default: int, *keys: str) -> int:
        found = (config[key] for key in keys if _is_count(config.get(key)))
        return next(found, default)

    heads = number(hidden // 128 or 1, "num_attention_heads", "n_head")
    head_size = number(hidden // heads, "head_dim")
    kv_heads = number(heads, "num_key_value_heads")
    experts = number(0, "num_experts", "num_local_experts", "n_routed_experts")
    inner = number(4 * hidden, "intermediate_size", "ffn_dim", "n_inner")
    width = number(inner, "moe_intermediate_size") * experts if experts else inner
    attention = 2 * hidden * head_size * (heads + kv_heads)
    embedding = hidden * number(0, "vocab_size") * (1 if config.get("tie_word_embeddings") else 2)
    dtype_bytes = _DTYPE_BYTES.get(str(config.get("torch_dtype", config.get("dtype"))), 2)
    bits = 8 * dtype_bytes
    if isinstance(quantization := config.get("quantization_config"), dict):
        bits = quantization["bits"] if _is_count(quantization.get("bits")) else 8
    return (attention + 3 * hidden * width) * bits // 8, embedding * dtype_bytes
