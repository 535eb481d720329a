"""Chat templates, rendered as Hugging Face's tokenizers render them."""

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from molink.core.errors import UsageError
from molink.gateway.chat_templates import FOLDER, STOPS, find, names

CHAT = (("user", "Hello"), ("assistant", "Hi there"), ("user", "Who are you"))
SYSTEM = ("system", "Be brief")
SGLANG = {
    "name": "my_model",
    "system": "<|im_start|>system",
    "user": "<|im_start|>user",
    "assistant": "<|im_start|>assistant",
    "sep_style": "CHATML",
    "sep": "<|im_end|>",
    "stop_str": ["<|im_end|>", "<|im_start|>"],
}


def render(template: str, *messages: tuple[str, str]) -> str:
    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(
        messages=[{"role": role, "content": content} for role, content in messages],
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=True,
    )


def named(name: str) -> str:
    return Path(find(name).template).read_text()


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
            "<|im_start|>assistant\nHi there<|im_end|>\n<|im_start|>user\nWho are you<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "command-r",
            "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hello<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hi there<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Who are you<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        (
            "llama-2",
            "<s>[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nHello [/INST] Hi there </s>"
            "<s>[INST] Who are you [/INST]",
        ),
        (
            "llama-3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHi there<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWho are you<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "mistral",
            "<s>[INST] Be brief\n\nHello [/INST]Hi there</s>[INST] Who are you [/INST]",
        ),
        (
            "phi-3",
            "<s><|system|>\nBe brief<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi there<|end|>"
            "\n<|user|>\nWho are you<|end|>\n<|assistant|>\n",
        ),
        (
            "vicuna_v1.1",
            "<s>Be brief USER: Hello ASSISTANT: Hi there</s>USER: Who are you ASSISTANT:",
        ),
    ],
)
def test_a_chat_with_a_system_message(name: str, prompt: str) -> None:
    assert render(named(name), SYSTEM, *CHAT) == prompt


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("chatml", "<|im_start|>user\nHello"),
        ("command-r", "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hello"),
        (
            "gemma",
            "<s><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi there"
            "<end_of_turn>\n<start_of_turn>user\nWho are you<end_of_turn>\n"
            "<start_of_turn>model\n",
        ),
        ("llama-2", "<s>[INST] Hello [/INST] Hi there </s>"),
        ("llama-3", "<s><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"),
        ("mistral", "<s>[INST] Hello [/INST]Hi there</s>"),
        ("phi-3", "<s><|user|>\nHello<|end|>\n"),
        ("vicuna_v1.1", "<s>A chat between a curious user and an artificial intelligence"),
    ],
)
def test_a_chat_without_one(name: str, start: str) -> None:
    assert render(named(name), *CHAT).startswith(start)


def test_every_template_is_tested_here_and_every_stop_belongs_to_one() -> None:
    source = Path(__file__).read_text()
    assert [name for name in names() if f'"{name}"' not in source] == []
    assert set(STOPS) <= set(names())
    assert names() == sorted(path.stem for path in FOLDER.iterdir() if path.suffix == ".jinja")


def test_gemma_refuses_what_it_was_not_trained_on() -> None:
    with pytest.raises(TemplateError, match="gemma has no system role"):
        render(named("gemma"), SYSTEM, *CHAT)


def test_a_name_brings_its_stop_strings() -> None:
    assert find("chatml").stop == ("<|im_end|>",)
    assert find("llama-2").stop == ()


# Files, Jinja, and SGLang's JSON


def test_a_file_and_jinja_itself_stay_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages }}")
    assert find(str(file)).template == str(file)
    assert find("{{ messages }}").template == "{{ messages }}"


def write(folder: Path, **changes: Any) -> str:
    file = folder / "t.json"
    file.write_text(json.dumps(SGLANG | changes))
    return str(file)


def test_sglangs_json_form(tmp_path: Path) -> None:
    template = find(write(tmp_path))
    assert template.stop == ("<|im_end|>", "<|im_start|>")
    assert render(template.template, SYSTEM, *CHAT) == render(named("chatml"), SYSTEM, *CHAT)


@pytest.mark.parametrize(
    ("style", "prompt"),
    [
        ("ADD_COLON_SINGLE", "S\nBe brief#U: Hello#A: Hi there#U: Who are you#A:"),
        ("ADD_COLON_SPACE_SINGLE", "S\nBe brief#U: Hello#A: Hi there#U: Who are you#A: "),
        ("ADD_NEW_LINE_SINGLE", "S\nBe brief#U\nHello#A\nHi there#U\nWho are you#A\n"),
        ("NO_COLON_SINGLE", "S\nBe briefUHello#AHi there#UWho are you#A"),
        ("CHATML", "S\nBe brief#\nU\nHello#\nA\nHi there#\nU\nWho are you#\nA\n"),
        ("MPT", "S\nBe brief#UHello#AHi there#UWho are you#A"),
        ("ROBIN", "S\nBe brief#U:\nHello#A:\nHi there#U:\nWho are you#A:\n"),
    ],
)
def test_the_styles_of_sglangs_form(tmp_path: Path, style: str, prompt: str) -> None:
    roles = {"system": "S", "user": "U", "assistant": "A", "sep": "#", "sep_style": style}
    template = find(write(tmp_path, **roles, stop_str="#"))
    assert render(template.template, SYSTEM, *CHAT) == prompt
    assert template.stop == ("#",)


def test_texts_of_sglangs_form_are_not_read_as_jinja(tmp_path: Path) -> None:
    odd = "\"'\\ {{ 1 }} {% x %} %s \n \U0001f600"
    template = find(write(tmp_path, user=odd, system_message=odd)).template
    prompt = render(template, ("user", "{{ 2 }}"))
    assert prompt.count(odd) == 2
    assert "{{ 2 }}" in prompt


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sep_style": "LLAMA2"}, "sep_style LLAMA2: expected one of ADD_COLON_SINGLE"),
        ({"sep": 5}, "$.sep"),
        ({"stop_str": 5}, "$.stop_str"),
        ({"colour": "red"}, "unknown field `colour`"),
    ],
)
def test_a_broken_json_form(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        find(write(tmp_path, **changes))
    assert words in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_json_form(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "t.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=f"--chat-template {file}"):
        find(str(file))


@pytest.mark.parametrize("value", ["chatmll", "/no/such/file.jinja", "", "."])
def test_neither_a_name_nor_a_file(value: str) -> None:
    with pytest.raises(UsageError, match="no such file, nor one of chatml, command-r"):
        find(value)
