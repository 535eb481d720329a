"""What the cluster must know of a model to split it and to check that all nodes hold the same."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts read from a model's configuration and checkpoint headers.

    `layer_bytes` and `edge_bytes` are sizes as they lie in the checkpoint: one decoder layer
    (mean), and everything that is not a decoder layer (embedding, final norm, output head).
    """

    name: str  # as the user typed it on the head: a folder or a hub id
    num_layers: int
    hidden_size: int
    config_hash: str  # sha256 of the canonical config.json
    revision: str | None
    layer_bytes: int
    edge_bytes: int
