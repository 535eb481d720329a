"""Embeddings and classification over two stages: the numbers of one process."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.e2e.cluster import Answer, Cluster
from tests.e2e.models import MAX_MODEL_LEN
from tests.factories import make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

TOLERANCE = 1e-5
LENGTHS = [1, 5, 64, 100, 300]
KINDS = {"embed": ("--runner=pooling", "--convert=embed"), "classify": ("--runner=pooling",)}


@pytest.fixture(scope="module", params=KINDS)
def clusters(
    request: pytest.FixtureRequest, models: dict[str, Path], classifier: Path
) -> Iterator[tuple[str, Cluster, Cluster]]:
    """What they pool, two stages, one process."""
    flags = (*KINDS[request.param], f"--max-model-len={MAX_MODEL_LEN}")
    model = models["llama"] if request.param == "embed" else classifier
    with ExitStack() as stack:
        pair = [stack.enter_context(Cluster(model, nodes, flags=flags)) for nodes in (2, 1)]
        yield request.param, *pair


@pytest.fixture(scope="module")
def classifier(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a head for three classes instead of one for tokens."""
    folder = tmp_path_factory.mktemp("classifier") / "llama"
    shutil.copytree(models["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    hidden_size = weights.pop("lm_head.weight").shape[1]
    weights["score.weight"] = torch.randn(3, hidden_size, generator=torch.Generator()) * 0.02
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    labels = {str(i): f"class {i}" for i in range(3)}
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": labels}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def numbers(answers: list[Answer], key: str) -> list[list[float]]:
    return [item[key] for answer in answers for item in answer["data"]]


def test_pooling(clusters: tuple[str, Cluster, Cluster]) -> None:
    kind, pipeline, reference = clusters
    path, key = {"embed": ("/v1/embeddings", "embedding"), "classify": ("/classify", "probs")}[kind]
    requests = [{"input": prompt} for prompt in make_prompts(LENGTHS)]
    ours, theirs = (numbers(cluster.ask(requests, path), key) for cluster in (pipeline, reference))
    for here, there in zip(ours, theirs, strict=True):
        assert here == pytest.approx(there, abs=TOLERANCE)
    assert all(one != other for i, one in enumerate(ours) for other in ours[:i])


def test_a_model_that_pools_does_not_generate(clusters: tuple[str, Cluster, Cluster]) -> None:
    _, pipeline, _ = clusters
    body = {"model": pipeline.model, "prompt": "Hello"}
    assert pipeline.http.post("/v1/completions", json=body).status_code == 404
