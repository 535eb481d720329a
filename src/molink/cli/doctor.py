"""`molink doctor`: why a machine cannot join a cluster, or is slow."""

import asyncio
import os
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from molink.cli.console import console, fail, own_distribution, own_versions
from molink.cli.flags import check_addresses, token_in
from molink.cluster.view import ClusterView, decode_view
from molink.core.errors import IdentityError, LinkError, MolinkError
from molink.node.checkup import (
    Class,
    Finding,
    Proof,
    check_clock,
    check_device,
    check_identity,
    check_machine,
    check_model,
    check_network,
    check_versions,
    why,
)
from molink.node.home import home, known_clusters
from molink.transport.identity import NodeIdentity
from molink.transport.server import fetch_status
from molink.transport.token import JoinToken

TIMEOUT_S = 5.0


def doctor(
    head: Annotated[str, typer.Argument(metavar="HEAD:PORT", help="The head's agent.")],
    token: Annotated[
        str | None, typer.Option(help="The token to join with; or MOLINK_TOKEN.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File that holds the token.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model's folder on this machine, or its hub id.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check whether this machine can join the head at HEAD:PORT, and say how to mend what is wrong.

    The exit status is 0 if all is well; else 10 for the network, 11 for token or certificate, 12
    for the clock, 13 for versions, 14 for the model's files, 15 for memory, disk or driver.
    """
    try:
        check_addresses({"HEAD:PORT": head})
        findings = _look(head, _proof(head, token, token_file), model)
    except MolinkError as error:
        fail(error)
    if json:
        typer.echo(msgspec.json.encode([_plain(finding) for finding in findings]).decode())
    else:
        _show(findings)
    wrong = [finding.of for finding in findings if finding.mend is not None]
    raise typer.Exit(int(wrong[0]) if wrong else 0)


def _proof(head: str, token: str | None, file: Path | None) -> Proof | None:
    """What this machine would show the head: a token that is given, or what it has from before."""
    text = token or (token_in(file) if file else None) or os.environ.get("MOLINK_TOKEN")
    if text is not None:
        return JoinToken.decode(text.strip())
    for folder in known_clusters():
        if folder.head_address() == head:
            try:
                return NodeIdentity.load(folder.identity)
            except IdentityError:
                continue
    return None


def _look(head: str, proof: Proof | None, model: str | None) -> list[Finding]:
    findings = check_network(head)
    if not _is_cut_off(findings):
        findings.append(check_identity(head, proof))
    view = None
    if isinstance(proof, NodeIdentity) and findings[-1].mend is None:
        try:
            view = _status(head, proof)
        except LinkError as error:
            findings.append(why(error))
    if view is not None:
        findings += [check_clock(view, time.time()), check_versions(view, own_versions())]
    name = model or (view.model if view else None)
    findings += check_model(name, home()) if name else check_machine(0, home())
    return [*findings, check_device(own_distribution())]


def _is_cut_off(findings: list[Finding]) -> bool:
    return any(finding.mend is not None and "slow" not in finding.text for finding in findings)


def _status(head: str, identity: NodeIdentity) -> ClusterView:
    return decode_view(asyncio.run(fetch_status(head, identity, TIMEOUT_S)))


def _plain(finding: Finding) -> dict[str, str | None]:
    return {
        "class": Class(finding.of).name.lower(),
        "check": finding.name,
        "found": finding.text,
        "mend": finding.mend,
    }


def _show(findings: list[Finding]) -> None:
    table = Table("", "check", "found", "what to do")
    for finding in findings:
        mark = "ok" if finding.mend is None else "!!"
        table.add_row(mark, finding.name, finding.text, finding.mend or "")
    console.print(table)
