"""Reads what the cluster must know of a model from its files, without loading it.

Only `config.json` and the JSON headers of the safetensors files are read, so this costs
milliseconds for a model of any size.
Format: https://huggingface.co/docs/safetensors (8 bytes header length, little-endian, then JSON).
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from molink.core.errors import UsageError
from molink.core.model import ModelFacts

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_VOLATILE = ("_name_or_path", "transformers_version")  # differ between equal models
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,6})\.")
_OTHER_TOWERS = re.compile(r"(?:^|[._])(?:vision|visual|audio)(?:[._]|$)")
_NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")

_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def read_model(name: str, revision: str | None = None) -> ModelFacts:
    """Facts of a model in a local folder or, by its id, on the hub (or in the hub's local cache).

    Sizes come from the safetensors headers; where there are none, from the configuration's numbers.

    Raises:
        UsageError: no such model, or files that are damaged or describe no model with layers.
    """
    folder = _find(name, revision)
    config = _read_config(folder / "config.json")
    text_config = config.get("text_config")
    text = {**config, **text_config} if isinstance(text_config, dict) else config
    num_layers = _number(text, _NUM_LAYERS_KEYS, folder)
    hidden_size = _number(text, _HIDDEN_SIZE_KEYS, folder)
    sizes = _tensor_sizes(folder)
    in_layers = sum(size for tensor, size in sizes.items() if _is_layer(tensor, num_layers))
    if in_layers:
        layer_bytes, edge_bytes = in_layers // num_layers, sum(sizes.values()) - in_layers
    else:
        layer_bytes, edge_bytes = _estimate(text, hidden_size)
    return ModelFacts(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        config_hash=config_hash(config),
        revision=folder.name if _COMMIT.fullmatch(folder.name) else revision,
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
    return _find_on_hub(name, revision)


def _no_folder(folder: Path) -> UsageError:
    return UsageError(
        f"there is no model folder {folder} on this machine: give the folder that holds its "
        "config.json (on a node that joins, with --model PATH)"
    )


def _find_on_hub(name: str, revision: str | None) -> Path:
    # Comes with vLLM and is slow to import: a local folder does without.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{name} is neither a folder on this machine nor a model the hub gives ({reason}): "
            "give its folder (on a node that joins, with --model PATH)"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not a model's configuration: it holds no JSON object")
    return config


def _number(config: dict[str, Any], keys: Iterable[str], folder: Path) -> int:
    for key in keys:
        if _is_count(config.get(key)):
            return int(config[key])
    raise UsageError(f"{folder / 'config.json'} has none of {', '.join(keys)}: no layers to split")


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_layer(tensor: str, num_layers: int) -> bool:
    """Whether a tensor belongs to a decoder layer; those past the last one are draft layers."""
    match = _LAYER.search(tensor)
    if match is None or _OTHER_TOWERS.search(tensor):
        return False
    return int(match[1]) < num_layers


def _tensor_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor in the folder's safetensors files; empty where there are none."""
    sizes: dict[str, int] = {}
    for path in _weight_files(folder):
        sizes |= _read_header(path)
    return sizes


def _weight_files(folder: Path) -> list[Path]:
    """The files vLLM would load. A hub's cache may hold some of a model only: then none."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    names = _read_config(index).get("weight_map")
    if not isinstance(names, dict) or not all(_is_file_name(name) for name in names.values()):
        raise UsageError(f"{index} is damaged: its weight_map does not name files of this folder")
    files = [folder / name for name in sorted(set(names.values()))]
    return files if all(file.is_file() for file in files) else []


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def _read_header(path: Path) -> dict[str, int]:
    """Bytes of each tensor of one file. Reads no more than the header, within its bound."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            data_bytes = path.stat().st_size - 8 - length
            if not 0 < length <= MAX_HEADER_BYTES or data_bytes < 0:
                raise UsageError(f"{path} is damaged or incomplete: its header says {length} bytes")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    try:
        spans = {
            name: tuple(tensor["data_offsets"])
            for name, tensor in header.items()
            if name != "__metadata__"
        }
        if not all(0 <= start <= end <= data_bytes for start, end in spans.values()):
            raise ValueError("a tensor lies outside the file")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged or incomplete: {error}") from error
    return {name: int(end - start) for name, (start, end) in spans.items()}


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
