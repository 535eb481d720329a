"""Options of `molink serve` about who may ask, and how much at once."""

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from molink.cli.flags import values_of, without
from molink.core.errors import UsageError
from molink.gateway.admission import Limits
from molink.gateway.keys import hash_of, read_keys

LIMITS: Final = Limits()  # what they are if nothing is said
KEY_VARIABLE = "VLLM_API_KEY"

GatewayOption = Annotated[
    bool,
    typer.Option(
        "--gateway",
        help="On one machine too, put the gateway before the engine: keys, limits, and streams "
        "that outlive an engine.",
    ),
]
KeysFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Who may use the API: made by `molink key`, read again whenever it changes.",
    ),
]
MaxRunningOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most requests at the engine, others wait in fair shares; by default a quarter more "
        "than it computes at once.",
    ),
]
MaxWaitingOption = Annotated[
    int, typer.Option(min=0, help="Most requests that wait; more are told to come back (429).")
]
RequestTimeoutOption = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        metavar="SECONDS",
        help="Most that a request may take, waiting counted; clients may ask for less with the "
        "header X-Request-Timeout.",
    ),
]


def changed_limits(keys_file: Path | None, limits: Limits) -> dict[str, object]:
    """By flag, what the user chose about requests; None for what he left."""
    return {
        "--api-keys-file": keys_file,
        "--max-running": limits.running,
        "--max-waiting": limits.waiting if limits.waiting != LIMITS.waiting else None,
        "--request-timeout": limits.seconds,
    }


def take_keys(flags: list[str], keys_file: Path | None) -> tuple[list[str], list[str]]:
    """Hashes of the keys that were given, and the flags without them: the gateway asks for keys.

    Raises UsageError for a file that holds no keys.
    """
    if keys_file is not None:
        read_keys(keys_file)
    given = values_of(flags, "--api-key")
    if not given and (key := os.environ.get(KEY_VARIABLE)):
        given = [key]
    os.environ.pop(KEY_VARIABLE, None)  # the engine would ask for it as well
    if any(not key for key in given):
        raise UsageError("--api-key: a key has at least one character")
    return [hash_of(key) for key in given], without(flags, "--api-key", is_list=True)
