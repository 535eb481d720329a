"""What an agent reads: from processes on its own node, and from the head."""

from typing import Annotated

import msgspec

from molink.core.cluster import Resources
from molink.wire import structs
from molink.wire.structs import Bytes, Rate, Seconds

# From the node's own processes


class Attach(msgspec.Struct, frozen=True, tag=True):
    """First message on a local socket; the frame's header says port and rank."""


class StageUp(msgspec.Struct, frozen=True, tag=True):
    """A stage process is ready to load layers, and has measured its device."""

    device: Annotated[str, msgspec.Meta(max_length=200)]
    num_devices: int
    free_bytes: int
    bytes_per_s: float
    flop_per_s: float
    dtypes: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=20)]], msgspec.Meta(max_length=16)
    ]

    @property
    def resources(self) -> Resources:
        return Resources(**msgspec.structs.asdict(self) | {"dtypes": tuple(self.dtypes)})


class StepCost(msgspec.Struct, frozen=True):
    """What a step costs a stage, as measured: so much, and so much for each of its tokens."""

    fixed_s: Seconds
    per_token_s: Seconds


class StageCounters(msgspec.Struct, tag=True):
    """What a stage has done since it started. Owned by the stage; sent as a snapshot."""

    steps: int = 0
    compute_s: Seconds = 0.0
    waiting_s: Seconds = 0.0  # for input or for work
    decode: StepCost | None = None  # of steps whose requests all compute their next token
    prefill: StepCost | None = None  # of the others
    bytes_per_token: Rate | None = None  # of activations, as they left in the last second
    busy_s: Seconds = 0.0  # so far, with the step it is in; 0: it is in none
    busy_cost_s: Seconds | None = None  # what that step should take; None: not known


class Downloading(msgspec.Struct, frozen=True, tag=True):
    """A stage downloads the files that hold its layers; all but the last say that it goes on."""

    file: Annotated[str, msgspec.Meta(max_length=300)]
    bytes_done: Bytes  # of all the files it lacked
    bytes_total: Bytes

    @property
    def is_done(self) -> bool:
        return self.bytes_done >= self.bytes_total

    def __str__(self) -> str:
        """Done and total, for example «3.1/8.4 GB»."""
        unit, size = ("GB", 1e9) if self.bytes_total >= 1e9 else ("MB", 1e6)
        return f"{self.bytes_done / size:.1f}/{self.bytes_total / size:.1f} {unit}"


class PaceDecision(msgspec.Struct, frozen=True):
    """How the engine keeps the pipeline busy; why, the costs of stages and links say."""

    micro_batches: int  # decode steps in flight
    prefill_tokens: int  # of one step
    prefill_steps: int  # in flight
    is_split: bool  # a step holds decodes or prompts, not both
    round_s: Seconds | None  # what a round of decodes should take; None: costs are not known
    draft_chance: float | None = None  # that a drafted token is right; None: nothing is drafted
    drafts: int | None = None  # drafted tokens that a request of that chance takes along


class EngineState(msgspec.Struct, frozen=True, tag=True):
    """The engine serves (`error` is None) or could not repair its pipeline."""

    epoch: int
    error: str | None
    steps_in_flight: int = 0
    failed: int | None = None  # the node that could not load its layers
    pace: PaceDecision | None = None  # the latest
    at_once: int | None = None  # requests that it computes at once; its HTTP server says so


class StandbyPrepared(msgspec.Struct, frozen=True, tag=True):
    """A spare has loaded the layers of a stage, or could not."""

    node: int
    error: str | None


class GatewayDrains(msgspec.Struct, frozen=True, tag=True):
    """How many requests the gateway still has to answer before the head may end."""

    requests: int


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine is about to end, and why."""

    reason: str
    is_usage: bool = False  # another one would end in the same way


# From the head


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The node is admitted; it checks that it holds this model."""

    cluster_id: str
    model: str  # as typed on the head: a folder or a hub id
    config_hash: str
    revision: str | None
    revoked: list[int] = []  # nodes that were shut out


class NodesRevoked(msgspec.Struct, frozen=True, tag=True):
    """Nodes that were shut out of the cluster: have nothing to do with them."""

    nodes: list[int]


class Renewed(msgspec.Struct, frozen=True, tag=True):
    """The node's next certificate, for the key it has asked with."""

    certificate: bytes  # PEM


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The node may not take part, and why; it ends."""

    reason: str
    is_usage: bool = False  # its user said something that does not do


class Notice(msgspec.Struct, frozen=True, tag=True):
    """A line for the person in front of the node; from its own stage too."""

    text: str


class Dial(msgspec.Struct, frozen=True, tag=True):
    """Try to link directly to another node; answered by `wire.to_head.Dialled`."""

    node: int
    address: str  # HOST:PORT


class StageAssigned(msgspec.Struct, frozen=True, tag=True):
    """The node's layers, for its own display."""

    start: int
    end: int
    stage_index: int
    num_stages: int


class RestartStage(msgspec.Struct, frozen=True, tag=True):
    """Start the stage's processes anew: a new engine will load them."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """The head ends; so does the node."""

    reason: str


class Probe(msgspec.Struct, frozen=True, tag=True):
    """Bytes that mean nothing: the link's receipts for them measure it."""

    filler: bytes = b""


ToAgent = (
    Attach
    | StageUp
    | StageCounters
    | Downloading
    | EngineState
    | StandbyPrepared
    | GatewayDrains
    | EngineFailed
    | Welcome
    | NodesRevoked
    | Renewed
    | Refused
    | Notice
    | Dial
    | StageAssigned
    | RestartStage
    | Shutdown
    | Probe
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[ToAgent] = msgspec.msgpack.Decoder(ToAgent)


def encode(message: ToAgent) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes | bytearray | memoryview) -> ToAgent:
    """Raises WireError for anything else."""
    return structs.decode(_decoder, payload)
