"""Keeps the engine's process: vLLM's OpenAI server, whose executor is ours."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from molink.core.errors import MolinkError, ProcessError, UsageError
from molink.engine.environment import SERVER_FLAGS_VARIABLE
from molink.node.home import RunFolder
from molink.node.processes import EXIT_USAGE, Child, how_it_ended
from molink.wire.to_engine import Pacing
from molink.wire.to_stage import WireFormat

ENGINE_MODULE = "molink.entrypoints.engine"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the head's user said about the engine and its HTTP server."""

    model: str
    vllm_flags: tuple[str, ...]  # as typed, engine's and server's
    wire: WireFormat
    pacing: Pacing
    max_outage_s: float  # that requests wait for a lost stage


class EngineHost:
    """Owns the engine's process.

    Args:
        gone: called with the reason when it ended by itself; a UsageError if another one would
            end in the same way.
    """

    def __init__(
        self,
        settings: EngineSettings,
        run_folder: RunFolder,
        logs: Path,
        gone: Callable[[MolinkError], None],
    ) -> None:
        self._settings = settings
        self._run_folder = run_folder
        self._log = logs / "engine.log"
        self._gone = gone
        self._child: Child | None = None

    async def start(self) -> None:
        await self.stop()
        self._run_folder.http.unlink(missing_ok=True)
        settings = self._settings
        self._child = Child(
            ENGINE_MODULE,
            [
                f"--socket={self._run_folder.socket}",
                f"--run-folder={self._run_folder.path}",
                f"--http={self._run_folder.http}",
                f"--model={settings.model}",
                f"--wire={settings.wire.to_json()}",
                f"--pacing={settings.pacing.to_json()}",
                f"--max-outage={settings.max_outage_s}",
            ],
            log=self._log,
            exited=self._exited,
            environment={SERVER_FLAGS_VARIABLE: json.dumps(settings.vllm_flags)},
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
            self._gone(ProcessError(f"the engine {how_it_ended(status)}; {last}"))
