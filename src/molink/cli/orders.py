"""`molink token` and `molink node`: what the operator of a cluster asks of its head."""

import asyncio
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from molink.cli.console import console, fail, say
from molink.core.errors import MolinkError, UsageError
from molink.node.home import ClusterFolder, known_clusters
from molink.transport.identity import NodeIdentity
from molink.transport.server import send_order
from molink.wire import orders
from molink.wire.orders import (
    CreateToken,
    Done,
    DrainNode,
    ListTokens,
    Order,
    Reply,
    RevokeNode,
    RevokeToken,
    TokenMade,
    Tokens,
)

TIMEOUT_S = 5.0
HOUR_S = 3600

token = typer.Typer(help="Who may join the cluster of this machine's head.", no_args_is_help=True)
node = typer.Typer(help="The nodes of this machine's head.", no_args_is_help=True)

ClusterOption = Annotated[
    str | None, typer.Option(help="Name of the cluster's folder, if several heads run here.")
]


@token.command()
def create(
    for_node: Annotated[
        str | None, typer.Option("--node", help="The only name with which it may be used.")
    ] = None,
    uses: Annotated[
        int | None, typer.Option(min=1, help="So many nodes may join with it; by default any.")
    ] = None,
    hours: Annotated[float, typer.Option(min=0.01, help="How long it is good for.")] = 24.0,
    cluster: ClusterOption = None,
) -> None:
    """Make a join token, and print it: nobody keeps it."""
    order = CreateToken(for_node, uses, max(1, round(hours * HOUR_S)))
    made = _ask(order, cluster)
    assert isinstance(made, TokenMade)
    typer.echo(made.text)


@token.command("list")
def list_(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cluster: ClusterOption = None,
) -> None:
    """Show the tokens that let nodes in now."""
    found = _ask(ListTokens(), cluster)
    assert isinstance(found, Tokens)
    if json:
        typer.echo(msgspec.json.encode(found.tokens).decode())
        return
    table = Table("token", "good until", "for", "uses left")
    for one in found.tokens:
        until = datetime.fromtimestamp(one.expires_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
        left = "any" if one.uses_left is None else str(one.uses_left)
        table.add_row(one.id, until, one.node or "anybody", left)
    console.print(table)


@token.command("revoke")
def revoke_token(
    name: Annotated[str, typer.Argument(metavar="TOKEN", help="As `molink token list` shows it.")],
    cluster: ClusterOption = None,
) -> None:
    """Let nobody in with a token any more."""
    _do(RevokeToken(name), cluster)


@node.command("revoke")
def revoke_node(
    name: Annotated[str, typer.Argument(metavar="NODE")], cluster: ClusterOption = None
) -> None:
    """Shut a node out for good, whatever certificate it has."""
    _do(RevokeNode(name), cluster)


@node.command()
def drain(
    name: Annotated[str, typer.Argument(metavar="NODE")], cluster: ClusterOption = None
) -> None:
    """Have others compute a node's layers, so that it can go without anybody waiting for it."""
    _do(DrainNode(name), cluster)


def _do(order: Order, cluster: str | None) -> None:
    done = _ask(order, cluster)
    assert isinstance(done, Done)
    say(done.text)


def _ask(order: Order, cluster: str | None) -> Reply:
    """What the head of this machine says; ends the command if there is none, or it refuses."""
    try:
        return asyncio.run(_send(order, cluster))
    except MolinkError as error:
        fail(error)


async def _send(order: Order, cluster: str | None) -> Reply:
    folder = _head(cluster)
    address, identity = str(folder.head_address()), NodeIdentity.load(folder.identity)
    return orders.decode_reply(await send_order(address, identity, orders.encode(order), TIMEOUT_S))


def _head(cluster: str | None) -> ClusterFolder:
    """The folder of this machine's head. Raises UsageError if it is not clear which is meant."""
    found = [f for f in known_clusters() if f.authority.exists() and f.head_address()]
    if cluster is not None:
        found = [folder for folder in found if folder.path.name == cluster]
    if not found:
        raise UsageError("no head runs on this machine: this is said where molink serve runs")
    if len(found) > 1:
        names = ", ".join(folder.path.name for folder in found)
        raise UsageError(f"several heads have run on this machine ({names}): add --cluster NAME")
    return found[0]
