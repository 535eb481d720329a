"""The output of a step that will never have one."""

from typing import Self

from vllm.v1.outputs import ModelRunnerOutput


class LostStep(ModelRunnerOutput):
    """Stands in for the output of a step; `reason` says why there is none.

    `is_broken`: the pipeline stands, yet what came is no output. The step would fail again.
    """

    reason: str = ""
    is_broken: bool = False

    @classmethod
    def because(cls, reason: str, *, is_broken: bool = False) -> Self:
        lost = cls(req_ids=[], req_id_to_index={})
        lost.reason, lost.is_broken = reason, is_broken
        return lost


class Losses:
    """How often this process's pipeline was lost: the session counts, the scheduler compares.

    An idle pipeline has no step to lose, but what it had cached is gone all the same.
    """

    count = 0


losses = Losses()
