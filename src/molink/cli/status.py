"""`molink status`: what a cluster looks like now."""

import typer


def status() -> None:
    """Show the cluster."""
    raise typer.Exit
