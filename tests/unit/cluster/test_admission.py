"""Every refusal names both values."""

from dataclasses import replace
from typing import Any

import pytest

from molink.cluster.admission import HeldModel, check_model, check_versions
from molink.core.cluster import Versions
from molink.core.errors import AdmissionError
from molink.core.model import ModelFacts


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("protocol", 7, "the wire's protocol: head 1, beta 7"),
        ("molink", "0.2.0", r"MoLink: head 0\.1\.0, beta 0\.2\.0"),
        ("vllm", "0.31.0", r"vLLM: head 0\.32\.0, beta 0\.31\.0"),
    ],
)
def test_another_version_is_refused(versions: Versions, field: str, value: Any, text: str) -> None:
    with pytest.raises(AdmissionError, match=text):
        check_versions("beta", replace(versions, **{field: value}), versions)


def test_equal_versions_and_models_pass(versions: Versions, model: ModelFacts) -> None:
    check_versions("beta", replace(versions), versions)
    check_model("beta", HeldModel.of(model), model)


def test_another_model_is_refused_with_both_hashes_and_a_remedy(model: ModelFacts) -> None:
    with pytest.raises(AdmissionError, match=f"head {'a' * 64}, beta {'b' * 64}.*--model PATH"):
        check_model("beta", HeldModel("b" * 64, None), model)


def test_revisions_are_compared_where_both_sides_have_one(model: ModelFacts) -> None:
    pinned = replace(model, revision="1" * 40)
    check_model("beta", HeldModel(model.config_hash, None), pinned)
    check_model("beta", HeldModel(model.config_hash, "2" * 40), model)
    with pytest.raises(AdmissionError, match=f"revision: head {'1' * 40}, beta {'2' * 40}"):
        check_model("beta", HeldModel(model.config_hash, "2" * 40), pinned)
