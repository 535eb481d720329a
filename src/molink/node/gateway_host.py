"""Keeps the gateway's process: what clients talk to."""

from collections.abc import Callable
from pathlib import Path

from molink.core.errors import MolinkError, ProcessError, UsageError
from molink.engine.environment import GATEWAY_VARIABLE
from molink.node.home import RunFolder
from molink.node.processes import EXIT_USAGE, Child, how_it_ended

GATEWAY_MODULE = "molink.entrypoints.gateway"


class GatewayHost:
    """Owns the gateway's process.

    Args:
        options: JSON of what it is told.
        gone: called with the reason when it ended by itself; a UsageError if another one would
            end in the same way.
    """

    def __init__(
        self,
        options: str,
        run_folder: RunFolder,
        logs: Path,
        gone: Callable[[MolinkError], None],
    ) -> None:
        self._options = options
        self._run_folder = run_folder
        self._log = logs / "gateway.log"
        self._gone = gone
        self._child: Child | None = None

    async def start(self) -> None:
        self._child = Child(
            GATEWAY_MODULE,
            [
                f"--socket={self._run_folder.socket}",
                f"--engine-socket={self._run_folder.http}",
            ],
            log=self._log,
            exited=self._exited,
            environment={GATEWAY_VARIABLE: self._options},
        )
        await self._child.start()

    async def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.stop()

    def _exited(self, child: Child, status: int) -> None:
        if child is not self._child:
            return
        if status == EXIT_USAGE:
            self._gone(UsageError(child.tail(1)))
        else:
            last = f"the last lines of {child.log}:\n{child.tail()}"
            self._gone(ProcessError(f"the gateway {how_it_ended(status)}; {last}"))
