"""Layer ranges, stages and pipelines."""

from dataclasses import dataclass
from typing import Self

from molink.core.errors import PlanError
from molink.core.ids import NodeId


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """Decoder layers `[start, end)`."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise PlanError(f"layers {self.start}:{self.end} are empty or negative")

    @classmethod
    def parse(cls, text: str, num_layers: int | None = None) -> Self:
        """Read `A:B` (end exclusive; `-1` as end means the last layer, if `num_layers` is known).

        Raises:
            PlanError: not of this form, empty, or outside the model.
        """
        try:
            start, end = (int(part) for part in text.split(":"))
        except ValueError:
            raise PlanError(f"layers «{text}»: expected START:END, for example 0:20") from None
        if end == -1 and num_layers is not None:
            end = num_layers
        if num_layers is not None and end > num_layers:
            raise PlanError(f"layers {text} lie outside the model, which has {num_layers} layers")
        return cls(start, end)

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


@dataclass(frozen=True, slots=True)
class Stage:
    """A layer range on one node, computed by `tensor_parallel_size` devices."""

    node: NodeId
    layers: LayerRange
    tensor_parallel_size: int = 1


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages that cover every layer once, in order; `epoch` grows with every new membership."""

    stages: tuple[Stage, ...]
    epoch: int = 1

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(stage.node for stage in self.stages)
