"""The weight files of a checkpoint: what they hold, and which of them a stage needs.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, little-endian, then JSON).
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from molink.core.errors import UsageError
from molink.core.plan import LayerRange

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""

INDEX = "model.safetensors.index.json"
_CONSOLIDATED = "consolidated*.safetensors"  # Mistral's own format, which vLLM prefers
_CONSOLIDATED_INDEX = "consolidated.safetensors.index.json"
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,6})\.")
_OTHER_TOWERS = re.compile(r"(?:^|[._])(?:vision|visual|audio)(?:[._]|$)")
_TRUNK = r"(?:(?:model|language_model|transformer|decoder|gpt_neox|backbone)\.)*"
_EMBEDDING = re.compile(_TRUNK + r"(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.")
_HEAD = re.compile(_TRUNK + r"(?:lm_head|embed_out|output|output_layer)\.")
_FINAL_NORM = re.compile(_TRUNK + r"(?:norm|norm_f|ln_f|final_layernorm|final_layer_norm)\.")


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a model that one stage computes.

    `is_tied`: the output head may be the embedding, so that the last stage needs that too.
    """

    layers: LayerRange
    num_layers: int
    is_tied: bool

    def needs(self, tensor: str) -> bool:
        """Whether the stage loads this tensor.

        What is neither in a layer nor known as embedding, norm or head is needed at both ends.
        """
        layer = layer_of(tensor, self.num_layers)
        if layer is not None:
            return self.layers.start <= layer < self.layers.end
        is_first, is_last = self.layers.start == 0, self.layers.end == self.num_layers
        if _HEAD.match(tensor) or _FINAL_NORM.match(tensor):
            return is_last
        if _EMBEDDING.match(tensor) and not self.is_tied:
            return is_first
        return is_first or is_last


def layer_of(tensor: str, num_layers: int) -> int | None:
    """The decoder layer of a tensor, if it is in one; those past the last are draft layers."""
    match = _LAYER.search(tensor)
    if match is None or _OTHER_TOWERS.search(tensor):
        return None
    layer = int(match[1])
    return layer if layer < num_layers else None


def files_of(weight_map: Mapping[str, str], share: Share) -> list[str]:
    """The files that hold the tensors of `share`; all, if the layers are named as nobody knows.

    Args:
        weight_map: file of every tensor.
    """
    known = {layer_of(tensor, share.num_layers) for tensor in weight_map}
    if not known.issuperset(range(share.num_layers)):
        return sorted(set(weight_map.values()))
    has_head = any(_HEAD.match(tensor) for tensor in weight_map)
    if not has_head:
        share = Share(share.layers, share.num_layers, is_tied=True)
    return sorted({file for tensor, file in weight_map.items() if share.needs(tensor)})


@dataclass(frozen=True, slots=True)
class Chosen:
    """The weight files of a stage, and the index that named them, if the checkpoint has one."""

    files: tuple[str, ...]
    index: str | None = None


def choose_files(
    folder: Path, names: Collection[str], share: Share, load_format: str = "auto"
) -> Chosen:
    """The files that hold a stage's tensors; without an index, all that vLLM's loader would take.

    Args:
        folder: holds the index.
        names: of all the checkpoint's files, in the folder or not; subfolders hold other things.
        load_format: vLLM's.

    Raises:
        UsageError: the index is damaged, or names files that are not among `names`.
    """
    if load_format == "dummy":
        return Chosen(())
    names = [name for name in names if "/" not in name]
    pattern, index = "*.safetensors", INDEX
    if load_format == "auto" and any(fnmatch(name, _CONSOLIDATED) for name in names):
        pattern, index = _CONSOLIDATED, _CONSOLIDATED_INDEX
    if index in names:
        files = files_of(read_index(folder / index), share)
        if missing := [file for file in files if file not in names]:
            raise UsageError(
                f"{folder} lacks {missing[0]}, which its {index} names for layers {share.layers}"
            )
        return Chosen(tuple(files), index)
    for kind in (pattern, "*.bin", "*.pt"):
        files = sorted(n for n in names if fnmatch(n, kind) and n not in _NOT_WEIGHTS)
        if files:
            return Chosen(tuple(files))
    raise UsageError(f"{folder} holds no weights: neither safetensors nor .bin files")


def link_files(source: Path, chosen: Chosen, target: Path) -> None:
    """Make `target` a folder of links to all that `source` holds but the weights of other stages.

    vLLM refuses a folder that lacks a file of its index, so the index there names the rest alone.
    """
    assert chosen.index is not None
    weight_map = read_index(source / chosen.index)
    others = set(weight_map.values()) - set(chosen.files)
    target.mkdir()
    for path in source.iterdir():
        if path.name not in others and path.name != chosen.index:
            (target / path.name).symlink_to(path.absolute())
    kept = {tensor: file for tensor, file in weight_map.items() if file in chosen.files}
    (target / chosen.index).write_text(json.dumps({"metadata": {}, "weight_map": kept}))


def check_files(files: Iterable[Path]) -> None:
    """Raises UsageError naming the first safetensors file that is damaged or cut short."""
    for file in files:
        if file.suffix == ".safetensors":
            read_header(file)


def read_json(path: Path) -> dict[str, Any]:
    """Raises UsageError for a file that is not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is damaged: it holds no JSON object")
    return value


def read_index(path: Path) -> dict[str, str]:
    """The file of every tensor. Raises UsageError if one lies outside the index's own folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise UsageError(f"{path} is damaged: its weight_map does not name files of this folder")
    return weight_map


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def read_header(path: Path) -> dict[str, int]:
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
