"""The output of a step that will never have one."""

from typing import Self

from vllm.v1.outputs import ModelRunnerOutput


class LostStep(ModelRunnerOutput):
    """Stands in for the output of a step whose pipeline went down; `reason` says why."""

    reason: str = ""

    @classmethod
    def because(cls, reason: str) -> Self:
        lost = cls(req_ids=[], req_id_to_index={})
        lost.reason = reason
        return lost


class Losses:
    """How often this process's pipeline was lost: the session counts, the scheduler compares.

    An idle pipeline has no step to lose, but what it had cached is gone all the same.
    """

    count = 0


losses = Losses()
