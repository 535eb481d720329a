"""What a running cluster listens on: nothing beyond loopback but agents' ports and HTTP.

`test_netns` looks at the same on machines whose names lead to addresses that others can reach.
"""

import pytest
from tests.e2e.cluster import Cluster, Machine
from tests.e2e.conftest import TWO_STAGES

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(240),
    pytest.mark.parametrize("case", [TWO_STAGES], indirect=True),
]

AGENT, STAGE = "molink.cli.main", "molink.entrypoints.stage"
ENGINE, GATEWAY = "molink.entrypoints.engine", "molink.entrypoints.gateway"


def check_sockets(machine: Machine, http: tuple[str, int] | None) -> int:
    """Raises for a socket too many; returns the agent's port."""
    ((_, agent_port),) = machine.listening(AGENT)
    assert machine.listening(ENGINE) == []
    assert machine.listening(GATEWAY) == ([http] if http else [])
    of_stage = machine.listening(STAGE)
    assert len(of_stage) <= 2  # the world, and one group for all that vLLM makes of one rank
    assert {host for host, _ in of_stage} <= {"127.0.0.1", "::1"}  # torch's own, one per group
    assert len(machine.listening()) == 1 + (http is not None) + len(of_stage)
    return agent_port


def test_each_machine_has_one_port_and_the_head_also_http(pipeline: Cluster) -> None:
    host, _, port = pipeline.url.removeprefix("http://").rpartition(":")
    assert host == "127.0.0.1"
    head_port = check_sockets(pipeline.head, (host, int(port)))
    assert f":{head_port}; token in" in pipeline.head.log
    ports = {f"127.0.0.1:{check_sockets(member, None)}" for member in pipeline.members}
    assert ports == {node.address for node in pipeline.view().nodes if node.id}


def test_unix_sockets_lie_in_a_folder_of_the_user_alone(pipeline: Cluster) -> None:
    for machine in pipeline.machines:
        (folder,) = machine.tmp.glob("molink-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        paths = {
            connection.laddr
            for process in machine.processes()
            for connection in process.net_connections("unix")
            if connection.laddr and not connection.laddr.startswith("@")
        }
        assert [path for path in paths if not path.startswith(f"{folder}/")] == []
