"""docs/architectures.md: one row for each architecture, with a verdict."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests.e2e.architectures.comparison import Outcome
from tests.e2e.architectures.table import ARCHITECTURES, Architecture

NOT_IN_VLLM = "not in vLLM 0.32"
NOT_ON_CPU = "not on CPU"
IDENTICAL = "identical"
NOT_OVER_STAGES = "not over stages"

_INTRODUCTION = """# Architectures

Each row is a tiny model with random weights, made and run by `scripts/architectures`: one vLLM
process, then the same model over two and over three stages on one machine, in float32 on CPU.
Sixteen requests come at once, eight greedy and eight sampled with a seed; prompts have 1 to 190
tokens and are cut into pieces of 64. A model whose answers do not vary is refused, because two
wrong engines would agree on it.

| verdict | means |
|---|---|
| identical | two and three stages give the tokens of one process |
| differs | they do not, and why |
| not over stages | vLLM runs it on one machine alone; MoLink says so when it starts |
| not in vLLM 0.32 | vLLM refuses it, or fails on it, on one machine too; its words follow |
| not on CPU | one vLLM process fails for want of a kernel or a package; GPUs were not tried |

`scripts/architectures llama gpt2` runs some again and leaves the other rows.

"""
_NOTES = """
The stand-in: vLLM's LLaVA models import torchvision, of which the package index has no build for
CPU alone, so `scripts/install cpu` leaves it out. The function they take from it counts tokens, and
`tests/e2e/architectures/without_torchvision` gives them its twin from transformers.
"""
_WANTING = re.compile(r"_OpNamespace|No module named|\bCPU\b")
_HEADER = "| architecture | what sets it apart | verdict |\n|---|---|---|\n"
_ROW = re.compile(r"\| `(\w+)` \| (.*?) \| (.*) \|")


class Row(NamedTuple):
    """One line of the page."""

    name: str
    traits: str
    verdict: str


def row_of(architecture: Architecture, outcome: Outcome) -> Row:
    """Put an outcome in words."""
    return Row(architecture.name, architecture.traits, _verdict(architecture, outcome))


def _verdict(architecture: Architecture, outcome: Outcome) -> str:
    failure = outcome.failure.replace("|", "/")
    where = NOT_ON_CPU if _WANTING.search(failure) else NOT_IN_VLLM
    if failure and not outcome.differing:
        return f"{where}: {failure}"
    wrong = {stages: what for stages, what in outcome.differing.items() if what}
    if wrong and all("cannot be split" in what for what in wrong.values()):
        found = f"{NOT_OVER_STAGES}: {next(iter(wrong.values()))}"
    elif wrong:
        found = "differs: " + "; ".join(f"{n} stages: {what}" for n, what in wrong.items())
    else:
        found = f"{IDENTICAL}, text and images" if architecture.vision else IDENTICAL
    return f"{where}: {failure}; with a stand-in (below) {found}" if failure else found


def read_rows(page: Path) -> dict[str, Row]:
    """The rows of a page that was written before."""
    text = page.read_text() if page.exists() else ""
    return {match[1]: Row(*match.groups()) for match in _ROW.finditer(text)}


def write_page(page: Path, rows: Mapping[str, Row]) -> None:
    """Write the rows in the order of the table; others are left out."""
    ordered = [rows[name] for name in ARCHITECTURES if name in rows]
    lines = [f"| `{row.name}` | {row.traits} | {row.verdict} |\n" for row in ordered]
    page.write_text(_INTRODUCTION + _HEADER + "".join(lines) + _NOTES)
