"""vLLM's objections to flags and models, in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from molink.core.errors import UsageError


@contextmanager
def in_one_line() -> Iterator[None]:
    """Raises UsageError with vLLM's words where it refuses a configuration or lacks a package."""
    try:
        yield
    except (ValueError, ImportError, NotImplementedError) as error:
        raise UsageError(one_line(error)) from error


def one_line(error: Exception) -> str:
    """What `error` says."""
    if isinstance(error, ValidationError):
        return "; ".join(_reason(found) for found in error.errors())
    return " ".join(str(error).split())


def _reason(found: Any) -> str:
    """Pydantic names the field beside its words; vLLM's own checks have none."""
    words = " ".join(found["msg"].split()).removeprefix("Value error, ")
    field = ".".join(map(str, found["loc"]))
    return f"{field}: {words}" if field else words
