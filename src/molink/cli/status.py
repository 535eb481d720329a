"""`molink status`: what a cluster looks like now."""

import asyncio
from typing import Annotated

import typer
from rich.table import Table

from molink.cli.console import console, fail
from molink.cli.flags import check_addresses
from molink.cluster.view import ClusterView, StageView, decode_view
from molink.core.errors import IdentityError, LinkError, MolinkError, UsageError
from molink.node.home import ClusterFolder, known_clusters
from molink.transport.identity import NodeIdentity
from molink.transport.server import fetch_status

TIMEOUT_S = 3.0


def status(
    head: Annotated[
        str | None,
        typer.Argument(metavar="[HEAD:PORT]", help="The head's agent, if several run here."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show nodes, stages and links of the cluster this machine belongs to."""
    try:
        check_addresses({"HEAD:PORT": head})
        answers = asyncio.run(_ask(head))
        if len(answers) > 1:
            known = ", ".join(answers)
            raise UsageError(f"several clusters answer: {known}; name one: molink status HEAD:PORT")
        (data,) = answers.values()
    except MolinkError as error:
        fail(error)
    if json:
        typer.echo(data.decode())
    else:
        _show(decode_view(data))


async def _ask(head: str | None) -> dict[str, bytes]:
    """What the heads say, by address, each cluster's once; with `head` only that one.

    Raises:
        MolinkError: nobody answers, and why.
    """
    if head:
        return {head: await _ask_with_any(head)}
    known = [
        (address, identity)
        for folder in known_clusters()
        if (address := folder.head_address()) and (identity := _identity_of(folder))
    ]
    if not known:
        raise UsageError(
            "this machine belongs to no cluster: start one with molink serve, or run this on a "
            "machine that has joined one"
        )
    answers = await asyncio.gather(
        *(fetch_status(address, identity, TIMEOUT_S) for address, identity in known),
        return_exceptions=True,
    )
    clusters = {
        decode_view(answer).cluster_id: (address, answer)
        for (address, _), answer in zip(known, answers, strict=True)
        if isinstance(answer, bytes)
    }
    if not clusters:
        reasons = {str(answer) for answer in answers}
        raise LinkError(f"no cluster answers: {'; '.join(sorted(reasons))}")
    return dict(clusters.values())


async def _ask_with_any(head: str) -> bytes:
    """Ask with each identity of this machine in turn; raises the last one's LinkError."""
    trouble: MolinkError = UsageError(
        f"this machine has no identity in any cluster, so {head} will not answer"
    )
    for folder in known_clusters():
        identity = _identity_of(folder)
        if identity is None:
            continue
        try:
            return await fetch_status(head, identity, TIMEOUT_S)
        except LinkError as error:
            trouble = error
    raise trouble


def _identity_of(folder: ClusterFolder) -> NodeIdentity | None:
    try:
        return NodeIdentity.load(folder.identity)
    except IdentityError:
        return None


def _show(view: ClusterView) -> None:
    state = "serving" if view.serving else "not serving"
    console.print(f"cluster {view.cluster_id} · {view.model} · {state} at {view.http}")
    nodes = Table("node", "status", "role", "device", "free GiB", "trouble", title="nodes")
    for node in view.nodes:
        free = "" if node.free_bytes is None else f"{node.free_bytes / (1 << 30):.1f}"
        status = f"downloads {node.download}" if node.download else node.status
        nodes.add_row(node.name, status, node.role or "", node.device or "", free, node.trouble)
    console.print(nodes)
    figures = "steps", "compute s", "waiting s"
    stages = Table("stage", "node", "layers", *figures, "if it is lost", title="stages")
    for stage in view.stages:
        counters = stage.counters
        times = f"{counters.compute_s:.1f}", f"{counters.waiting_s:.1f}"
        steps, heirs = str(counters.steps), _heirs(view, stage)
        stages.add_row(str(stage.index + 1), stage.node, stage.layers, steps, *times, heirs)
    console.print(stages)
    console.print(_links_table(view))
    for path in view.paths:
        if path.way == "relayed":
            console.print(f"{' and '.join(path.nodes)} cannot dial each other: the head relays")


def _heirs(view: ClusterView, stage: StageView) -> str:
    """Who would compute a stage if it were lost now."""
    if ready := [node.name for node in view.nodes if node.loaded == stage.layers]:
        return f"{ready[0]} takes over at once"
    spares = [node for node in view.nodes if node.role in ("standby", "spare")]
    if others := [n.name for n in spares if n.status == "ready" and n.device != "none"]:
        return f"{' or '.join(others)} loads it, if it has room"
    return f"waits for {stage.node}"


def _links_table(view: ClusterView) -> Table:
    figures = ("Mbit/s", "round trip ms", "jitter ms", "loss")
    links = Table("from", "to", "MiB sent", "KiB queued", *figures, title="links")
    for link in view.links:
        links.add_row(
            link.source,
            link.destination,
            f"{link.bytes_sent / (1 << 20):.2f}",
            f"{sum(link.bytes_queued.values()) / (1 << 10):.0f}",
            "" if link.bytes_per_s is None else f"{link.bytes_per_s * 8e-6:.1f}",
            "" if link.rtt_s is None else f"{link.rtt_s * 1e3:.2f}",
            f"{link.jitter_s * 1e3:.2f}",
            "" if link.loss is None else f"{link.loss:.2%}",
        )
    return links
