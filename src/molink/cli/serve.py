"""`molink serve`: the head of a cluster, or plain vLLM on one machine."""

import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import psutil
import typer

from molink.checkpoint.model import check_name, read_model
from molink.cli.console import fail, own_versions, run_until_signal, say, say_all
from molink.cli.download import DownloadDisplay
from molink.cli.flags import (
    LOOPBACK,
    check_addresses,
    check_device,
    check_flags,
    pinned,
    stage_settings,
    value_of,
)
from molink.cli.http_flags import http_flags, take_tls
from molink.cli.levers import (
    PACING,
    WIRE,
    DraftsOption,
    MicroBatchesOption,
    SeparatePrefillOption,
    WireCodingOption,
    WireDtypeOption,
    WireSumOption,
    changed_pacing,
    changed_wire,
    check_drafts,
)
from molink.cli.sglang import in_vllms_words, take_model
from molink.cluster.coordinator import Coordinator
from molink.cluster.state import ClusterState
from molink.cluster.store import Store
from molink.core.errors import MolinkError, UsageError
from molink.core.ids import HEAD
from molink.core.model import ModelFacts
from molink.core.plan import LayerRange
from molink.node.engine_host import EngineHost, EngineSettings
from molink.node.gateway_host import GatewayHost, GatewaySettings
from molink.node.head import HeadAgent, HeadSettings
from molink.node.home import ClusterFolder, RunFolder
from molink.node.stage_host import StageHost, StageSettings
from molink.node.surroundings import recognise
from molink.transport.identity import (
    AUTHORITY_LIFETIME,
    ClusterAuthority,
    NodeIdentity,
    NodeKey,
)
from molink.transport.token import JoinToken, new_secret
from molink.transport.tunnel import TunnelExit
from molink.wire.to_engine import Pacing
from molink.wire.to_stage import WireFormat

TOKEN_LIFETIME_S = 24 * 3600
SPLIT_AFTER_S = 60.0
MAX_OUTAGE_S = 300.0  # a node that restarts and loads its layers again needs a part of it
LONGEST_OUTAGE_S = 7 * 24 * 3600.0
DEFAULT_LISTEN = "0.0.0.0:7171"


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub id of the model.")],
    host: Annotated[str, typer.Option(help="Address of the HTTP API.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the HTTP API.")] = 8080,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where other nodes reach this one.")
    ] = DEFAULT_LISTEN,
    advertise: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address to put into the token, if it differs."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Wait for so many nodes, this one counted.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="A:B|none",
            help="Layers of this node (end exclusive, -1 = last); none: compute nothing here.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Write the join token here (0600).")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; must be what vLLM was installed for.")
    ] = "auto",
    cluster: Annotated[
        str | None, typer.Option(help="Name of the cluster's folder under MOLINK_HOME.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of this node; the host's name if not given.")
    ] = None,
    wire_sum: WireSumOption = WIRE.sum,
    wire_dtype: WireDtypeOption = WIRE.dtype,
    wire_coding: WireCodingOption = WIRE.coding,
    micro_batches: MicroBatchesOption = PACING.micro_batches,
    separate_prefill: SeparatePrefillOption = PACING.separate_prefill,
    drafts: DraftsOption = PACING.drafts,
    relay_limit: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="MBIT/S", help="Most that this node relays between others."),
    ] = None,
    split_after: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="How long a lost node is waited for, before the others share its layers.",
        ),
    ] = SPLIT_AFTER_S,
    max_outage: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="How long requests wait for a lost stage to be replaced, before they fail. "
            "Loading its layers again takes as long as at the start.",
        ),
    ] = MAX_OUTAGE_S,
) -> None:
    """Serve MODEL. Alone it is plain vLLM; with --nodes or --layers, other machines join.

    Every flag that is not listed goes to vLLM (see `vllm serve --help`).
    """
    wire = WireFormat(sum=wire_sum, dtype=wire_dtype, coding=wire_coding)
    pacing = Pacing(micro_batches=micro_batches, separate_prefill=separate_prefill, drafts=drafts)
    try:
        model, flags = _model_and_flags(model, context.args)
        check_device(device)
        check_addresses({"--listen": listen, "--advertise": advertise})
        _check_http(host, port, flags)
        _say_surroundings(host, port, stage_settings(model, flags, send=False))
        if nodes in (None, 1) and layers is None:
            _check_alone(
                {"--advertise": advertise, "--token-file": token_file, "--cluster": cluster}
            )
            outage = None if max_outage == MAX_OUTAGE_S else max_outage
            split = None if split_after == SPLIT_AFTER_S else split_after
            _check_alone({"--relay-limit": relay_limit, "--max-outage": outage})
            _check_alone({"--split-after": split})
            _check_alone(changed_wire(wire) | changed_pacing(pacing))
            if model.startswith(("/", "./", "../")):  # what else a name may be, vLLM knows
                check_name(model)
            _plain_vllm(model, host, port, flags + http_flags(model, flags))
        check_flags(flags)
        check_drafts(pacing, flags)
        _check_seconds({"--max-outage": max_outage, "--split-after": split_after})
        tls, flags = take_tls(flags)
        facts = read_model(model, value_of(flags, "--revision"))
        if layers not in (None, "none"):
            LayerRange.parse(layers, facts.num_layers)
        folder = ClusterFolder(_checked_cluster(cluster) if cluster else _slug(model))
        run_until_signal(
            lambda on_signal: _serve(
                on_signal,
                folder,
                facts,
                EngineSettings(model, _engine_flags(model, flags, facts), wire, pacing, max_outage),
                GatewaySettings(host, port, tls.to_json(), max_outage),
                replace(
                    _settings(
                        model,
                        host,
                        port,
                        listen,
                        advertise,
                        layers,
                        name,
                        flags,
                        is_tls=tls.certfile is not None,
                    ),
                    relay_bytes_per_s=relay_limit and relay_limit * 125_000,
                    split_after_s=split_after,
                ),
                nodes,
                token_file,
            )
        )
    except MolinkError as error:
        fail(error)


def _check_seconds(given: Mapping[str, float]) -> None:
    for name, seconds in given.items():
        if not 0 <= seconds <= LONGEST_OUTAGE_S:
            raise UsageError(f"{name} {seconds:g}: expected seconds, 0 to {LONGEST_OUTAGE_S:.0f}")


def _say_surroundings(host: str, port: int, stage: StageSettings) -> None:
    here = recognise()
    notes = [here.for_ranks(stage.tensor_parallel_size)]
    if host in LOOPBACK:
        notes.append(here.for_api(port))
    say_all(notes)


def _settings(
    model: str,
    host: str,
    port: int,
    listen: str,
    advertise: str | None,
    layers: str | None,
    name: str | None,
    flags: list[str],
    *,
    is_tls: bool,
) -> HeadSettings:
    return HeadSettings(
        name=name or socket.gethostname(),
        listen=listen,
        advertise=advertise,
        layers=layers,
        versions=own_versions(),
        stage=stage_settings(model, flags, send=False),
        http=f"{'https' if is_tls else 'http'}://{host}:{port}",
    )


def _model_and_flags(model: str, flags: list[str]) -> tuple[str, list[str]]:
    """MODEL and vLLM's flags, whichever server's words they were said in."""
    named = None
    if model.startswith("-"):  # to click the first unknown flag is an argument
        named, flags = take_model([model, *flags])
        if named is None:
            raise UsageError(f"MODEL comes before vLLM's flags: molink serve MODEL {model} …")
    flags, notes = in_vllms_words(flags)
    say_all(notes)
    return named or model, flags


def _engine_flags(model: str, flags: list[str], facts: ModelFacts) -> tuple[str, ...]:
    return (*flags, *http_flags(model, flags), *pinned(flags, facts.revision))


def _check_alone(of_cluster: Mapping[str, object]) -> None:
    """Raises UsageError for a flag that only a cluster has."""
    for name, value in of_cluster.items():
        if value is not None:
            raise UsageError(f"{name} is for a cluster: add --nodes N or --layers A:B")


def _plain_vllm(model: str, host: str, port: int, flags: list[str]) -> None:
    """Become vLLM's own server; does not return."""
    say("one node: this is plain vLLM, without any agent; add --nodes N to serve over N machines")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--host", host, "--port", str(port), *flags]
    os.execv(sys.executable, command)


async def _serve(
    on_signal: Callable[[Callable[[], None]], None],
    folder: ClusterFolder,
    model: ModelFacts,
    engine: EngineSettings,
    gateway: GatewaySettings,
    settings: HeadSettings,
    nodes: int | None,
    token_file: Path | None,
) -> None:
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
            lambda gone: GatewayHost(gateway, run_folder, logs, gone),
            say,
            DownloadDisplay(),
            TunnelExit(_reachable_here(gateway.host), gateway.port),
        )
        on_signal(lambda: agent.end("stopped"))
        port = await agent.listen()
        folder.head.write_text(f"{_local_host(settings.listen)}:{port}")
        _print_invitation(coordinator, authority, settings, port, token_file or folder.token)
        say(f"logs are in {logs}")
        say(await agent.run())
    finally:
        run_folder.remove()
        store.close()


def _print_invitation(
    coordinator: Coordinator,
    authority: ClusterAuthority,
    settings: HeadSettings,
    port: int,
    token_file: Path,
) -> None:
    token = JoinToken(
        addresses=_addresses(settings, port),
        authority_key=authority.public_key_bytes,
        secret=new_secret(),
        cluster_id=authority.cluster_id,
        expires_at=int(time.time()) + TOKEN_LIFETIME_S,
    )
    coordinator.add_token(token.enrolment_root(), token.expires_at)
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


def _check_http(host: str, port: int, flags: list[str]) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"cannot serve HTTP on {host}:{port}: {error.strerror}; "
                "choose another --port or --host"
            ) from None
    has_key = value_of(flags, "--api-key") or os.environ.get("VLLM_API_KEY")
    if host not in LOOPBACK and not has_key:
        say(f"warning: the API on {host}:{port} is open to everybody who reaches it; use --api-key")


def _checked_cluster(name: str) -> str:
    if _slug(name) != name:
        raise UsageError(f"--cluster «{name}»: up to 40 letters, digits, dots, dashes, underscores")
    return name


def _slug(model: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(model).name)[:40]
    return name.strip(".-") or "cluster"
