"""LoRA adapters: every stage reads its own copy, which must be the head's."""

import hashlib
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from molink.core.errors import UsageError

dropped: set[int] = set()
"""Ids of adapters that a stage has lost, so that no pipeline can have them: the executor adds, the
scheduler refuses requests with them. An adapter that is loaded anew has a new id."""


class NoAdapterError(UsageError):
    """There is no such adapter on this machine."""


def adapter_digest(request: LoRARequest) -> str:
    """sha256 (hex) of an adapter's files on this machine: names and contents.

    Raises:
        NoAdapterError: there is no such adapter here.
        UsageError: it cannot be read.
    """
    total = hashlib.sha256()
    try:
        for path in _files(request.lora_path):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            total.update(path.name.encode() + b"\0" + content)
    except OSError as error:
        raise UsageError(f"cannot read the LoRA adapter's file {path}: {error.strerror}") from error
    return total.hexdigest()


def _files(name: str) -> list[Path]:
    """In the adapter's folder, or from the hub if there is none."""
    try:
        files = sorted(Path(get_adapter_absolute_path(name)).glob("adapter_*"))
    except (OSError, ValueError):  # it is not in the hub's cache, and the hub does not give it
        files = []
    if not any(path.name == "adapter_config.json" for path in files):
        raise NoAdapterError(
            f"there is no LoRA adapter {name} on this machine: copy its folder to the same path on "
            "every machine of the pipeline"
        )
    return files


def check_adapter(request: LoRARequest, digest: str) -> None:
    """Raises UsageError if this machine's copy is not there, or not the head's."""
    here = adapter_digest(request)
    if here != digest:
        raise UsageError(
            f"the LoRA adapter {request.lora_path} differs from the head's (sha256 of its files: "
            f"{here} here, {digest} on the head): copy the head's folder here"
        )
