"""What the commands accept: addresses, devices, and vLLM's flags as they pass through."""

import re
from itertools import takewhile
from pathlib import Path

from molink.cli.console import own_distribution
from molink.core.errors import UsageError
from molink.engine.owned_flags import name_of, refuse_owned
from molink.node.stage_host import StageSettings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEVICES = ("auto", "cpu", "cuda")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:\[\]]+):([0-9]{1,5})")


def check_addresses(addresses: dict[str, str | None]) -> None:
    """Raises UsageError for a value that is not HOST:PORT; an IPv6 host is in brackets."""
    for name, text in addresses.items():
        match = text is not None and _ADDRESS.fullmatch(text)
        if text is not None and not (match and int(match[2]) < 1 << 16):
            raise UsageError(f"{name} «{text}»: expected HOST:PORT, for example 192.168.1.5:7171")


def token_in(file: Path) -> str:
    """The join token in a file. Raises UsageError if it cannot be read."""
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the token file {file}: {error}") from None


def check_flags(flags: list[str]) -> None:
    """Refuse flags that contradict a pipeline. Raises UsageError naming the flag."""
    refuse_owned(flags)
    if flags and not flags[0].startswith("-"):
        raise UsageError(f"unexpected argument «{flags[0]}»")


def value_of(flags: list[str], *names: str) -> str | None:
    """The last value of a flag, in either spelling (`--name V`, `--name=V`, underscores)."""
    found = None
    for index, flag in enumerate(flags):
        if name_of(flag) in names:
            _, equals, value = flag.partition("=")
            found = value if equals else next(iter(flags[index + 1 : index + 2]), None)
    return found


def without(flags: list[str], *names: str, is_list: bool = False) -> list[str]:
    """The flags but those, each of which takes one value, or several."""
    kept, is_value = [], False
    for flag in flags:
        if is_value and not (is_list and flag.startswith("-")):
            is_value = is_list
        elif name_of(flag) in names:
            is_value = "=" not in flag
        else:
            is_value = False
            kept.append(flag)
    return kept


def values_of(flags: list[str], name: str) -> list[str]:
    """The last values of a flag that takes several: `--name A B`."""
    found: list[str] = []
    for index, flag in enumerate(flags):
        if name_of(flag) == name:
            _, equals, value = flag.partition("=")
            following = takewhile(lambda word: not word.startswith("-"), flags[index + 1 :])
            found = [value] if equals else list(following)
    return found


def pinned(flags: list[str], commit: str | None) -> list[str]:
    """Flags after the user's own with which all machines load the model's same commit."""
    if commit is None:
        return []
    own = [f"--revision={commit}"]
    if value_of(flags, "--tokenizer") and not value_of(flags, "--tokenizer-revision"):
        own.append("--tokenizer-revision=main")  # vLLM would ask its repository for the model's
    return own


def check_device(device: str) -> None:
    """Refuse a device that the vLLM installed here cannot use: each build knows one kind.

    Raises:
        UsageError: naming the build that is installed, and how to get the other.
    """
    if device not in DEVICES:
        raise UsageError(f"--device {device}: expected {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")
    build = "cuda" if own_distribution() == "vllm" else "cpu"
    if device not in ("auto", build):
        raise UsageError(
            f"--device {device}: vLLM's build for {build} is installed here; for the other one run "
            f"scripts/install {device}"
        )


def stage_settings(model: str, flags: list[str], *, send: bool) -> StageSettings:
    """Settings of this node's stage.

    Args:
        send: whether `flags` go to the stage as the node's own (a joined node), or reach it from
            the engine (the head).
    """
    size = value_of(flags, "--tensor-parallel-size", "-tp") or "1"
    if not size.isdigit() or int(size) < 1:
        raise UsageError(f"--tensor-parallel-size {size}: expected a positive number")
    return StageSettings(model, int(size), tuple(flags) if send else ())
