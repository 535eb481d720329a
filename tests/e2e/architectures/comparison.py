"""One vLLM process against pipelines, token for token."""

import base64
import io
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import httpx
from PIL import Image
from tests.e2e.architectures.checkpoints import make_checkpoint
from tests.e2e.architectures.reference import ReferenceError, reference_tokens
from tests.e2e.architectures.table import MAX_MODEL_LEN, Architecture
from tests.e2e.cluster import Cluster, Request, tokens
from tests.e2e.conftest import BUNDLED
from tests.factories import make_completion, make_prompts

LENGTHS = (1, 17, 63, 64, 65, 100, 130, 190)
IMAGE_SIZES = ((28, 28), (40, 28), (28, 70), (64, 64))
COMMON_FLAGS = (f"--max-model-len={MAX_MODEL_LEN}", "--trust-remote-code")
CUT = "--max-num-batched-tokens=64"  # longer prompts come in pieces
WHOLE = "--max-num-batched-tokens=4096"  # seeds with pieces kill a plain vLLM on CPU
WITHOUT_TORCHVISION = Path(__file__).parent / "without_torchvision"
CHAT = "/v1/chat/completions"

_ERROR = re.compile(r"\w+(Error|Exception|NotImplemented)\b|\berror:|Value error,")
_CONSEQUENCE = re.compile("initialization failed|core proc|to be inspected|validation error")
_PREFIX = re.compile(r"^.*?(?=\b\w+Error\b)|^.*?Value error, |^.*?\berror: ")
_REST = re.compile(r" \[type=.*| Supported architectures: .*")


class MonotonousModelError(Exception):
    """A model that says the same whatever it is asked: two wrong engines would agree."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one architecture.

    With both set, the model ran only with the stand-in for torchvision.
    """

    failure: str = ""  # what one process said that cannot run it
    differing: dict[int, str] = field(default_factory=dict)  # by number of stages: "" if identical


def make_requests() -> list[Request]:
    """Half greedy, half seeded."""
    prompts = make_prompts(LENGTHS)
    return [make_completion(prompt, max_tokens=24) for prompt in prompts] + [
        make_completion(prompt, max_tokens=24, temperature=0.8, seed=seed)
        for seed, prompt in enumerate(prompts)
    ]


def make_image_requests() -> list[Request]:
    """Chats about images of noise; each image is asked about once."""
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": _noise(*size)}},
                        {"type": "text", "text": "What is this?"},
                    ],
                }
            ],
            "max_tokens": 24,
            "temperature": 0.0,
            "return_token_ids": True,
        }
        for size in IMAGE_SIZES
    ]


def _noise(width: int, height: int) -> str:
    pixels = random.Random(width * height).randbytes(3 * width * height)
    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def compare(
    architecture: Architecture,
    folder: Path,
    stages: Sequence[int],
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Make a model in `folder`; ask one process, and then a pipeline of each number of stages.

    Bounded by the time-outs of the processes it starts; leaves none of them.

    Raises:
        MonotonousModelError: the answers would prove nothing.
    """
    progress("making a model")
    model = make_checkpoint(architecture, BUNDLED, folder)
    requests = make_requests()
    images = make_image_requests() if architecture.vision else []
    progress("one process")
    try:
        expected, missing = _reference(model, requests + images)
    except ReferenceError as error:
        return Outcome(last_error(str(error)))
    _check_varied(expected)
    differing = {}
    for number in stages:
        progress(f"{number} stages")
        with patch.dict(os.environ, stand_in(model) if missing else {}):
            differing[number] = _difference(model, number, requests, images, expected)
    return Outcome(missing, differing)


def _reference(model: Path, requests: list[Request]) -> tuple[list[list[int]], str]:
    """What one process answers, and the error that is gone with the stand-in for torchvision."""
    flags = (*COMMON_FLAGS, WHOLE)
    try:
        return reference_tokens(model, requests, flags), ""
    except ReferenceError as error:
        missing = last_error(str(error))
        if "torchvision" not in missing:
            raise
        return reference_tokens(model, requests, flags, stand_in(model)), missing


def stand_in(model: Path) -> dict[str, str]:
    """Variables for LLaVA without torchvision; vLLM caches what it found that it can load."""
    return {"PYTHONPATH": str(WITHOUT_TORCHVISION), "VLLM_CACHE_ROOT": str(model / "cache")}


def _difference(
    model: Path,
    stages: int,
    requests: list[Request],
    images: list[Request],
    expected: list[list[int]],
) -> str:
    """What a pipeline answers otherwise, or why it does not run; empty if it answers the same."""
    try:
        with Cluster(model, stages, flags=(*COMMON_FLAGS, CUT)) as cluster:
            found = tokens(cluster.ask(requests))
            found += tokens(cluster.ask(images, CHAT)) if images else []
    except (AssertionError, httpx.HTTPError) as error:
        return last_error(f"{type(error).__name__}: {error}")
    wrong = sum(a != b for a, b in zip(expected, found, strict=True))
    return f"{wrong} of {len(found)} answers" if wrong else ""


def last_error(text: str) -> str:
    """The last line of a log, or of an exception's text, that names an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.search(line) and not _CONSEQUENCE.search(line)]
    line = (errors or lines or ["no word"])[-1]
    return _PREFIX.sub("", _REST.sub("", line))


def _check_varied(answers: list[list[int]]) -> None:
    different = {tuple(answer) for answer in answers}
    varied = sum(len(set(answer)) > 1 for answer in answers)
    if min(len(different), varied) <= len(answers) / 2:
        raise MonotonousModelError(
            f"{len(different)} of {len(answers)} answers differ, and {varied} are of more than one "
            "token: draw the weights with another spread"
        )
