"""The bundled model's folder is complete, small and agrees with the text it was trained on."""

import importlib
import itertools
import json
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MODELS = Path(__file__).parents[3] / "models"
MODEL = MODELS / "molink-mini"


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(MODELS))
    return importlib.import_module("corpus")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    return loaded


def test_folder_is_small_and_has_a_card() -> None:
    size = sum(path.stat().st_size for path in MODEL.iterdir())
    assert size <= 8_000_000
    assert (MODEL / "README.md").read_text().count("%") > 10  # measured figures


def test_weights_are_those_of_the_configuration() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    with safe_open(MODEL / "model.safetensors", framework="pt") as weights:
        layers = {key.split(".")[2] for key in weights.keys() if ".layers." in key}  # noqa: SIM118
    assert len(layers) == config["num_hidden_layers"] >= 8
    assert config["head_dim"] % 32 == 0
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("text", ["The capital of France is Paris.", "Ünïcode 漢字 🦊\n\t{}", ""])
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_generation_stops_where_the_tokenizer_says(tokenizer: PreTrainedTokenizerBase) -> None:
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|end|>"


def test_chat_template_writes_what_the_model_was_trained_on(
    tokenizer: PreTrainedTokenizerBase, corpus: ModuleType
) -> None:
    turns = [("Hi!", "Hello!"), ("Who are you?", "I am MoLink Mini.")]
    messages = [{"role": "system", "content": "Be kind."}]
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    trained = "".join(piece.text for piece in corpus.render(turns, "Be kind."))

    assert tokenizer.apply_chat_template(messages, tokenize=False) == trained
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>Be kind.<|end|><|user|>Hi!<|end|><|assistant|>"


def test_chat_template_refuses_an_unknown_role(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


def test_corpus_is_the_same_for_a_seed_and_differs_for_another(corpus: ModuleType) -> None:
    def text(seed: int) -> list[list[tuple[str, bool]]]:
        trained, _ = corpus.split(corpus.all_facts(seed), seed)
        return list(itertools.islice(corpus.documents(trained, seed), 200))

    assert text(7) == text(7)
    assert text(7) != text(8)


def test_held_out_questions_are_never_trained_on(corpus: ModuleType) -> None:
    trained, held_out = corpus.split(corpus.all_facts(0), 0)
    questions = {question for fact in trained for question in fact.questions}
    assert len(held_out) > 1000
    assert not questions & {fact.questions[0] for fact in held_out}


def test_no_question_has_two_answers(corpus: ModuleType) -> None:
    answers: dict[str, str] = {}
    for fact in corpus.all_facts(0):
        for question in fact.questions:
            assert answers.setdefault(question, fact.answer) == fact.answer, question
