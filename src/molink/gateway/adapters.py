"""LoRA adapters that clients have loaded: an engine that starts anew has none of them."""

import asyncio
import contextlib
import logging

import msgspec

from molink.gateway.http import JSON_HEADERS, Refusal
from molink.gateway.upstream import Upstream

logger = logging.getLogger("molink.gateway")
LOAD_PATH, UNLOAD_PATH = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class _Wanted(msgspec.Struct):
    lora_name: str
    load_inplace: bool = False


class Adapters:
    """Owns what was loaded, and which engine has it: the one after so many were lost."""

    def __init__(self) -> None:
        self._loaded: dict[str, bytes] = {}  # the requests, by name of the adapter
        self._engines_lost = 0
        self._loading = asyncio.Lock()

    def note(self, path: str, body: bytes, status: int) -> None:
        """What an engine has answered to a request of a client."""
        if status != 200 or path not in (LOAD_PATH, UNLOAD_PATH):
            return
        with contextlib.suppress(msgspec.DecodeError):
            name = msgspec.json.decode(body, type=_Wanted).lora_name
            if path == LOAD_PATH:
                self._loaded[name] = body
            else:
                self._loaded.pop(name, None)

    async def load(self, engine: Upstream, engines_lost: int) -> None:
        """Have an engine load what the one before had. Raises UpstreamLostError."""
        if self._engines_lost == engines_lost:
            return
        async with self._loading:
            if self._engines_lost == engines_lost:
                return
            for name, body in list(self._loaded.items()):
                target = LOAD_PATH.encode()
                reply = await engine.request(b"POST", target, JSON_HEADERS, body)
                try:
                    said = await reply.read_all()
                finally:
                    reply.close()
                if reply.status != 200:
                    self._loaded.pop(name, None)
                    logger.warning("adapter %s cannot be loaded again: %r", name, said[:1000])
            self._engines_lost = engines_lost


def refuse_in_place(body: bytes) -> None:
    """Raises Refusal: a failure half way would leave neither adapter."""
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        if msgspec.json.decode(body, type=_Wanted).load_inplace:
            text = "load_inplace does not work over stages: unload the adapter, then load it"
            raise Refusal(400, "BadRequestError", text)
