"""One dtype for all stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.core.errors import PlanError
from molink.planning.dtypes import shared_dtype

AMPERE = ["bfloat16", "float16", "float32"]
TURING = ["float16", "float32"]
MAXWELL = ["float32"]
nodes = st.dictionaries(
    st.text("abc", min_size=1), st.sampled_from([AMPERE, TURING, MAXWELL]), min_size=1
)


def test_an_older_device_moves_all_to_half_precision() -> None:
    nodes = {"head": AMPERE, "old": TURING}
    assert shared_dtype("bfloat16", nodes, is_fixed=False) == "float16"


def test_a_choice_that_one_device_lacks_is_refused_with_its_name() -> None:
    nodes = {"head": AMPERE, "old": TURING, "older": MAXWELL}
    with pytest.raises(
        PlanError, match=r"^old and older cannot compute in bfloat16; all can: --dtype float32$"
    ):
        shared_dtype("bfloat16", nodes, is_fixed=True)


def test_nothing_in_common() -> None:
    with pytest.raises(PlanError, match=r"^b cannot .* no dtype is common to all$"):
        shared_dtype("float32", {"a": ["float32"], "b": ["float16"]}, is_fixed=False)


@given(nodes, st.sampled_from(AMPERE), st.booleans())
def test_what_comes_out_is_common_to_all(
    nodes: dict[str, list[str]], wanted: str, fixed: bool
) -> None:
    try:
        found = shared_dtype(wanted, nodes, is_fixed=fixed)
    except PlanError:
        assert fixed
        assert any(wanted not in dtypes for dtypes in nodes.values())
    else:
        assert all(found in dtypes for dtypes in nodes.values())
        if all(wanted in dtypes for dtypes in nodes.values()):
            assert found == wanted
