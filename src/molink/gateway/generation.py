"""What a request for completions asks for, and how to ask another engine for the rest of it."""

from typing import Any

import msgspec

from molink.gateway.stream import Stream

PATHS = ("/v1/completions", "/v1/chat/completions")


class _Wanted(msgspec.Struct):
    stream: bool = False
    n: int | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None


class _Urgent(msgspec.Struct):
    priority: int = 0


_decoder = msgspec.json.Decoder(_Wanted)
_urgent_decoder = msgspec.json.Decoder(_Urgent)


def priority_of(body: bytes) -> int:
    """Of a request, as vLLM takes it; 0 if it says none, or is for the engine to refuse."""
    if b'"priority"' not in body:
        return 0
    try:
        return _urgent_decoder.decode(body).priority
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0


class Generation:
    """A request whose stream another engine can go on with.

    `body` is what to send to the engine; `stream` is what has come of it.
    """

    def __init__(self, body: bytes, wanted: _Wanted) -> None:
        self.body = body
        self.stream = Stream(wanted.n or 1, shows_ids=bool(wanted.return_token_ids))

    @classmethod
    def read(cls, path: str, body: bytes) -> "Generation | None":
        """None: it asks for no stream of completions, or is for the engine to refuse."""
        if path not in PATHS:
            return None
        try:
            wanted = _decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if not wanted.stream:
            return None
        # vLLM leaves the text of an echoed prompt out where tokens are asked for.
        is_asked = wanted.return_token_ids or wanted.echo
        return cls(body if is_asked else _with(body, {"return_token_ids": True}), wanted)

    def rest(self) -> bytes:
        """The body that asks for what has not come yet."""
        self.stream.begin_again()
        extra = msgspec.json.decode(self.body, type=dict[str, Any]).get("vllm_xargs") or {}
        return _with(self.body, {"vllm_xargs": extra | self.stream.delivered()})


def _with(body: bytes, more: dict[str, Any]) -> bytes:
    """JSON of an object with some keys added or replaced; others stay as they were written."""
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return msgspec.json.encode(fields | more)
