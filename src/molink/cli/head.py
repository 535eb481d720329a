"""Composes the head of a cluster: its state, its authority, its agent; and says how to join."""

import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import typer

from molink.cli.console import say
from molink.cli.download import DownloadDisplay
from molink.cli.flags import LOOPBACK
from molink.cluster.coordinator import Coordinator
from molink.cluster.state import ClusterState
from molink.cluster.store import Store
from molink.core.errors import UsageError
from molink.core.ids import HEAD
from molink.core.model import ModelFacts
from molink.gateway.options import GatewayOptions
from molink.node.head import HeadAgent, HeadSettings
from molink.node.home import ClusterFolder, RunFolder
from molink.node.server_hosts import EngineHost, EngineSettings, GatewayHost
from molink.node.stage_host import StageHost
from molink.node.surroundings import recognise
from molink.transport.identity import (
    AUTHORITY_LIFETIME,
    ClusterAuthority,
    NodeIdentity,
    NodeKey,
)
from molink.transport.token import JoinToken
from molink.transport.tunnel import TunnelExit

TOKEN_LIFETIME_S = 24 * 3600


async def run_head(
    on_signal: Callable[[Callable[[], None]], None],
    folder: ClusterFolder,
    model: ModelFacts,
    engine: EngineSettings,
    gateway: GatewayOptions,
    settings: HeadSettings,
    nodes: int | None,
    token_file: Path | None,
) -> None:
    """Serve until a signal or the end of something that cannot be replaced.

    Args:
        on_signal: is given what a signal shall do.
        nodes: of `--nodes`.
        token_file: where the join token goes; None: into `folder`.

    Raises:
        MolinkError: what cannot be mended.
    """
    store = Store(folder.state)
    state = store.load()
    authority = _authority(folder, is_new=state is None)
    state = state or ClusterState(authority.cluster_id)
    coordinator = Coordinator(state, store, time.time, settings.versions, nodes)
    coordinator.start(model, settings.name)
    identity = _identity(authority, settings.name)
    identity.save(folder.identity)
    run_folder = RunFolder()
    logs = folder.path / "logs"
    try:
        agent = HeadAgent(
            coordinator,
            authority,
            identity,
            settings,
            run_folder,
            lambda gone: StageHost(HEAD, run_folder, logs, gone),
            lambda gone: EngineHost(engine, run_folder, logs, gone),
            lambda gone: GatewayHost(gateway.to_json(), run_folder, logs, gone),
            say,
            DownloadDisplay(),
            TunnelExit(_reachable_here(gateway.host), gateway.port),
        )
        on_signal(agent.leave)
        port = await agent.listen()
        folder.head.write_text(f"{_local_host(settings.listen)}:{port}")
        agent.addresses = _addresses(settings, port)
        _print_invitation(
            agent.invite(TOKEN_LIFETIME_S), settings, port, token_file or folder.token
        )
        say(f"logs are in {logs}")
        say(await agent.run())
    finally:
        run_folder.remove()
        store.close()


def _print_invitation(
    token: JoinToken, settings: HeadSettings, port: int, token_file: Path
) -> None:
    text = token.encode()
    _write_private(token_file, text + "\n")
    say(f"MoLink gRPC server works at {token.addresses[0]}; token in {token_file}")
    is_local = settings.listen.rpartition(":")[0].strip("[]") in LOOPBACK
    if settings.advertise is None and not is_local and (note := recognise().for_head(port)):
        say(note)
    say("on the next machine, run (the token is good for 24 hours):")
    typer.echo(f"\n    molink join --token {text}\n")


def _write_private(file: Path, text: str) -> None:
    try:
        file.touch(mode=0o600)
        if file.is_file():
            file.chmod(0o600)  # an old one may be readable by others
        file.write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write the token file {file}: {error.strerror}") from None


def _local_host(listen: str) -> str:
    """Where this machine itself reaches what listens there."""
    return _reachable_here(listen.rpartition(":")[0])


def _reachable_here(host: str) -> str:
    """A host's name for this machine itself, where it may mean all interfaces."""
    loopback = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "[::]": "[::1]", "::": "::1"}
    return loopback.get(host, host)


def _addresses(settings: HeadSettings, port: int) -> tuple[str, ...]:
    if settings.advertise is not None:
        return (settings.advertise,)
    host = settings.listen.rpartition(":")[0]
    if host not in ("0.0.0.0", "[::]", ""):
        return (f"{host}:{port}",)
    found = [
        address.address
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    if not found:
        say("warning: there is no address but loopback for other machines; use --advertise")
    routed = _routed_address()
    found.sort(key=lambda address: address != routed)
    return tuple(f"{address}:{port}" for address in (*found[:3], "127.0.0.1"))


def _routed_address() -> str | None:
    """This machine's address on its default route; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737)
        except OSError:
            return None
        address: str = probe.getsockname()[0]
        return address


def _authority(folder: ClusterFolder, *, is_new: bool) -> ClusterAuthority:
    """A cluster whose state is lost is a new one: it knows none of the nodes it once let in."""
    if not is_new:
        return ClusterAuthority.load(folder.authority)
    authority = ClusterAuthority.create(f"{folder.path.name}-{secrets.token_hex(3)}")
    authority.save(folder.authority)
    return authority


def _identity(authority: ClusterAuthority, name: str) -> NodeIdentity:
    key = NodeKey()
    # The authority's key lies in the same folder: a shorter life would protect nothing.
    certificate = authority.sign_node(
        key.request_pem(), node=HEAD, name=name, valid_for=AUTHORITY_LIFETIME
    )
    return key.accept(
        certificate, authority.certificate_pem, authority_key=authority.public_key_bytes
    )
