"""Addresses inside a cluster: which machine, and which process on it."""

from enum import IntEnum
from typing import NamedTuple, NewType

NodeId = NewType("NodeId", int)
"""Ordinal of a node in its cluster, given by the coordinator and never used twice (0..65535)."""

HEAD = NodeId(0)

MAX_NODE_ID = 0xFFFE
EVERY_STAGE = NodeId(0xFFFF)
"""Destination that the head's agent expands to every node of the pipeline."""


class Port(IntEnum):
    """Process on a node. Frames for STAGE reach every tensor-parallel rank of it."""

    AGENT = 0
    ENGINE = 1
    STAGE = 2
    GATEWAY = 3
    SERVER = 4  # of the engine: what the gateway asks


class Address(NamedTuple):
    """One end of a message."""

    node: NodeId
    port: Port

    def __str__(self) -> str:
        return f"{self.port.name.lower()}@{self.node}"
