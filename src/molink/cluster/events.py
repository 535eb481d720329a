"""What has happened in a cluster. `at` is in unix seconds; the coordinator's clock gives it."""

from dataclasses import dataclass

from molink.core.cluster import Resources, Versions
from molink.core.ids import NodeId
from molink.core.model import ModelFacts
from molink.core.plan import LayerRange, Pipeline


@dataclass(frozen=True, slots=True)
class HeadStarted:
    """A new process of the head: nobody is connected to it and no stage is loaded."""

    model: ModelFacts
    at: float


@dataclass(frozen=True, slots=True)
class TokenCreated:
    root_certificate: bytes  # PEM; who has the token can make a leaf below it
    expires_at: float  # unix seconds
    at: float
    node_name: str | None = None  # the only one with which it may be used
    uses: int | None = None  # times that it may be used


@dataclass(frozen=True, slots=True)
class TokenUsed:
    root_certificate: bytes
    at: float


@dataclass(frozen=True, slots=True)
class TokenRevoked:
    root_certificate: bytes
    at: float


@dataclass(frozen=True, slots=True)
class NodeRevoked:
    """A node may take part no more; what it computed is lost."""

    node: NodeId
    at: float


@dataclass(frozen=True, slots=True)
class NodeDrained:
    """Others shall compute a node's layers, until it joins again."""

    node: NodeId
    at: float


@dataclass(frozen=True, slots=True)
class NodeEnrolled:
    """A machine has an identity; it has not said anything with it yet."""

    node: NodeId
    name: str
    at: float
    token: str | None = None  # the id of the one it had
    is_bound: bool = False  # it may have no other name


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node is connected; what an earlier process of the same identity said no longer counts."""

    node: NodeId
    name: str
    versions: Versions
    address: str | None  # where others may dial it; None: it only dials out
    layers: LayerRange | None  # pinned by its user
    computes: bool
    tensor_parallel_size: int
    at: float
    stands_by: bool = False


@dataclass(frozen=True, slots=True)
class NodeMeasured:
    """A node holds the right model and knows what it can do: it is ready for a stage."""

    node: NodeId
    resources: Resources
    at: float


@dataclass(frozen=True, slots=True)
class StandbyLoaded:
    """A spare has loaded the layers of a stage ahead, as that stage's successor."""

    node: NodeId
    layers: LayerRange
    at: float


@dataclass(frozen=True, slots=True)
class NodeLost:
    node: NodeId
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class StageLost:
    """The stage's process ended; its node is still there and can load it again."""

    node: NodeId
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class PipelinePlanned:
    pipeline: Pipeline
    at: float


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine has ended; its stages are there, and may be as the next one needs them."""

    at: float


@dataclass(frozen=True, slots=True)
class PipelineDropped:
    """What was planned never served: the next plan need not be like it."""

    at: float


Event = (
    HeadStarted
    | TokenCreated
    | TokenUsed
    | TokenRevoked
    | NodeRevoked
    | NodeDrained
    | NodeEnrolled
    | NodeJoined
    | NodeMeasured
    | StandbyLoaded
    | NodeLost
    | StageLost
    | PipelinePlanned
    | EngineLost
    | PipelineDropped
)
