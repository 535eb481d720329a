"""What deploy/ says agrees with what the commands are."""

import json
import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from molink.cli.console import EXIT_USAGE
from molink.cli.main import app
from molink.cli.serve import DEFAULT_LISTEN
from molink.node.home import HOME_VARIABLE
from molink.node.processes import STOP_TIMEOUT_S

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
AGENT_PORT = int(DEFAULT_LISTEN.rpartition(":")[2])


class Parsed(NamedTuple):
    """A command line of molink."""

    params: dict[str, Any]
    args: list[str]  # what is vLLM's


def parsed(line: str) -> Parsed:
    name, *arguments = line.split()
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    context = group.commands[name].make_context(name, arguments)
    return Parsed(context.params, context.args)


def http_port() -> int:
    port: int = parsed("serve MODEL").params["port"]
    return port


def instructions(name: str) -> list[str]:
    """What follows `name` in the Containerfile, a string for each time."""
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", text, re.MULTILINE)


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in instructions("ENV") for pair in line.split())


@pytest.fixture
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return content


@pytest.fixture(params=["head", "node"])
def role(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def unit(role: str) -> dict[str, str]:
    """The [Service] section of a systemd unit."""
    parser = ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / f"systemd/molink-{role}.service")
    return dict(parser["Service"])


def example(role: str) -> dict[str, str]:
    lines = (DEPLOY / f"systemd/{role}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_a_unit_starts_a_command_with_its_examples_arguments(
    role: str, unit: dict[str, str]
) -> None:
    program, name, variable = unit["ExecStart"].split()
    assert program == "/opt/molink/.venv/bin/molink"
    assert unit["EnvironmentFile"] == f"/etc/molink/{role}.env"
    command = parsed(f"{name} {example(role)[variable.removeprefix('$')]}")
    assert command.params["model"].startswith("/srv/models/")


def test_a_unit_does_not_repeat_a_mistake(unit: dict[str, str]) -> None:
    assert unit["RestartPreventExitStatus"] == str(EXIT_USAGE)


def test_a_unit_leaves_the_agent_time_to_end_its_processes(unit: dict[str, str]) -> None:
    assert unit["KillMode"] == "mixed"  # SIGTERM for the agent alone
    assert int(unit["TimeoutStopSec"]) > 2 * STOP_TIMEOUT_S


def test_a_unit_keeps_its_state_where_systemd_makes_a_folder(unit: dict[str, str]) -> None:
    assert f"{HOME_VARIABLE}=%S/{unit['StateDirectory']}" in unit["Environment"].split()
    assert f"HOME=%C/{unit['CacheDirectory']}" in unit["Environment"].split()


def test_engines_run_under_a_units_restrictions(unit: dict[str, str]) -> None:
    assert not {"MemoryDenyWriteExecute", "PrivateDevices", "PrivateNetwork"} & unit.keys()
    assert {"AF_UNIX", "AF_INET", "AF_NETLINK"} <= set(unit["RestrictAddressFamilies"].split())


def test_the_image_is_made_from_one_version_and_runs_as_nobody_special() -> None:
    (base,) = instructions("FROM")
    assert re.fullmatch(r"docker\.io/library/debian:\d+\.\d+-slim", base)
    assert int(instructions("USER")[-1]) > 0


def test_the_image_starts_the_command() -> None:
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["molink"]
    assert instructions("EXPOSE") == [f"{AGENT_PORT} {http_port()}"]
    health = instructions("HEALTHCHECK")[0].partition(" CMD ")[2]
    assert json.loads(health) == ["molink", "status"]


def test_the_images_state_is_on_volumes() -> None:
    volumes = json.loads(instructions("VOLUME")[0])
    environment = image_environment()
    assert volumes == [environment[HOME_VARIABLE], environment["HF_HOME"]]


def test_the_build_context_holds_what_is_there() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    assert {"src", "requirements", "scripts/install", "pyproject.toml"} <= set(kept)


def test_the_builds_of_compose_have_locks(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        build = service["build"]["args"]["BUILD"]
        assert service["image"] == f"molink:{build}"
        assert (ROOT / f"requirements/{build}.lock").exists()


def test_composes_head_is_where_its_node_looks(compose: dict[str, Any]) -> None:
    head = parsed(compose["services"]["head"]["command"])
    node = parsed(compose["services"]["node"]["command"])
    assert head.params["advertise"] == f"head:{AGENT_PORT}"
    assert head.params["nodes"] == 2
    assert head.params["token_file"] == node.params["token_file"]
    assert head.args == ["--enforce-eager", "--max-model-len", "1024"]
    assert compose["services"]["head"]["ports"] == [f"127.0.0.1:{http_port()}:{http_port()}"]


def test_composes_services_share_no_state(compose: dict[str, Any]) -> None:
    home = image_environment()[HOME_VARIABLE]
    mounts = [volume for service in compose["services"].values() for volume in service["volumes"]]
    homes = [mount.partition(":")[0] for mount in mounts if mount.endswith(f":{home}")]
    assert len(homes) == len(set(homes)) == len(compose["services"])
    assert set(homes) <= compose["volumes"].keys()
