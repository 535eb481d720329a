"""What is known of the machines of a cluster."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Versions:
    """What two machines must agree on before they exchange anything else."""

    protocol: int
    molink: str
    vllm: str


@dataclass(frozen=True, slots=True)
class Resources:
    """Measured on the node, by the process that will run the stage."""

    device: str  # "cpu", "cuda: NVIDIA GeForce RTX 4090", ...
    num_devices: int
    free_bytes: int  # memory that weights and KV cache may use, all devices of the stage together
    bytes_per_s: float  # memory read bandwidth, which bounds decode (the fastest of several passes)
    flop_per_s: float  # matrix product, which bounds prefill
    dtypes: tuple[str, ...] = ()  # in which the device computes, best first
