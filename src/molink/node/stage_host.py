"""Keeps the stage processes of a node running: one for each tensor-parallel rank."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from molink.core.errors import HubError, MolinkError, StageError, UsageError
from molink.node.home import RunFolder
from molink.node.processes import EXIT_HUB_FAILED, EXIT_USAGE, Child, how_it_ended

logger = logging.getLogger("molink.agent")
STAGE_MODULE = "molink.entrypoints.stage"


@dataclass(frozen=True, slots=True)
class StageSettings:
    """What the node's user said about its stage."""

    model: str
    tensor_parallel_size: int
    engine_flags: tuple[str, ...]


class StageHost:
    """Owns the stage's processes. A stage is loaded once; to load again means new processes.

    Args:
        gone: called with the reason when processes ended by themselves; all are stopped before. It
            is a UsageError if another one would end in the same way, a HubError if one might that
            comes at once. Not called if `restart` or `stop` came first.
    """

    def __init__(
        self, node: int, run_folder: RunFolder, logs: Path, gone: Callable[[MolinkError], None]
    ) -> None:
        self._node = node
        self._run_folder = run_folder
        self._logs = logs
        self._gone = gone
        self._children: list[Child] = []
        self._lost: MolinkError | None = None  # why, until all processes are stopped
        self._starts = 0
        self._ended: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()

    async def restart(self, settings: StageSettings) -> None:
        """End what runs and start all ranks; each attaches to the agent when it is up."""
        async with self._changing:
            await self._stop()
            await self._start(settings)

    async def _start(self, settings: StageSettings) -> None:
        self._starts += 1
        folder = self._run_folder.path / f"stage-{self._starts}"
        folder.mkdir(mode=0o700)
        for rank in range(settings.tensor_parallel_size):
            arguments = [
                f"--socket={self._run_folder.socket}",
                f"--node={self._node}",
                f"--rank={rank}",
                f"--tensor-parallel-size={settings.tensor_parallel_size}",
                f"--model={settings.model}",
                f"--run-folder={folder}",
                "--",
                *settings.engine_flags,
            ]
            child = Child(
                STAGE_MODULE,
                arguments,
                log=self._logs / f"stage-{rank}.log",
                exited=self._exited,
            )
            self._children.append(child)
            await child.start()

    async def stop(self) -> None:
        async with self._changing:
            await self._stop()

    async def _stop(self) -> None:
        self._lost = None
        children, self._children = self._children, []
        await asyncio.gather(*(child.stop() for child in children))

    def _exited(self, child: Child, status: int) -> None:
        if child not in self._children or self._lost is not None:
            return
        if status == EXIT_USAGE:
            self._lost = UsageError(child.tail(1))
        elif status == EXIT_HUB_FAILED:
            self._lost = HubError(child.tail(1))
        else:
            self._lost = StageError(how_it_ended(status))
            if status > 0:
                logger.warning("the last lines of %s:\n%s", child.log, child.tail())
        self._ended = asyncio.create_task(self._give_up())

    async def _give_up(self) -> None:
        async with self._changing:
            reason = self._lost
            if reason is None:
                return
            await self._stop()
        self._gone(reason)
