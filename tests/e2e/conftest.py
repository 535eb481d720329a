"""Clusters that tests share: an engine needs 20 s to start on two cores."""

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from benchmarks.netlab import Lab, why_not
from tests.e2e.cluster import Cluster
from tests.e2e.models import FAMILIES, MAX_MODEL_LEN, make_model

BUNDLED = Path(__file__).parents[2] / "models" / "molink-mini"
MAX_NUM_SEQS = 16

COMMON = (
    f"--max-model-len={MAX_MODEL_LEN}",
    "--block-size=32",
    # Otherwise such models fill their JSON with blanks.
    '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
)
# Prompts longer than 64 tokens are cut, and more requests come than fit into a batch.
PIPELINE = (*COMMON, "--max-num-batched-tokens=64", f"--max-num-seqs={MAX_NUM_SEQS}")
WHOLE = (*COMMON, "--max-num-batched-tokens=4096", "--max-num-seqs=64")


@dataclass(frozen=True, slots=True)
class Case:
    """A pipeline to test: which model, over how many machines, how it is split."""

    family: str
    nodes: int = 2
    layers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    member_flags: tuple[str, ...] = ()


TIGHT = "llama-3"  # so little KV memory that requests preempt one another
TWO_STAGES = "llama-2"
CASES = {
    TWO_STAGES: Case("llama", nodes=2, flags=("--scheduling-policy=priority",)),
    TIGHT: Case("llama", layers=("0:2", "2:3", "3:-1"), flags=("--num-gpu-blocks-override=36",)),
    "qwen3-2": Case("qwen3", layers=("3:8", "0:3")),  # the head's stage is the last one
    "qwen3-3": Case("qwen3", nodes=3),
    "qwen3-4": Case("qwen3", nodes=4),
    "llama-4": Case("llama", layers=("none", "0:3", "3:4", "4:6", "6:8")),
    "llama-tp": Case("llama", nodes=2, member_flags=("--tensor-parallel-size=2",)),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of every family, with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    return {family: make_model(family, BUNDLED, folder / family) for family in FAMILIES}


class References:
    """One vLLM process for each family, started when it is first asked for."""

    def __init__(self, models: dict[str, Path], stack: ExitStack) -> None:
        self._models = models
        self._stack = stack
        self._running: dict[str, Cluster] = {}

    def __getitem__(self, family: str) -> Cluster:
        if family not in self._running:
            reference = Cluster(self._models[family], nodes=1, flags=WHOLE)
            self._running[family] = self._stack.enter_context(reference)
        return self._running[family]


@pytest.fixture(scope="session")
def references(models: dict[str, Path]) -> Iterator[References]:
    with ExitStack() as stack:
        yield References(models, stack)


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="session")
def pipeline(case: Case, models: dict[str, Path]) -> Iterator[Cluster]:
    """The cluster of the case; what a test does to it, the next must bear."""
    if case.member_flags and torch.cuda.device_count() == 1:
        pytest.skip("every rank needs a GPU of its own")
    with Cluster(
        models[case.family],
        case.nodes,
        layers=case.layers,
        flags=(*PIPELINE, *case.flags),
        member_arguments=case.member_flags,
    ) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def reference(case: Case, references: References) -> Cluster:
    """The one process that the pipeline must equal."""
    return references[case.family]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of the clusters that a failed test used."""
    report = yield
    if report.failed and call.when == "call":
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Cluster):
                report.sections.append((f"logs of {name}", value.logs()))
    return report


@pytest.fixture
def two_hosts(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The hosts `head` and `a`, linked by the LINE of the test's module."""
    if reason := why_not():
        pytest.skip(reason)
    with Lab() as lab:
        lab.add_host("head")
        lab.add_host("a")
        lab.link("head", "a", request.module.LINE)
        yield lab
