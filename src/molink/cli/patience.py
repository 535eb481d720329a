"""Options of `molink serve` about waiting: for machines, stages, and what takes their place."""

from typing import Annotated

import typer

from molink.cluster.watch import Patience
from molink.core.errors import UsageError

PATIENCE = Patience()
MAX_OUTAGE_S = 300.0  # a node that restarts and loads its layers again needs a part of it
SPLIT_AFTER_S = 60.0
DRAIN_S = 30.0
SHORTEST_S = 2.0  # for a sign of life: nodes report once a second
LONGEST_S = 7 * 24 * 3600.0

LostAfterOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="How long a machine may be silent before a standby takes its stage; without one it "
        "is waited for until the connection breaks.",
    ),
]
HungAfterOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="How long a stage may give no sign, or compute one step that should take a tenth of "
        "it, before it is started again.",
    ),
]
SplitAfterOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="How long a lost node is waited for, before the others share its layers.",
    ),
]
MaxOutageOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="How long requests wait for what is lost to be replaced, before they fail. "
        "Loading layers again takes as long as at the start.",
    ),
]

DrainOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="How long requests may take to end once the head is told to; a second Ctrl-C ends "
        "them at once.",
    ),
]


def check_patience(
    lost_after: float, hung_after: float, split_after: float, max_outage: float, drain: float
) -> dict[str, float]:
    """Those that are not the defaults, by flag. Raises UsageError for one that cannot be."""
    given = {
        "--lost-after": (lost_after, SHORTEST_S, PATIENCE.lost_s),
        "--hung-after": (hung_after, SHORTEST_S, PATIENCE.hung_s),
        "--split-after": (split_after, 0.0, SPLIT_AFTER_S),
        "--max-outage": (max_outage, 0.0, MAX_OUTAGE_S),
        "--drain": (drain, 0.0, DRAIN_S),
    }
    for name, (seconds, least, _) in given.items():
        if not least <= seconds <= LONGEST_S:
            limits = f"{least:g} to {LONGEST_S:.0f}"
            raise UsageError(f"{name} {seconds:g}: expected seconds, {limits}")
    return {name: seconds for name, (seconds, _, usual) in given.items() if seconds != usual}
