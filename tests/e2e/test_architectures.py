"""Architectures of different structure over two stages; `scripts/architectures` runs them all."""

import os
from pathlib import Path

import pytest
from tests.e2e.architectures.checkpoints import make_checkpoint
from tests.e2e.architectures.comparison import (
    CHAT,
    Outcome,
    compare,
    last_error,
    make_image_requests,
)
from tests.e2e.architectures.page import read_rows, row_of, write_page
from tests.e2e.architectures.table import ARCHITECTURES, NAMED
from tests.e2e.cluster import ENVIRONMENT, Cluster, free_port
from tests.e2e.conftest import BUNDLED, TWO_STAGES
from tests.e2e.test_cli import fails

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
CHOSEN = (
    "GPT2LMHeadModel",  # learned positions, tied embeddings, no residual stream
    "Gemma2ForCausalLM",  # two kinds of attention, so two groups of KV blocks
    "DeepseekV3ForCausalLM",  # latent attention, experts
    "PhiForCausalLM",  # transformers' code instead of vLLM's
)


@pytest.mark.e2e
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", CHOSEN)
def test_two_stages_answer_as_one_process(name: str, tmp_path: Path) -> None:
    assert compare(ARCHITECTURES[name], tmp_path / "model", [2]) == Outcome(differing={2: ""})


@pytest.mark.e2e
def test_a_model_that_vllm_cannot_split_is_refused_at_once(tmp_path: Path) -> None:
    model = make_checkpoint(ARCHITECTURES["Mamba2ForCausalLM"], BUNDLED, tmp_path / "model")
    environment = os.environ | ENVIRONMENT | {"MOLINK_HOME": str(tmp_path / "home")}
    status, said = fails(environment, "serve", model, "--nodes", 2, "--port", free_port())
    assert status == 2
    assert "does not support pipeline parallelism for Mamba2ForCausalLM" in said


@pytest.mark.e2e
@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", [TWO_STAGES], indirect=True)
def test_an_image_for_a_text_model_is_refused(pipeline: Cluster) -> None:
    body = {"model": pipeline.model, **make_image_requests()[0]}
    response = pipeline.http.post(CHAT, json=body)
    assert response.status_code == 400
    assert "is not a multimodal model" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("KeyError: 'w13'\nLoading checkpoint: 0%\n", "KeyError: 'w13'"),
        (
            "ERROR 12:00 [core.py:9] ValueError: no heads\n"
            "RuntimeError: Engine core initialization failed. See root cause above.",
            "ValueError: no heads",
        ),
        (
            "ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, XForCausalLM is not supported anymore. [type=value_error, input={}]\n"
            "    For further information visit https://example.org",
            "XForCausalLM is not supported anymore.",
        ),
        ("molink serve: error: vLLM does not split it", "vLLM does not split it"),
        ("node1 did not say «serving at»", "node1 did not say «serving at»"),
    ],
)
def test_the_error_that_came_first_is_told(text: str, error: str) -> None:
    assert last_error(text) == error


def test_a_page_keeps_the_rows_that_did_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    gpt2, llama = ARCHITECTURES["GPT2LMHeadModel"], ARCHITECTURES["LlamaForCausalLM"]
    first = row_of(llama, Outcome("KeyError: 'a | b'"))
    write_page(page, {first.name: first})
    second = row_of(gpt2, Outcome(differing={2: "", 3: "1 of 16 answers"}))
    write_page(page, read_rows(page) | {second.name: second})
    assert list(read_rows(page).values()) == [second, first]
    assert second.verdict == "differs: 3 stages: 1 of 16 answers"


def test_the_page_has_every_architecture_of_the_systems_that_molink_replaces() -> None:
    rows = read_rows(PAGE)
    assert [architecture.name for architecture in NAMED if architecture.name not in rows] == []
    assert set(rows) <= set(ARCHITECTURES)
