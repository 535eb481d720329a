"""What a stage's device can do, measured by the process that will run the stage."""

import time
from collections.abc import Callable

import psutil
import torch
from vllm.platforms import current_platform

from molink.engine.types import dtype_name
from molink.wire.to_agent import StageUp

READ_BYTES = 64 * 1024 * 1024  # larger than caches
MATRIX = 1024
PASSES = 15


def measure(num_devices: int) -> StageUp:
    """Free memory, memory bandwidth and speed of a matrix product; takes a fraction of a second."""
    device = torch.device(current_platform.device_type)
    numbers = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)
    dtypes = current_platform.supported_dtypes
    matrix = torch.ones(MATRIX, MATRIX, dtype=dtypes[0], device=device)
    read_s = _best_seconds(lambda: numbers.sum(), device)
    product_s = _best_seconds(lambda: matrix @ matrix, device)
    return StageUp(
        device=_name(device),
        num_devices=num_devices,
        free_bytes=_free_bytes(device) * (num_devices if device.type != "cpu" else 1),
        bytes_per_s=READ_BYTES / read_s * num_devices,
        flop_per_s=2 * MATRIX**3 / product_s * num_devices,
        dtypes=[dtype_name(dtype) for dtype in dtypes],
    )


def _best_seconds(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    times = []
    for _ in range(PASSES):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)  # what else runs on the machine now is not the device's speed


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    return psutil.virtual_memory().available


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name()}"
    return str(device.type)
