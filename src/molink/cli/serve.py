"""`molink serve`: the head of a cluster, or plain vLLM on one machine."""

import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from molink.checkpoint.model import check_name, read_model
from molink.cli.console import fail, own_versions, run_until_signal, say, say_all
from molink.cli.flags import (
    LOOPBACK,
    check_addresses,
    check_device,
    check_flags,
    pinned,
    stage_settings,
    value_of,
)
from molink.cli.head import run_head
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
from molink.cli.limits import (
    KEY_VARIABLE,
    LIMITS,
    GatewayOption,
    KeysFileOption,
    MaxRunningOption,
    MaxWaitingOption,
    RequestTimeoutOption,
    changed_limits,
    take_keys,
)
from molink.cli.patience import (
    DRAIN_S,
    MAX_OUTAGE_S,
    PATIENCE,
    SPLIT_AFTER_S,
    DrainOption,
    HungAfterOption,
    LostAfterOption,
    MaxOutageOption,
    SplitAfterOption,
    check_patience,
)
from molink.cli.sglang import in_vllms_words, take_model
from molink.cluster.watch import Patience
from molink.core.errors import MolinkError, UsageError
from molink.core.model import ModelFacts
from molink.core.plan import LayerRange
from molink.gateway.admission import Limits
from molink.gateway.options import GatewayOptions
from molink.node.head import HeadSettings
from molink.node.home import ClusterFolder
from molink.node.server_hosts import EngineSettings
from molink.node.stage_host import StageSettings
from molink.node.surroundings import recognise
from molink.wire.to_engine import Pacing
from molink.wire.to_stage import WireFormat

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
    lost_after: LostAfterOption = PATIENCE.lost_s,
    hung_after: HungAfterOption = PATIENCE.hung_s,
    split_after: SplitAfterOption = SPLIT_AFTER_S,
    max_outage: MaxOutageOption = MAX_OUTAGE_S,
    drain: DrainOption = DRAIN_S,
    gateway: GatewayOption = False,
    api_keys_file: KeysFileOption = None,
    max_running: MaxRunningOption = LIMITS.running,
    max_waiting: MaxWaitingOption = LIMITS.waiting,
    request_timeout: RequestTimeoutOption = LIMITS.seconds,
) -> None:
    """Serve MODEL. Alone it is plain vLLM; with --nodes or --layers, other machines join.

    Every flag that is not listed goes to vLLM (see `vllm serve --help`).
    """
    wire = WireFormat(sum=wire_sum, dtype=wire_dtype, coding=wire_coding)
    pacing = Pacing(micro_batches=micro_batches, separate_prefill=separate_prefill, drafts=drafts)
    limits = Limits(max_running, max_waiting, request_timeout)
    try:
        model, flags = _model_and_flags(model, context.args)
        check_device(device)
        check_addresses({"--listen": listen, "--advertise": advertise})
        changed_patience = check_patience(lost_after, hung_after, split_after, max_outage, drain)
        _check_http(host, port, flags, api_keys_file)
        _say_surroundings(host, port, stage_settings(model, flags, send=False))
        if gateway and nodes is None and layers is None:
            nodes = 1
        if nodes in (None, 1) and layers is None and not gateway:
            _check_alone(
                {"--advertise": advertise, "--token-file": token_file, "--cluster": cluster}
            )
            _check_alone({"--relay-limit": relay_limit, **changed_patience})
            _check_alone(changed_wire(wire) | changed_pacing(pacing))
            _check_alone(changed_limits(api_keys_file, limits))
            if model.startswith(("/", "./", "../")):  # what else a name may be, vLLM knows
                check_name(model)
            _plain_vllm(model, host, port, flags + http_flags(model, flags))
        check_flags(flags)
        check_drafts(pacing, flags)
        tls, flags = take_tls(flags)
        key_hashes, flags = take_keys(flags, api_keys_file)
        facts = read_model(model, value_of(flags, "--revision"))
        if layers not in (None, "none"):
            LayerRange.parse(layers, facts.num_layers)
        folder = ClusterFolder(_checked_cluster(cluster) if cluster else _slug(model))
        run_until_signal(
            lambda on_signal: run_head(
                on_signal,
                folder,
                facts,
                EngineSettings(model, _engine_flags(model, flags, facts), wire, pacing, max_outage),
                GatewayOptions(
                    host=host,
                    port=port,
                    tls=tls,
                    max_outage_s=max_outage,
                    key_hashes=key_hashes,
                    keys_file=api_keys_file and api_keys_file.absolute(),
                    limits=limits,
                ),
                HeadSettings(
                    name=name or socket.gethostname(),
                    listen=listen,
                    advertise=advertise,
                    layers=layers,
                    versions=own_versions(),
                    stage=stage_settings(model, flags, send=False),
                    http=f"{'https' if tls.certfile else 'http'}://{host}:{port}",
                    patience=Patience(lost_after, hung_after),
                    split_after_s=split_after,
                    drain_s=drain,
                    relay_bytes_per_s=relay_limit and relay_limit * 125_000,
                ),
                nodes,
                token_file,
            )
        )
    except MolinkError as error:
        fail(error)


def _say_surroundings(host: str, port: int, stage: StageSettings) -> None:
    here = recognise()
    notes = [here.for_ranks(stage.tensor_parallel_size)]
    if host in LOOPBACK:
        notes.append(here.for_api(port))
    say_all(notes)


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
            raise UsageError(
                f"{name} is for a cluster: add --nodes N or --layers A:B, or --gateway on one "
                "machine"
            )


def _plain_vllm(model: str, host: str, port: int, flags: list[str]) -> None:
    """Become vLLM's own server; does not return."""
    say("one node: this is plain vLLM, without any agent; add --nodes N to serve over N machines")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--host", host, "--port", str(port), *flags]
    os.execv(sys.executable, command)


def _check_http(host: str, port: int, flags: list[str], keys_file: Path | None) -> None:
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
    has_key = keys_file or value_of(flags, "--api-key") or os.environ.get(KEY_VARIABLE)
    if host not in LOOPBACK and not has_key:
        say(f"warning: the API on {host}:{port} is open to everybody who reaches it; use --api-key")


def _checked_cluster(name: str) -> str:
    if _slug(name) != name:
        raise UsageError(f"--cluster «{name}»: up to 40 letters, digits, dots, dashes, underscores")
    return name


def _slug(model: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(model).name)[:40]
    return name.strip(".-") or "cluster"
