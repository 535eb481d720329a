"""What a machine is recognised as, from made-up trees of files."""

import os
from pathlib import Path

import pytest

from molink.node.surroundings import SMALL_SHARED_MEMORY, Place, Surroundings, recognise

KERNEL = "proc/sys/kernel/osrelease"
WSL1 = {KERNEL: "4.4.0-19041-Microsoft\n"}
WSL2 = {KERNEL: "5.15.153.1-microsoft-standard-WSL2\n", "sys/class/net/eth0/device/vendor": ""}
DEBIAN = {KERNEL: "6.1.0-28-amd64\n", "sys/class/net/eth0/device/vendor": ""}
BRIDGED = {KERNEL: "6.1.0-28-amd64\n", "sys/class/net/eth0/iflink": "7\n"}


@pytest.mark.parametrize(
    ("files", "environment", "place", "is_apart"),
    [
        ({}, {}, Place.MACHINE, False),
        (DEBIAN, {}, Place.MACHINE, False),
        (BRIDGED, {}, Place.MACHINE, False),
        (BRIDGED | {"proc/1/cgroup": "0::/init.scope\n"}, {}, Place.MACHINE, False),
        ({KERNEL: "6.8.0-1017-azure\n"}, {}, Place.MACHINE, False),
        (WSL1, {}, Place.WSL1, False),
        (WSL1, {"WSL_DISTRO_NAME": "Ubuntu"}, Place.WSL1, False),
        (WSL2, {}, Place.WSL2, True),
        (WSL2 | {"run/systemd/container": "wsl\n"}, {}, Place.WSL2, True),
        (WSL2 | {"sys/class/net/loopback0/mtu": ""}, {}, Place.WSL2, False),
        (DEBIAN, {"WSL_DISTRO_NAME": "Ubuntu"}, Place.WSL2, True),
        (BRIDGED | {".dockerenv": ""}, {}, Place.DOCKER, True),
        (BRIDGED | {"proc/1/cgroup": "3:cpu:/docker/0123abcd\n"}, {}, Place.DOCKER, True),
        ({".dockerenv": ""}, {}, Place.DOCKER, True),
        (DEBIAN | {".dockerenv": ""}, {}, Place.DOCKER, False),
        (BRIDGED | {"run/.containerenv": ""}, {"container": "podman"}, Place.PODMAN, True),
        (BRIDGED, {"container": "oci"}, Place.CONTAINER, True),
        (BRIDGED | {"run/systemd/container": "lxc\n"}, {}, Place.LXC, True),
        (BRIDGED | {"proc/1/cgroup": "0::/lxc.payload.web\n"}, {}, Place.LXC, True),
        (BRIDGED, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, Place.KUBERNETES, True),
        (DEBIAN, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, Place.KUBERNETES, False),
        ({KERNEL: WSL2[KERNEL], ".dockerenv": ""}, {}, Place.DOCKER, True),
        (WSL2 | {".dockerenv": ""}, {}, Place.WSL2, True),
    ],
)
def test_recognised(
    tmp_path: Path,
    files: dict[str, str],
    environment: dict[str, str],
    place: Place,
    is_apart: bool,
) -> None:
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    here = recognise(tmp_path, environment)
    assert (here.place, here.is_apart) == (place, is_apart)


def test_files_that_cannot_be_read_are_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / KERNEL).mkdir(parents=True)
    (tmp_path / "proc/1").mkdir()
    (tmp_path / "proc/1/cgroup").write_bytes(b"\xff\xfe")
    (tmp_path / "run").symlink_to("run")
    (tmp_path / "sys").write_text("a file")
    assert recognise(tmp_path, {}) == Surroundings(Place.MACHINE, False, None)


def test_the_size_of_shared_memory_is_that_of_its_file_system(tmp_path: Path) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    found = os.statvfs(tmp_path)
    assert recognise(tmp_path, {}).shared_memory == found.f_blocks * found.f_frsize


def test_this_machine_is_recognised_as_something() -> None:
    assert recognise().place in Place


@pytest.mark.parametrize(
    ("place", "is_apart", "head", "node", "api"),
    [
        (Place.MACHINE, False, None, None, None),
        (Place.DOCKER, False, None, None, None),
        (Place.WSL1, False, "MoLink needs WSL 2", "MoLink needs WSL 2", None),
        (Place.WSL2, False, "once Windows' firewall lets it in", None, None),
        (Place.WSL2, True, "behind Windows' NAT", "nothing has to be opened", None),
        (Place.DOCKER, True, "-p 7171:7171", "nothing has to be opened", "--host 0.0.0.0"),
        (Place.PODMAN, True, "a Podman container", "a Podman container", "port 8080"),
        (Place.CONTAINER, True, "--network host", "a container", "port 8080"),
        (Place.KUBERNETES, True, "a Service for port 7171", "a Kubernetes pod", "port 8080"),
        (Place.LXC, True, "--advertise HOST:7171", "an LXC container", "port 8080"),
    ],
)
def test_what_it_means(
    place: Place, is_apart: bool, head: str | None, node: str | None, api: str | None
) -> None:
    here = Surroundings(place, is_apart, None)
    said = (here.for_head(7171), here.for_node(), here.for_api(8080))
    for text, words in zip(said, (head, node, api), strict=True):
        assert text is None if words is None else words in (text or "")


@pytest.mark.parametrize(
    ("shared_memory", "ranks", "is_said"),
    [
        (64 << 20, 1, False),
        (64 << 20, 2, True),
        (SMALL_SHARED_MEMORY, 2, False),
        (None, 2, False),
    ],
)
def test_shared_memory_matters_to_ranks(
    shared_memory: int | None, ranks: int, is_said: bool
) -> None:
    note = Surroundings(Place.DOCKER, True, shared_memory).for_ranks(ranks)
    assert (note is not None) == is_said
    assert note is None or "/dev/shm has 64 MiB" in note
