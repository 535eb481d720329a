"""API keys: who asks. Only their hashes are kept; keys are random, so a plain hash is enough."""

import hashlib
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from molink.core.errors import UsageError
from molink.gateway.http import Refusal, Request

OPEN_PATHS = ("/cluster", "/health", "/load", "/metrics", "/ping", "/version")
PREFIX = "molink-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_UNAUTHORIZED = "give a key this server knows: `Authorization: Bearer KEY`"

Positive = Annotated[int, msgspec.Meta(ge=1)]


class Tenant(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Whose key it is, and what it may ask for."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] = ""
    name: str = "anybody"
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0  # of its share where others wait too
    requests_per_minute: Positive | None = None
    at_once: Positive | None = None  # requests


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: dict[str, Tenant]


ANYBODY = Tenant()


def hash_of(key: str) -> str:
    """What is kept of a key: sha256, hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A key that nobody can guess: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def entry(name: str, key: str) -> str:
    """What a file of keys says of one. Raises UsageError for a malformed name."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"key «{name}»: up to 40 letters, digits, dots, dashes, underscores")
    return f'[keys."{name}"]\nsha256 = "{hash_of(key)}"\n'


def read_keys(file: Path) -> dict[str, Tenant]:
    """Tenants by the hash of their key. Raises UsageError that says what is wrong, and where."""
    try:
        found = msgspec.convert(tomllib.loads(file.read_text()), _File)
    except OSError as error:
        raise UsageError(f"cannot read the keys in {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"{file}: {error}") from error
    for name, tenant in found.keys.items():
        if not tenant.sha256:
            raise UsageError(f"{file}: key {name} has no sha256; `molink key {name}` makes one")
    named = (msgspec.structs.replace(t, name=name) for name, t in found.keys.items())
    return {tenant.sha256: tenant for tenant in named}


class Keys:
    """Knows the tenants; reads their file again when it has changed.

    Args:
        hashes: of keys that were given on the command line.
    """

    def __init__(self, hashes: Sequence[str], file: Path | None) -> None:
        self._given = {h: Tenant(sha256=h, name=f"key-{i}") for i, h in enumerate(hashes, start=1)}
        self._file = file
        self._changed_at = 0
        self._in_file: Mapping[str, Tenant] = {}
        self.trouble: str | None = None  # why the file could not be read again; the old keys count
        self.refresh()
        if self.trouble is not None:
            raise UsageError(self.trouble)

    def refresh(self) -> None:
        """Read the file if it is another one by now."""
        if self._file is None:
            return
        try:
            changed_at = self._file.stat().st_mtime_ns
            if changed_at != self._changed_at:
                self._in_file = read_keys(self._file)
                self._changed_at = changed_at
        except OSError as error:
            self.trouble = f"cannot read the keys in {self._file}: {error.strerror}"
        except UsageError as error:
            self.trouble = str(error)
        else:
            self.trouble = None

    def tenant_of(self, request: Request) -> Tenant:
        """Whose request it is. Raises Refusal for one without a key, where there are any."""
        if self._file is None and not self._given:
            return ANYBODY
        if request.method == b"OPTIONS" or request.path in OPEN_PATHS:
            return ANYBODY
        found = hash_of(_key_in(request))
        tenant = self._given.get(found) or self._in_file.get(found)
        if tenant is None:
            raise Refusal(401, "AuthenticationError", _UNAUTHORIZED)
        return tenant


def _key_in(request: Request) -> str:
    kind, _, key = (request.header(b"authorization") or b"").partition(b" ")
    if kind.lower() == b"bearer":
        return key.strip().decode("latin-1")
    return (request.header(b"x-api-key") or b"").decode("latin-1")
