"""Whether a node may take part: it must run the same software and hold the same model."""

import re
from dataclasses import dataclass

from molink.core.cluster import Versions
from molink.core.errors import AdmissionError, UsageError
from molink.core.model import ModelFacts

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Hello:
    """What a connected node says of itself first."""

    name: str
    versions: Versions
    address: str | None = None  # where others may dial it; None: it only dials out
    layers: str | None = None  # as its user typed it: A:B, on the head also "none"
    tensor_parallel_size: int = 1
    stands_by: bool = False


@dataclass(frozen=True, slots=True)
class HeldModel:
    """Which model a node has found on its own disk."""

    config_hash: str  # sha256 of the canonical config.json
    revision: str | None  # commit on the hub; None for a plain folder

    @classmethod
    def of(cls, model: ModelFacts) -> "HeldModel":
        return cls(model.config_hash, model.revision)


def check_node_name(name: str) -> str:
    """Raises UsageError for what cannot be a node's name."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"node name {name[:80]!r}: 1 to 63 letters, digits, dots, dashes and underscores, "
            "a letter or digit first"
        )
    return name


def check_versions(name: str, node: Versions, head: Versions) -> None:
    """Raises AdmissionError that names both values of the first difference."""
    for what, ours, theirs in (
        ("the wire's protocol", head.protocol, node.protocol),
        ("MoLink", head.molink, node.molink),
        ("vLLM", head.vllm, node.vllm),
    ):
        _same(name, what, ours, theirs, "install the same version on both")


def check_model(name: str, node: HeldModel, head: ModelFacts) -> None:
    """Raises AdmissionError that names both values of the first difference.

    A revision is compared only where both sides have one: a copied folder has lost it.
    """
    remedy = f"give the folder of {head.name} on that machine with --model PATH"
    _same(name, "the model's config.json (sha256)", head.config_hash, node.config_hash, remedy)
    if head.revision is not None and node.revision is not None:
        _same(name, "the model's revision", head.revision, node.revision, remedy)


def _same(name: str, what: str, ours: object, theirs: object, remedy: str) -> None:
    if ours != theirs:
        raise AdmissionError(f"{name} differs in {what}: head {ours}, {name} {theirs}; {remedy}")
