"""What the head's agent tells the engine and its HTTP server."""

from typing import Annotated, Literal, Self

import msgspec

from molink.wire import structs
from molink.wire.structs import Rate, Seconds
from molink.wire.to_agent import StageCounters

SeparatePrefill = Literal["auto", "on", "off"]
Drafts = Literal["auto", "all"]


class StagePlace(msgspec.Struct, frozen=True):
    """One stage of the pipeline."""

    node: int
    name: str
    start: int
    end: int
    tensor_parallel_size: int
    dtypes: list[str]  # in which its device computes, best first


class PipelineAssigned(msgspec.Struct, frozen=True, tag=True):
    """The pipeline to serve; the stage processes of all its nodes are up."""

    epoch: int
    stages: list[StagePlace]


class PipelineDown(msgspec.Struct, frozen=True, tag=True):
    """A stage is lost. Steps and calls that wait get no answer any more."""

    reason: str


class PipelineRepaired(msgspec.Struct, frozen=True, tag=True):
    """Every stage has a process again; `replaced` hold no weights yet."""

    pipeline: PipelineAssigned
    replaced: list[int]  # indices of stages


class StandbyChosen(msgspec.Struct, frozen=True, tag=True):
    """A spare is to load the layers of a stage ahead; answered by `to_agent.StandbyPrepared`."""

    place: StagePlace
    stage_index: int
    epoch: int  # of the pipeline that it is to stand by


class StandbyDropped(msgspec.Struct, frozen=True, tag=True):
    """A spare that was to load layers is gone; its calls get no answer any more."""

    node: int


class HopFigures(msgspec.Struct, frozen=True):
    """What lies between two stages. None: not known yet."""

    bytes_per_s: Rate | None  # towards the later stage; None also within one node, where rtt_s is 0
    rtt_s: Seconds | None  # of an idle link


class Pacing(msgspec.Struct, frozen=True, kw_only=True):
    """How the head's user wants the pipeline filled; by default as measurement says."""

    micro_batches: Annotated[int, msgspec.Meta(ge=1)] | None = None  # decode steps in flight
    separate_prefill: SeparatePrefill = "auto"  # auto: where a link is the bottleneck
    drafts: Drafts = "auto"  # with speculative decoding; auto: those that make the round faster

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        return msgspec.json.decode(text, type=cls)


class PathMeasured(msgspec.Struct, frozen=True, tag=True):
    """The stages and links of a pipeline, to the engine once a second.

    Hop i leads from stage i to the next one, the last hop from the last stage back to the head.
    A relayed hop has the smaller rate and the sum of the round trips.
    """

    epoch: int
    hops: list[HopFigures]
    stages: list[StageCounters]


ToEngine = (
    PipelineAssigned
    | PipelineDown
    | PipelineRepaired
    | StandbyChosen
    | StandbyDropped
    | PathMeasured
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)


def encode(message: ToEngine) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes | bytearray | memoryview) -> ToEngine:
    """Raises WireError for anything else."""
    return structs.decode(_decoder, payload)
