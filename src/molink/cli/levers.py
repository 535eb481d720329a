"""Options of `molink serve` that say how a pipeline is kept busy, and what crosses its links."""

from typing import Annotated, Final

import msgspec
import typer

from molink.core.errors import UsageError
from molink.engine.owned_flags import name_of
from molink.planning.micro_batches import MAX_STEPS
from molink.wire.to_engine import Drafts, Pacing, SeparatePrefill
from molink.wire.to_stage import WireCoding, WireDtype, WireFormat, WireSum

WIRE: Final = WireFormat()  # what it is if nothing is said
PACING: Final = Pacing()

WireSumOption = Annotated[
    WireSum,
    typer.Option(
        help="Send the sum of two tensors instead of both, where a model has both: half the "
        "bytes. auto: where the tokens stay the same."
    ),
]
WireDtypeOption = Annotated[
    WireDtype,
    typer.Option(help="Between stages, numbers of 8 bits; auto: as the model computes."),
]
WireCodingOption = Annotated[
    WireCoding,
    typer.Option(help="Lossless coding between stages; auto: where the link is slow enough."),
]
MicroBatchesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_STEPS,
        help="Decode steps in flight; by default as many as measured costs say.",
    ),
]
SeparatePrefillOption = Annotated[
    SeparatePrefill,
    typer.Option(
        help="Keep prompts out of decode steps, which then overtake them; auto: where a link "
        "is the bottleneck."
    ),
]
DraftsOption = Annotated[
    Drafts,
    typer.Option(
        help="With --speculative-config: drafted tokens to send along; auto: as many as "
        "measured acceptance and costs say."
    ),
]


_SPECULATION = {"--speculative-config", "-sc", "--spec-method", "--spec-model", "--config"}


def check_drafts(pacing: Pacing, flags: list[str]) -> None:
    """Raises UsageError if drafts are wanted and vLLM's flags do not ask for any."""
    names = {name_of(flag).partition(".")[0] for flag in flags}  # vLLM takes --flag.key too
    if pacing.drafts != PACING.drafts and names.isdisjoint(_SPECULATION):
        raise UsageError(
            f"--drafts {pacing.drafts}: nothing drafts; add for example --spec-method ngram "
            "--spec-tokens 5"
        )


def changed_wire(wire: WireFormat) -> dict[str, object]:
    """By flag, what the user chose about what crosses between stages; None for what he left."""
    return {f"--wire-{name}": value for name, value in _changed(wire).items()}


def changed_pacing(pacing: Pacing) -> dict[str, object]:
    """By flag, what the user chose about how the pipeline is filled; None for what he left."""
    return {f"--{name.replace('_', '-')}": value for name, value in _changed(pacing).items()}


def _changed(settings: msgspec.Struct) -> dict[str, object]:
    chosen = msgspec.structs.asdict(settings)
    default = msgspec.structs.asdict(type(settings)())
    return {name: value if value != default[name] else None for name, value in chosen.items()}
