"""How an engine is told what the client of a request has already, from an engine that is gone.

The gateway puts the tokens of each choice into the request's `vllm_xargs`, by the prompt's place in
the request and the choice's among the n of that prompt. The engine's first output for such a choice
are those tokens; then it goes on with the next one.
"""

_PREFIX = "molink_delivered_"


def key_of(prompt: int, choice: int) -> str:
    """Where the tokens of a choice are."""
    return f"{_PREFIX}{prompt}_{choice}"


def is_key(name: str) -> bool:
    """Whether `vllm_xargs` holds delivered tokens under this name."""
    return name.startswith(_PREFIX)
