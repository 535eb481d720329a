"""Where this process runs, as far as it decides who can reach it: WSL, or a container."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

SMALL_SHARED_MEMORY = 1 << 30  # bytes; container engines give 64 MiB, NCCL asks for 1 GiB


class Place(Enum):
    """What a machine may be; the value is how to call it."""

    MACHINE = "a machine"
    WSL1 = "WSL 1"
    WSL2 = "WSL 2"
    DOCKER = "a Docker container"
    PODMAN = "a Podman container"
    KUBERNETES = "a Kubernetes pod"
    LXC = "an LXC container"
    CONTAINER = "a container"


_SYSTEM_CONTAINERS = {"lxc": Place.LXC, "lxc-libvirt": Place.LXC, "podman": Place.PODMAN}
_GROUPS = {  # parts of a control group's path
    "kubepods": Place.KUBERNETES,
    "libpod": Place.PODMAN,
    "docker": Place.DOCKER,
    "containerd": Place.CONTAINER,
    "lxc": Place.LXC,
}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What this process can see of its machine.

    Args:
        is_apart: its network is not the machine's, so others cannot dial it as they dial that.
        shared_memory: size of /dev/shm in bytes, if there is one.
    """

    place: Place
    is_apart: bool
    shared_memory: int | None

    def for_head(self, port: int) -> str | None:
        """What whoever starts a head here must know, so that nodes reach its agent's port."""
        if self.place is Place.WSL1:
            return _WSL1
        if self.place is Place.WSL2 and not self.is_apart:
            return _MIRRORED.format(port=port)
        if not self.is_apart:
            return None
        return _HEADS.get(self.place, _PUBLISH).format(port=port, place=self.place.value)

    def for_node(self) -> str | None:
        """What it means for a node here that others may not be able to dial it."""
        if self.place is Place.WSL1:
            return _WSL1
        if not self.is_apart:
            return None
        return (
            f"this is {self.place.value} with a network of its own: nothing has to be opened. The "
            "node dials the head, which relays for neighbours that cannot dial it"
        )

    def for_api(self, port: int) -> str | None:
        """What it means here that the HTTP server listens on loopback alone."""
        if not self.is_apart or self.place is Place.WSL2:  # whose loopback Windows shares
            return None
        return (
            "the API on loopback is for this container alone: --host 0.0.0.0 with --api-key KEY "
            f"lets others in, where port {port} is published"
        )

    def for_ranks(self, tensor_parallel_size: int) -> str | None:
        """Whether the processes of one stage may lack the memory that they share."""
        size = self.shared_memory
        if tensor_parallel_size == 1 or size is None or size >= SMALL_SHARED_MEMORY:
            return None
        return (
            f"/dev/shm has {size >> 20} MiB, which may be too little for tensor parallel "
            f"{tensor_parallel_size}; in a container, --shm-size=1g or --ipc=host gives more"
        )


_WSL1 = (
    "this is WSL 1, which has no GPU and no Linux kernel; MoLink needs WSL 2: "
    "wsl --set-version DISTRIBUTION 2 in Windows converts it (docs/windows-wsl.md)"
)
_MIRRORED = (
    "this is WSL 2 with mirrored networking: nodes reach port {port} once Windows' firewall lets "
    "it in (docs/windows-wsl.md)"
)
_PUBLISH = (
    "this is {place}: other machines reach it only if port {port} is published (-p {port}:{port}) "
    "and the token names this host (--advertise HOST:{port}), or with --network host"
)
_HEADS = {
    Place.WSL2: (
        "this is WSL 2 behind Windows' NAT: other machines cannot reach port {port} here. Use "
        "mirrored networking, or have Windows forward the port and say --advertise HOST:{port} "
        "(docs/windows-wsl.md)"
    ),
    Place.KUBERNETES: (
        "this is a Kubernetes pod: nodes outside its cluster need a Service for port {port}, and "
        "--advertise with the Service's HOST:PORT"
    ),
    Place.LXC: (
        "this is an LXC container: unless it is bridged to your network, its host must forward "
        "port {port}; then say --advertise HOST:{port}"
    ),
}


def recognise(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Surroundings:
    """Look at files under `root`, of which any may be missing, and at `environment`.

    A container inside WSL 2 is a container, unless it shares WSL's network.
    """
    place = _container(root, environment)
    if place is not None and not _has_network_device(root):
        return Surroundings(place, True, _shared_memory(root))
    place = _wsl(root, environment) or place or Place.MACHINE
    is_mirrored = os.path.exists(root / "sys/class/net/loopback0")
    return Surroundings(place, place is Place.WSL2 and not is_mirrored, _shared_memory(root))


def _container(root: Path, environment: Mapping[str, str]) -> Place | None:
    if "KUBERNETES_SERVICE_HOST" in environment:
        return Place.KUBERNETES
    if os.path.exists(root / "run/.containerenv"):
        return Place.PODMAN
    if os.path.exists(root / ".dockerenv"):
        return Place.DOCKER
    manager = environment.get("container") or _read(root / "run/systemd/container").strip()
    if manager and manager != "wsl":  # systemd's name for WSL
        return _SYSTEM_CONTAINERS.get(manager, Place.CONTAINER)
    groups = _read(root / "proc/1/cgroup")
    return next((place for part, place in _GROUPS.items() if part in groups), None)


def _wsl(root: Path, environment: Mapping[str, str]) -> Place | None:
    kernel = _read(root / "proc/sys/kernel/osrelease").lower()
    if "wsl2" in kernel or "microsoft-standard" in kernel:
        return Place.WSL2
    if "microsoft" in kernel:  # 4.4.0-19041-Microsoft
        return Place.WSL1
    return Place.WSL2 if "WSL_DISTRO_NAME" in environment else None  # a kernel of one's own


def _has_network_device(root: Path) -> bool:
    """Whether some interface is hardware; in a network of its own a container has virtual ones."""
    return any((root / "sys/class/net").glob("*/device"))


def _shared_memory(root: Path) -> int | None:
    try:
        found = os.statvfs(root / "dev/shm")
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
