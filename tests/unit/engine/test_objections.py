"""What vLLM objects to is told in one line, with the name of what is wrong."""

import pytest
from pydantic import ValidationError
from vllm.config import CacheConfig

from molink.core.errors import UsageError
from molink.engine.objections import in_one_line


def test_a_value_that_a_field_does_not_take() -> None:
    with pytest.raises(UsageError) as refused, in_one_line():
        CacheConfig(gpu_memory_utilization=1.5)
    assert str(refused.value) == "gpu_memory_utilization: Input should be less than or equal to 1"


def test_vllms_own_check() -> None:
    cause = {"type": "value_error", "loc": (), "input": {}, "ctx": {"error": "no\n such heads"}}
    with pytest.raises(UsageError, match=r"^no such heads$"), in_one_line():
        raise ValidationError.from_exception_data("ModelConfig", [cause])


@pytest.mark.parametrize("kind", [ValueError, ImportError, NotImplementedError])
def test_what_is_said_without_a_field(kind: type[Exception]) -> None:
    with pytest.raises(UsageError, match=r"^install\. It\.$"), in_one_line():
        raise kind("install.\n  It.")


def test_an_error_of_the_program_stays_one() -> None:
    with pytest.raises(KeyError), in_one_line():
        raise KeyError("weight")
