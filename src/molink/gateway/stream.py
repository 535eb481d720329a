"""A stream of completions on its way to a client, so that another engine can go on with it.

The engine names the tokens of every event (`return_token_ids`), which most clients have not asked
for: they are left out again. When the engine is lost, the next one is given the tokens, says again
what they are, and goes on. What the client has of that is cut off, character by character.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

from molink.wire import delivered

MAX_EVENT = 16 * 1024 * 1024  # bytes
DONE = b"data: [DONE]"
ABORTED = "abort"  # how an engine that is told to end finishes what it has
_DATA = b"data: "
_END = b"\n\n"
_CHOICES = b'"choices":'
_TOKEN_IDS = re.compile(rb'(,"(?:prompt_)?token_ids":)\[[0-9,]*\]')
"""In JSON a quote within a string has a backslash before it, so this is no text of the model."""


class StreamBrokenError(Exception):
    """The engine says that it failed; `error` is what it says, in JSON."""

    def __init__(self, error: bytes) -> None:
        super().__init__(error.decode(errors="replace"))
        self.error = error


class DivergedError(Exception):
    """Another engine did not go on where the client's stream had ended."""


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int = 0
    function: _Function = msgspec.field(default_factory=_Function)


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] = []

    @property
    def is_empty(self) -> bool:
        texts = self.role, self.content, self.reasoning
        return not self.tool_calls and texts == (None, None, None)


class _Choice(msgspec.Struct):
    index: int
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    logprobs: msgspec.Raw = msgspec.Raw()
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_Event)


@dataclass(slots=True)
class _Delivered:
    """What a client has of one choice."""

    tokens: list[int] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)  # pieces, by where they stand
    calls: set[int] = field(default_factory=set)  # tools whose name it has
    has_role: bool = False
    is_finished: bool = False
    is_opaque: bool = False  # there was text whose tokens the engine does not name

    def add(self, choice: _Choice) -> None:
        if choice.token_ids:
            self.tokens += choice.token_ids
        elif choice.text:
            self.is_opaque = True
        if choice.text:
            self._add("text", choice.text)
        if choice.delta is not None:
            self._add_delta(choice.delta, has_tokens=bool(choice.token_ids))
        self.is_finished |= choice.finish_reason is not None

    def _add_delta(self, delta: _Delta, *, has_tokens: bool) -> None:
        self.has_role |= delta.role is not None
        said = False
        for name, text in (("content", delta.content), ("reasoning", delta.reasoning)):
            if text:
                self._add(name, text)
                said = True
        for call in delta.tool_calls:
            said = True
            self.calls.add(call.index)
            if call.function.arguments:
                self._add(f"call-{call.index}", call.function.arguments)
        self.is_opaque |= said and not has_tokens and not delta.role

    def _add(self, name: str, text: str) -> None:
        self.texts.setdefault(name, []).append(text)


class _Behind:
    """How far a new engine is behind what a client has of one choice."""

    def __init__(self, has: _Delivered) -> None:
        self._has = has
        self._tokens = list(has.tokens)  # to be said again
        self._texts = {name: "".join(pieces) for name, pieces in has.texts.items()}  # likewise
        self._calls = set(has.calls)  # of tools, to be named again

    @property
    def is_over(self) -> bool:
        """Whether all that comes is new; never of a choice that the client has whole."""
        is_behind = self._tokens or self._calls or any(self._texts.values())
        return not (self._has.is_finished or is_behind)

    def cut(self, choice: dict[str, Any]) -> bool:
        """Leave what is new; whether anything is. Raises DivergedError."""
        again = self._cut_tokens(choice)
        if self._has.is_finished:
            return False
        is_new = bool(choice.get("token_ids")) or choice.get("finish_reason") is not None
        if choice.get("text"):
            choice["text"] = self._new("text", choice["text"])
            is_new |= bool(choice["text"])
        if (delta := choice.get("delta")) is not None:
            is_new |= self._cut_delta(delta)
        if again and isinstance(logprobs := choice.get("logprobs"), dict):
            choice["logprobs"] = {
                k: v[again:] if isinstance(v, list) else v for k, v in logprobs.items()
            }
        return is_new

    def _cut_tokens(self, choice: dict[str, Any]) -> int:
        found: list[int] = choice.get("token_ids") or []
        again = self._tokens[: len(found)]
        if found[: len(again)] != again:
            raise DivergedError
        del self._tokens[: len(again)]
        if again:
            choice["token_ids"] = found[len(again) :]
        return len(again)

    def _cut_delta(self, delta: dict[str, Any]) -> bool:
        if self._has.has_role:
            delta.pop("role", None)
        is_new = "role" in delta
        for name in ("content", "reasoning"):
            if delta.get(name):
                delta[name] = self._new(name, delta[name])
                is_new |= bool(delta[name])
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = [call for call in calls if self._cut_call(call)]
            is_new |= bool(delta["tool_calls"])
        return is_new

    def _cut_call(self, call: dict[str, Any]) -> bool:
        index, function = call.get("index", 0), call.get("function") or {}
        self._calls.discard(index)
        if function.get("arguments"):
            function["arguments"] = self._new(f"call-{index}", function["arguments"])
        if index not in self._has.calls:
            return True
        for name in ("id", "type"):
            call.pop(name, None)
        function.pop("name", None)
        return bool(function.get("arguments"))

    def _new(self, name: str, text: str) -> str:
        """What is left of a text. Raises DivergedError if the client has something else."""
        again = self._texts.get(name, "")[: len(text)]
        if not text.startswith(again):
            raise DivergedError
        if again:
            self._texts[name] = self._texts[name][len(again) :]
        return text[len(again) :]


class Stream:
    """The events of one answer, from one engine after the other.

    Args:
        n: choices of each prompt.
        shows_ids: the client has asked for the tokens itself.
    """

    def __init__(self, n: int, *, shows_ids: bool) -> None:
        self._n = n
        self._shows_ids = shows_ids
        self._rest = b""  # of an event that is not complete
        self._choices: dict[int, _Delivered] = {}
        self._behind: dict[int, _Behind] = {}
        self._prefix: bytes | None = None  # of every event: names, time and model
        self._is_another = False  # engine than the one that made the prefix
        self._is_foreign = False  # some event is no completion
        self.is_done = False
        self.failure: StreamBrokenError | DivergedError | None = None  # of the present engine

    @property
    def num_tokens(self) -> int:
        """How many were delivered."""
        return sum(len(choice.tokens) for choice in self._choices.values())

    @property
    def can_go_on(self) -> bool:
        """Whether another engine could be told where this one ended."""
        choices = self._choices.values()
        return not self._is_foreign and all(c.is_finished or not c.is_opaque for c in choices)

    def delivered(self) -> dict[str, list[int]]:
        """For the next engine: the tokens of each choice, under their keys in `vllm_xargs`."""
        return {
            delivered.key_of(*divmod(index, self._n)): choice.tokens
            for index, choice in self._choices.items()
            if choice.tokens
        }

    def begin_again(self) -> None:
        """What comes next is from another engine."""
        self._rest, self.failure = b"", None
        self._is_another = self._prefix is not None
        self._behind = {index: _Behind(choice) for index, choice in self._choices.items()}

    def pass_on(self, data: bytes) -> bytes:
        """What the client gets of some bytes of the engine's: all before a `failure`."""
        *events, self._rest = (self._rest + data).split(_END)
        shown = []
        try:
            for event in events:
                shown.append(self._event(event))  # noqa: PERF401 - kept when a later one fails
            if len(self._rest) > MAX_EVENT:
                raise StreamBrokenError(b'{"message": "an event without an end"}')
        except (StreamBrokenError, DivergedError) as error:
            self.failure = error
        return b"".join(shown)

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(_DATA) or event == DONE:
            self.is_done |= event == DONE
            return event + _END
        try:
            found = _decoder.decode(event[len(_DATA) :])
        except msgspec.DecodeError:
            self._is_foreign = True
            return event + _END
        if (error := bytes(found.error)) not in (b"", b"null"):
            raise StreamBrokenError(error)
        if any(choice.finish_reason == ABORTED for choice in found.choices):
            raise StreamBrokenError(b'{"message": "the engine gave the request up", "code": 500}')
        if self._behind and found.choices:
            return self._again(event)
        self._add(found)
        return self._shown(event, found)

    def _shown(self, event: bytes, found: _Event) -> bytes:
        """An event as the client has asked for it; nothing if it only names tokens."""
        if self._prefix is None:
            self._prefix = event.partition(_CHOICES)[0]
        elif self._is_another:
            event = self._prefix + _CHOICES + event.partition(_CHOICES)[2]
        if self._shows_ids:
            return event + _END
        if found.choices and all(map(_only_names_tokens, found.choices)):
            return b""
        return _TOKEN_IDS.sub(rb"\1null", event) + _END

    def _again(self, event: bytes) -> bytes:
        """What is new of an event while some is not."""
        data: dict[str, Any] = msgspec.json.decode(event[len(_DATA) :])
        kept = []
        for choice in data["choices"]:
            behind = self._behind.get(choice["index"])
            if behind is None or behind.cut(choice):
                kept.append(choice)
            if behind is not None and behind.is_over:
                del self._behind[choice["index"]]
        if not kept:
            return b""
        new = _DATA + msgspec.json.encode(data | {"choices": kept})
        found = _decoder.decode(new[len(_DATA) :])
        self._add(found)
        return self._shown(new, found)

    def _add(self, event: _Event) -> None:
        for choice in event.choices:
            self._choices.setdefault(choice.index, _Delivered()).add(choice)


def _only_names_tokens(choice: _Choice) -> bool:
    delta = choice.delta
    is_silent = delta is not None and delta.is_empty and choice.text is None
    has_logprobs = bytes(choice.logprobs) not in (b"", b"null")
    return is_silent and choice.finish_reason is None and not has_logprobs
