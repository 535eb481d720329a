"""All that the gateway's process is told when it starts."""

from pathlib import Path
from typing import Self

import msgspec

from molink.gateway.admission import Limits
from molink.gateway.server import Tls


class GatewayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the head's user said about the API. Holds no secret but hashes of keys."""

    host: str
    port: int
    tls: Tls = Tls()
    max_outage_s: float  # that requests wait for what is lost
    key_hashes: list[str] = []
    keys_file: Path | None = None
    limits: Limits = Limits()

    def to_json(self) -> str:
        return msgspec.json.encode(self, enc_hook=str).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        return msgspec.json.decode(text, type=cls, dec_hook=lambda kind, value: kind(value))
