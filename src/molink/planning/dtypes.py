"""In which dtype a pipeline computes: the same in all stages, between which activations cross."""

from collections.abc import Mapping, Sequence

from molink.core.errors import PlanError


def shared_dtype(wanted: str, of_nodes: Mapping[str, Sequence[str]], *, is_fixed: bool) -> str:
    """`wanted` if every node computes in it; else the first of a node's that all have.

    Args:
        wanted: the user's choice, or the model's own dtype.
        of_nodes: by name, what each node's device computes in, best first.
        is_fixed: the user has chosen it.

    Raises:
        PlanError: the choice is fixed and some node lacks it, or nothing is common to all.
    """
    lacking = [name for name, dtypes in of_nodes.items() if wanted not in dtypes]
    if not lacking:
        return wanted
    best = next(iter(of_nodes.values()))
    shared = [dtype for dtype in best if all(dtype in dtypes for dtypes in of_nodes.values())]
    if shared and not is_fixed:
        return shared[0]
    common = f"all can: --dtype {' or '.join(shared)}" if shared else "no dtype is common to all"
    raise PlanError(f"{' and '.join(lacking)} cannot compute in {wanted}; {common}")
