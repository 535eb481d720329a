"""Chat templates: by name, by file, and in the JSON form of SGLang's `--chat-template`.

The named ones are the formats that the models' makers published, in this folder.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from molink.core.errors import UsageError

FOLDER = Path(__file__).parent
STOPS = {
    "chatml": ("<|im_end|>",),
    "command-r": ("<|END_OF_TURN_TOKEN|>",),
    "gemma": ("<end_of_turn>",),
    "llama-3": ("<|eot_id|>",),
    "phi-3": ("<|end|>",),
}
"""What ends an assistant's turn, where it need not be the model's end of sequence."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """What `--chat-template` stands for."""

    template: str  # a file's path, or Jinja: vLLM takes both
    stop: tuple[str, ...] = ()  # strings that end an answer


@dataclass(frozen=True, slots=True)
class _Style:
    """How SGLang's `sep_style` puts a prompt together. In each, {sep} is the template's own.

    The system prompt and `after_system`; for each message its role, `between`, its text and `end`;
    at last the assistant's role and `opening`.
    """

    after_system: str
    between: str
    end: str
    opening: str


_STYLES = {
    "ADD_COLON_SINGLE": _Style("{sep}", ": ", "{sep}", ":"),
    "ADD_COLON_SPACE_SINGLE": _Style("{sep}", ": ", "{sep}", ": "),
    "ADD_NEW_LINE_SINGLE": _Style("{sep}", "\n", "{sep}", "\n"),
    "NO_COLON_SINGLE": _Style("", "", "{sep}", ""),
    "CHATML": _Style("{sep}\n", "\n", "{sep}\n", "\n"),
    "MPT": _Style("{sep}", "", "{sep}", ""),
    "ROBIN": _Style("{sep}", ":\n", "{sep}", ":\n"),
}
_Stop = str | Annotated[list[str], msgspec.Meta(max_length=64)] | None


class SglangTemplate(msgspec.Struct, forbid_unknown_fields=True):
    """SGLang's JSON form: roles and separators instead of Jinja."""

    name: str
    system: str
    user: str
    assistant: str
    sep_style: str
    stop_str: _Stop
    sep: str = "\n"
    system_message: str = ""  # where a conversation has none

    def jinja(self) -> str:
        """The same as a template. Raises UsageError for a style that is not known."""
        if self.sep_style not in _STYLES:
            known = ", ".join(_STYLES)
            raise UsageError(f"sep_style {self.sep_style}: expected one of {known}")
        style = _STYLES[self.sep_style]
        parts = {
            "system": self.system + "\n",
            "message": self.system_message,
            "user": self.user,
            "assistant": self.assistant,
            "after_system": style.after_system.format(sep=self.sep),
            "between": style.between,
            "end": style.end.format(sep=self.sep),
            "opening": self.assistant + style.opening,
        }
        return _GENERATED % {name: _literal(text) for name, text in parts.items()}

    def stop(self) -> tuple[str, ...]:
        return (self.stop_str,) if isinstance(self.stop_str, str) else tuple(self.stop_str or ())


_GENERATED = """\
{%%- set ns = namespace(system=%(message)s) -%%}
{%%- for message in messages if message.role == 'system' -%%}
  {%%- set ns.system = message.content -%%}
{%%- endfor -%%}
{{- %(system)s ~ ns.system ~ %(after_system)s -}}
{%%- for message in messages if message.role != 'system' -%%}
  {{- %(user)s if message.role == 'user' else %(assistant)s -}}
  {{- %(between)s ~ message.content ~ %(end)s -}}
{%%- endfor -%%}
{%%- if add_generation_prompt -%%}
  {{- %(opening)s -}}
{%%- endif -%%}
"""


def _literal(text: str) -> str:
    """A string as Jinja reads it; unlike JSON it joins no surrogates."""
    return json.dumps(text, ensure_ascii=False)


def names() -> list[str]:
    """Templates that are known by name."""
    return sorted(file.stem for file in FOLDER.glob("*.jinja"))


def find(value: str) -> ChatTemplate:
    """What a `--chat-template` means: a name, a file, or Jinja itself.

    Raises:
        UsageError: it is none of them, or the file cannot be read as what it is.
    """
    if value in names():
        return ChatTemplate(str(FOLDER / f"{value}.jinja"), STOPS.get(value, ()))
    if any(character in value for character in "{}\n"):
        return ChatTemplate(value)
    file = Path(value)
    if not file.is_file():
        raise UsageError(f"--chat-template {value}: no such file, nor one of {', '.join(names())}")
    return _from_json(file) if file.suffix == ".json" else ChatTemplate(str(file.resolve()))


def _from_json(file: Path) -> ChatTemplate:
    try:
        template = msgspec.json.decode(file.read_bytes(), type=SglangTemplate)
        return ChatTemplate(template.jinja(), template.stop())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, UsageError) as error:
        raise UsageError(f"--chat-template {file}: {error}") from error
