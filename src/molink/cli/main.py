"""The `molink` command."""

import typer

from molink import __version__
from molink.cli.doctor import doctor
from molink.cli.join import join
from molink.cli.key import key
from molink.cli.orders import node, token
from molink.cli.serve import serve
from molink.cli.status import status

app = typer.Typer(
    help="Serve one large language model over several machines, on vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_EXTRA)(serve)
app.command(context_settings=_EXTRA)(join)
app.command()(status)
app.command()(key)
app.command()(doctor)
app.add_typer(token, name="token")
app.add_typer(node, name="node")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"molink {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=_version, help="Print the version."),
) -> None:
    """Options before the command."""
