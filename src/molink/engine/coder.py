"""The way out of a stage's host memory: coded where that pays, in the order of the steps."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from molink.engine.activations import Emit, Parts, StepId, pack, pack_coded, split, unpack
from molink.engine.exact_sum import put_together, take_apart
from molink.planning.coding import MIN_BYTES, TRIAL_INTERVAL, CodingFigures, pays
from molink.wire.to_stage import WireCoding

logger = logging.getLogger("molink.stage")
TRIAL_BYTES = 1 << 18  # of a tensor: a millisecond or two of work


class Coder:
    """Sends what lies in host memory, and owns the figures that say whether coding it pays.

    A thread codes, so that the next step need not wait; only a copy is made at once.
    What is not coded leaves at once too, unless something coded is still before it. The figures
    come from parts of messages that the thread codes and decodes for trial: how long the next stage
    will need is what this one needs.

    Args:
        emit: hands a message to the agent; called from either thread, one at a time.
        link_rate: bytes a second to the next stage's node; None: not known.
    """

    def __init__(self, mode: WireCoding, emit: Emit, link_rate: Callable[[], float | None]) -> None:
        self._mode = mode
        self._emit = emit
        self._link_rate = link_rate
        self._thread = InOrder("coding")
        self._last: Future[None] | None = None  # whose message must leave first
        self._codes = False  # large messages, now
        self.may_code_sum = False  # of `hidden_states` and `residual`: the next stage takes it
        self._num_messages = 0  # that could have been coded, over a known link
        self.figures: CodingFigures | None = None

    def __call__(self, step: StepId, tensors: Mapping[str, torch.Tensor]) -> None:
        """Send a step's tensors; their memory may be written again at once."""
        is_large = sum(tensor.nbytes for tensor in tensors.values()) >= MIN_BYTES
        if is_large and self._wants() != self._codes:
            self._codes = not self._codes
            logger.info("outputs are coded: %s; %s", self._codes, self.figures)
        is_coded = is_large and self._codes
        if is_coded or (self._last is not None and not self._last.done()):
            send = self._send_coded if is_coded else self._send_raw
            self._last = self._thread.submit(send, step, _copies(tensors))
        else:
            self._send_raw(step, tensors)
        if is_large and self._mode == "auto":
            self._plan_trial(tensors)

    def _wants(self) -> bool:
        if self._mode == "auto":
            return pays(self.figures, self._link_rate())
        return self._mode == "on"

    def _send_coded(self, step: StepId, tensors: Mapping[str, torch.Tensor]) -> None:
        self._emit(step, self._pack_coded(tensors))

    def _pack_coded(self, tensors: Mapping[str, torch.Tensor]) -> Parts:
        return pack_coded(split(take_apart(tensors) if self.may_code_sum else tensors))

    def _send_raw(self, step: StepId, tensors: Mapping[str, torch.Tensor]) -> None:
        self._emit(step, pack(tensors))

    def _plan_trial(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if not self._link_rate():
            return
        if self._num_messages % TRIAL_INTERVAL == 0:
            rows = {name: max(1, TRIAL_BYTES // t[0].nbytes) for name, t in tensors.items()}
            sample = _copies({name: t[: rows[name]] for name, t in tensors.items()})
            self._thread.submit(self._try, sample)
        self._num_messages += 1

    def _try(self, sample: Mapping[str, torch.Tensor]) -> None:
        """Twice: the first time may be much slower, while nothing is warm."""
        several = (self._measure(sample) for _ in range(2))
        newest = min(several, key=lambda figures: figures.encode_s + figures.decode_s)
        self.figures = self.figures.followed_by(newest) if self.figures else newest

    def _measure(self, sample: Mapping[str, torch.Tensor]) -> CodingFigures:
        started = time.perf_counter()
        message = bytearray(b"".join(self._pack_coded(sample)))
        coded_at = time.perf_counter()
        put_together(unpack(message, torch.device("cpu")), next(iter(sample.values())).dtype)
        decode_s = time.perf_counter() - coded_at
        num_bytes = sum(tensor.nbytes for tensor in sample.values())
        return CodingFigures(
            ratio=len(message) / num_bytes,
            encode_s=(coded_at - started) / num_bytes,
            decode_s=decode_s / num_bytes,
        )


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


class InOrder:
    """A thread that does one thing after the other; a failure ends the process, as in a step."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def submit(self, work: Callable[..., None], *args: Any) -> Future[None]:
        return self._thread.submit(self._run, work, *args)

    def _run(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except Exception:
            logger.exception("an output cannot be sent")
            os._exit(1)
