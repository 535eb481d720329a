"""`molink join`: give this machine to a cluster."""

import fcntl
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated

import typer

from molink.cli.console import fail, own_versions, run_until_signal, say, say_all
from molink.cli.download import DownloadDisplay
from molink.cli.flags import (
    LOOPBACK,
    check_addresses,
    check_device,
    check_flags,
    stage_settings,
    token_in,
)
from molink.cli.sglang import in_vllms_words
from molink.cluster.admission import check_node_name
from molink.core.errors import IdentityError, LinkError, MolinkError, TokenError, UsageError
from molink.core.plan import LayerRange
from molink.node.enrolment import request_identity
from molink.node.home import ClusterFolder, RunFolder, known_clusters
from molink.node.member import MemberAgent, MemberSettings
from molink.node.stage_host import StageHost
from molink.node.surroundings import recognise
from molink.transport.identity import NodeIdentity
from molink.transport.server import TunnelChannel, fetch_status
from molink.transport.token import JoinToken
from molink.transport.tunnel import TunnelEntrance

MAX_NODES_PER_MACHINE = 64
MAX_LAYERS = 1 << 16  # more than any model has; how many this one has, the head knows
CONNECT_TIMEOUT_S = 5.0


def join(
    context: typer.Context,
    head: Annotated[
        str | None, typer.Argument(metavar="[HEAD:PORT]", help="Instead of the token's address.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="The token that molink serve printed; or MOLINK_TOKEN.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File that holds the token.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model's folder, if it lies elsewhere on this machine.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Layers of this node (end exclusive, -1 = last)."),
    ] = None,
    standby: Annotated[
        bool,
        typer.Option(
            "--standby", help="Take no stage at first: load the layers of one, and replace it."
        ),
    ] = False,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where other nodes may dial this one.")
    ] = "0.0.0.0:0",
    advertise: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Its address as others see it.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Forward the head's HTTP API from this port, too."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address of that port.")] = "127.0.0.1",
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; must be what vLLM was installed for.")
    ] = "auto",
    name: Annotated[
        str | None, typer.Option(help="Name of this node; the host's name if not given.")
    ] = None,
) -> None:
    """Join the cluster that the token names, and compute a part of its model.

    Every flag that is not listed is this node's own vLLM flag (tensor parallel size, memory share,
    offload).
    """
    flags = list(context.args)
    if head is not None and head.startswith("-"):  # to click the first unknown flag is an argument
        flags = [head, *flags]
        head = None
    flags, notes = in_vllms_words(flags)
    say_all(notes)
    try:
        check_device(device)
        check_flags(flags)
        check_addresses({"HEAD:PORT": head, "--listen": listen, "--advertise": advertise})
        if layers is not None:
            LayerRange.parse(layers, MAX_LAYERS)
        invitation = _read_token(token, token_file, head)
        addresses = (head,) if head else invitation.addresses
        node_name = check_node_name(name or socket.gethostname())
        settings = MemberSettings(
            name=node_name,
            head="",
            listen=listen,
            advertise=advertise,
            model=str(Path(model).resolve()) if model and Path(model).exists() else model,
            layers=layers,
            stands_by=standby,
            versions=own_versions(),
            stage=stage_settings(model or "", flags, send=True),
        )
        _say_surroundings(settings)
        http = None if port is None else (host, port)
        run_until_signal(lambda on_signal: _join(on_signal, invitation, addresses, settings, http))
    except MolinkError as error:
        fail(error)


def _say_surroundings(settings: MemberSettings) -> None:
    here = recognise()
    notes = [here.for_ranks(settings.stage.tensor_parallel_size)]
    if settings.advertise is None:
        notes.append(here.for_node())
    say_all(notes)


def _read_token(token: str | None, file: Path | None, head: str | None) -> JoinToken:
    if token is None and file is None:
        token = os.environ.get("MOLINK_TOKEN") or _token_at_home(head)
    if (token is None) == (file is None):
        raise UsageError(
            "give the token that molink serve printed: --token T or --token-file F, or in "
            "MOLINK_TOKEN; the head keeps it in MODEL/token under its MOLINK_HOME (~/.molink)"
        )
    if token is None:
        assert file is not None
        token = token_in(file)
    return JoinToken.decode(token.strip())


def _token_at_home(head: str | None) -> str | None:
    """The token of the head at HOST:PORT, where it runs on this machine or shares its folder."""
    address = (head or "").replace("localhost:", "127.0.0.1:")
    for folder in known_clusters():
        try:
            text = folder.token.read_text()
            if address in JoinToken.decode(text).addresses:
                return text
        except (OSError, UnicodeDecodeError, TokenError):
            continue
    return None


async def _join(
    on_signal: Callable[[Callable[[], None]], None],
    invitation: JoinToken,
    addresses: tuple[str, ...],
    settings: MemberSettings,
    http: tuple[str, int] | None,
) -> None:
    folder, lock = _own_folder(invitation.cluster_id)
    run_folder = RunFolder()
    try:
        identity, head = await _identity(folder, invitation, addresses, settings.name)
        node = identity.verify().node
        folder.head.write_text(head)
        logs = folder.path / "logs"
        agent = MemberAgent(
            identity,
            lambda renewed: renewed.save(folder.identity),
            replace(settings, head=head),
            run_folder,
            lambda gone: StageHost(node, run_folder, logs, gone),
            say,
            DownloadDisplay(),
        )
        on_signal(lambda: agent.end("stopped"))
        say(f"logs are in {logs}")
        async with _forwarded_api(http, head, identity):
            say(await agent.run())
    finally:
        run_folder.remove()
        lock.close()


@asynccontextmanager
async def _forwarded_api(
    http: tuple[str, int] | None, head: str, identity: NodeIdentity
) -> AsyncIterator[None]:
    """Meanwhile, (host, port) of this machine leads to the head's HTTP server."""
    if http is None:
        yield
        return
    host, port = http
    channel = TunnelChannel(head, identity)
    entrance = TunnelEntrance(channel.open_stream)
    try:
        await entrance.start(host, port)
        say(f"http://{host}:{port} leads to the head's API")
        if host not in LOOPBACK:
            say("warning: whoever reaches this port reaches the API; the head's --api-key bars it")
        yield
    finally:
        await entrance.stop()
        await channel.close()


async def _identity(
    folder: ClusterFolder, invitation: JoinToken, addresses: tuple[str, ...], name: str
) -> tuple[NodeIdentity, str]:
    """This node's identity, old or new, and the head's address that answered.

    Raises:
        TokenError: every address wants another token.
        LinkError: no address lets this node in, and one may later.
    """
    kept = _kept_identity(folder, invitation.authority_key)
    if kept is None:
        invitation.check_not_expired()
    troubles: dict[str, LinkError | TokenError] = {}
    for address in addresses:
        try:
            if kept is not None:
                await fetch_status(address, kept, CONNECT_TIMEOUT_S)
                return kept, address
            identity = await request_identity(address, invitation, name)
        except (LinkError, TokenError) as error:
            troubles[address] = error
        else:
            identity.save(folder.identity)
            return identity, address
    is_token = all(isinstance(error, TokenError) for error in troubles.values())
    said = "; ".join(
        str(error) if address in str(error) else f"{address}: {error}"
        for address, error in troubles.items()
    )
    raise (TokenError if is_token else LinkError)(f"cannot join: {said}")


def _kept_identity(folder: ClusterFolder, authority_key: bytes) -> NodeIdentity | None:
    """The identity of an earlier time in the same cluster, unless it is damaged or out of date."""
    if not folder.identity.exists():
        return None
    try:
        identity = NodeIdentity.load(folder.identity)
        identity.verify()
        identity.check_authority(authority_key)
    except IdentityError:
        return None
    return identity


def _own_folder(cluster_id: str) -> tuple[ClusterFolder, IO[str]]:
    """A folder for this node that no other node on this machine uses."""
    for number in range(1, MAX_NODES_PER_MACHINE + 1):
        folder = ClusterFolder(f"joined-{cluster_id}-{number}")
        file = open(folder.path / "lock", "w")  # noqa: SIM115 - held until the command ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
        else:
            return folder, file
    raise UsageError(f"{MAX_NODES_PER_MACHINE} nodes of this cluster already run on this machine")
