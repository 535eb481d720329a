"""`molink key`: lets another client use the API."""

from pathlib import Path
from typing import Annotated

import typer

from molink.cli.console import fail, say
from molink.core.errors import MolinkError, UsageError
from molink.gateway.keys import entry, new_key, read_keys


def key(
    name: Annotated[str, typer.Argument(help="Who will use it.")],
    file: Annotated[Path, typer.Option(help="Where its hash is kept (0600).")],
) -> None:
    """Make an API key, show it once, and add its hash to FILE, for `molink serve --api-keys-file`.

    To revoke it, delete its lines there. Limits may be added below them: weight,
    requests-per-minute, at-once.
    """
    try:
        made = new_key()
        lines = entry(name, made)
        if file.exists() and name in {tenant.name for tenant in read_keys(file).values()}:
            raise UsageError(f"{file} has a key {name} already")
        _append(file, lines)
    except MolinkError as error:
        fail(error)
    say(f"{name} may use the API with this key, which is not kept anywhere:")
    typer.echo(made)


def _append(file: Path, lines: str) -> None:
    try:
        file.touch(mode=0o600)
        file.chmod(0o600)
        with file.open("a") as opened:
            opened.write(f"\n{lines}")
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error
