"""The two forms of `POST /generate`: vLLM's old demonstration server's, and SGLang's.

A form checks a request, says what to ask of `/v1/completions`, and writes what comes back. Sampling
parameters that are not given have vLLM's and SGLang's defaults, not those of the model's
`generation_config.json`: so did both originals.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import msgspec

Json = dict[str, Any]
Prompts = Annotated[list[str], msgspec.Meta(min_length=1)]
Ids = Annotated[list[int | list[int]], msgspec.Meta(min_length=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]

DEFAULT_MAX_TOKENS = 16


class FormError(Exception):
    """The request is in neither form; the message says why."""


@dataclass(slots=True)
class Output:
    """One continuation of a prompt, as far as it has come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def extend(self, choice: Json) -> None:
        """Add a choice of `/v1/completions`: all of it, or the next piece of a stream."""
        self.text += choice["text"]
        self.token_ids += choice.get("token_ids") or []
        logprobs = choice.get("logprobs") or {}
        self.token_logprobs += logprobs.get("token_logprobs", [])
        self.top_logprobs += logprobs.get("top_logprobs", [])
        self.finish_reason = choice.get("finish_reason")
        self.stop_reason = choice.get("stop_reason")


class Outputs:
    """The continuations of a request: n of the first prompt, n of the second, and so on."""

    def __init__(self, prompts: int, n: int) -> None:
        self.id = ""
        self.each = [Output() for _ in range(prompts * n)]
        self._n = n
        self._prompt_tokens = [0] * prompts

    def extend(self, answer: Json) -> list[int]:
        """Add an answer of `/v1/completions`, or an event of a stream; the indices it changed."""
        self.id = answer["id"]
        for choice in answer["choices"]:
            index = choice["index"]
            self.each[index].extend(choice)
            if prompt := choice.get("prompt_token_ids"):
                self._prompt_tokens[index // self._n] = len(prompt)
        return [choice["index"] for choice in answer["choices"]]

    def prompt_tokens(self, index: int) -> int:
        """Length of the prompt that output `index` continues."""
        return self._prompt_tokens[index // self._n]


class Form(Protocol):
    """A checked request, and how its answer is written."""

    stream: bool
    media_type: bytes  # of a stream
    stream_end: bytes

    def completion(self) -> Json:
        """The body to send to `/v1/completions`."""

    def outputs(self) -> Outputs:
        """Room for the answer."""

    def whole(self, outputs: Outputs) -> Any:
        """The answer, when all outputs are complete."""

    def piece(self, outputs: Outputs, changed: int) -> bytes:
        """What a stream says after output `changed` has grown."""

    def trouble(self, error: Json) -> bytes:
        """What a stream says when it breaks off."""


class Sampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters that both forms, and `/v1/completions`, call by the same name."""

    n: Count = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[str, float] | None = None


class VllmForm(Sampling, kw_only=True):
    """`{"prompt": …, sampling parameters, "stream": …}` -> `{"text": [prompt + output, …]}`.

    A stream is one such line of JSON for every step, each with all of the text so far.
    """

    media_type = b"application/x-ndjson"
    stream_end = b""

    prompt: str | Prompts
    stream: bool = False
    max_tokens: int = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    seed: int | None = None
    include_stop_str_in_output: bool = False
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: Json | None = None

    def __post_init__(self) -> None:
        if self.stream and len(self._prompts) > 1:  # each step would carry all of them
            raise ValueError("`stream` takes one prompt")

    @property
    def _prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def completion(self) -> Json:
        return _without_none(msgspec.to_builtins(self))

    def outputs(self) -> Outputs:
        return Outputs(len(self._prompts), self.n)

    def whole(self, outputs: Outputs) -> Any:
        prompts = (prompt for prompt in self._prompts for _ in range(self.n))
        texts = zip(prompts, outputs.each, strict=True)
        return {"text": [prompt + output.text for prompt, output in texts]}

    def piece(self, outputs: Outputs, changed: int) -> bytes:
        return msgspec.json.encode(self.whole(outputs)) + b"\n"

    def trouble(self, error: Json) -> bytes:
        return msgspec.json.encode({"error": error}) + b"\n"


class SglangSampling(Sampling, kw_only=True):
    """SGLang's own names; `regex`, `json_schema` and `ebnf` exclude one another."""

    max_new_tokens: int = DEFAULT_MAX_TOKENS
    min_new_tokens: int = 0
    sampling_seed: int | None = None
    no_stop_trim: bool = False
    regex: str | None = None
    json_schema: str | None = None
    ebnf: str | None = None

    def completion(self) -> Json:
        names = Sampling.__struct_fields__
        grammar = {"regex": self.regex, "json": self.json_schema, "grammar": self.ebnf}
        return {name: getattr(self, name) for name in names} | {
            "max_tokens": self.max_new_tokens,
            "min_tokens": self.min_new_tokens,
            "seed": self.sampling_seed,
            "include_stop_str_in_output": self.no_stop_trim,
            "structured_outputs": _without_none(grammar) or None,
        }


class SglangForm(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`{"text" or "input_ids": …, "sampling_params": {…}}` -> `{"text": output, "meta_info": {…}}`.

    Several prompts, or n > 1, give a list of such objects. A stream is server-sent events, each
    with all of the text of one output so far.
    """

    media_type = b"text/event-stream; charset=utf-8"
    stream_end = b"data: [DONE]\n\n"

    text: str | Prompts | None = None
    input_ids: Ids | None = None
    sampling_params: SglangSampling = msgspec.field(default_factory=SglangSampling)
    stream: bool = False
    rid: str | None = None
    return_logprob: bool = False
    top_logprobs_num: Annotated[int, msgspec.Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("give either `text` or `input_ids`")
        sampling = self.sampling_params
        if sum(x is not None for x in (sampling.regex, sampling.json_schema, sampling.ebnf)) > 1:
            raise ValueError("`regex`, `json_schema` and `ebnf` exclude one another")

    @property
    def _num_prompts(self) -> int | None:
        """None: one prompt that is not in a list."""
        if self.input_ids is not None:
            return len(self.input_ids) if isinstance(self.input_ids[0], list) else None
        return len(self.text) if isinstance(self.text, list) else None

    @property
    def _is_many(self) -> bool:
        return self._num_prompts is not None or self.sampling_params.n > 1

    def completion(self) -> Json:
        body = self.sampling_params.completion() | {
            "prompt": self.input_ids if self.text is None else self.text,
            "stream": self.stream,
            "return_token_ids": True,
        }
        if self.return_logprob:
            body |= {"logprobs": self.top_logprobs_num, "return_tokens_as_token_ids": True}
        return _without_none(body)

    def outputs(self) -> Outputs:
        return Outputs(self._num_prompts or 1, self.sampling_params.n)

    def whole(self, outputs: Outputs) -> Any:
        answers = [self._answer(outputs, index) for index in range(len(outputs.each))]
        return answers if self._is_many else answers[0]

    def piece(self, outputs: Outputs, changed: int) -> bytes:
        answer = self._answer(outputs, changed)
        if self._is_many:
            answer["index"] = changed
        return _event(answer)

    def trouble(self, error: Json) -> bytes:
        return _event({"error": error})

    def _answer(self, outputs: Outputs, index: int) -> Json:
        output = outputs.each[index]
        meta: Json = {
            "id": self.rid or outputs.id,
            "finish_reason": _finish_reason(output),
            "prompt_tokens": outputs.prompt_tokens(index),
            "completion_tokens": len(output.token_ids),
        }
        if self.return_logprob:
            pairs = zip(output.token_logprobs, output.token_ids, strict=True)
            meta["output_token_logprobs"] = [(logprob, token, None) for logprob, token in pairs]
            if self.top_logprobs_num:
                meta["output_top_logprobs"] = [
                    _best(candidates, self.top_logprobs_num) for candidates in output.top_logprobs
                ]
        return {"text": output.text, "output_ids": output.token_ids, "meta_info": meta}


def read_form(body: bytes) -> Form:
    """The form a request is in; a null is what is not given.

    Raises:
        FormError: it is in neither; the message names the field.
    """
    try:
        request = _without_none(msgspec.json.decode(body, type=Json))
        if isinstance(sampling := request.get("sampling_params"), dict):
            request["sampling_params"] = _without_none(sampling)
        if request.keys() & {"text", "input_ids"}:
            return msgspec.convert(request, SglangForm)
        if "prompt" not in request:
            raise FormError("give a `prompt` (vLLM's form) or a `text` (SGLang's form)")
        return msgspec.convert(request, VllmForm)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormError(str(error)) from error


def _event(data: Json) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _finish_reason(output: Output) -> Json | None:
    match output.finish_reason:
        case None:
            return None
        case "length":
            return {"type": "length", "length": len(output.token_ids)}
        case "stop":
            last = output.token_ids[-1] if output.token_ids else None
            return {"type": "stop", "matched": last if (m := output.stop_reason) is None else m}
        case other:
            return {"type": other}


def _best(candidates: dict[str, float], count: int) -> list[tuple[float, int, None]]:
    """The likeliest of a token's candidates, which are called `token_id:N`."""
    ranked = sorted(candidates.items(), key=lambda candidate: -candidate[1])
    return [(logprob, int(name.rpartition(":")[2]), None) for name, logprob in ranked[:count]]


def _without_none(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value is not None}
