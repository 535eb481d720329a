"""Keeps the head's two servers running: the gateway, and the engine behind it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from molink.core.errors import MolinkError, ProcessError, UsageError
from molink.engine.environment import GATEWAY_VARIABLE, SERVER_FLAGS_VARIABLE
from molink.node.home import RunFolder
from molink.node.processes import EXIT_USAGE, Child, how_it_ended
from molink.wire.to_engine import Pacing
from molink.wire.to_stage import WireFormat

Gone = Callable[[MolinkError], None]


class ServerHost:
    """Owns the process of one server.

    Args:
        gone: called with the reason when it ended by itself; a UsageError if another one would
            end in the same way.
    """

    name: ClassVar[str]
    module: ClassVar[str]

    def __init__(self, run_folder: RunFolder, logs: Path, gone: Gone) -> None:
        self._run_folder = run_folder
        self._log = logs / f"{self.name}.log"
        self._gone = gone
        self._child: Child | None = None

    async def start(self) -> None:
        """Start it; one that runs is stopped before."""
        await self.stop()
        self._child = Child(
            self.module,
            self._arguments(),
            log=self._log,
            exited=self._exited,
            environment=self._environment(),
        )
        await self._child.start()

    def _arguments(self) -> list[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        """What other users of the machine shall not see."""
        raise NotImplementedError

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
            self._gone(ProcessError(f"the {self.name} is gone ({how_it_ended(status)}); {last}"))


class GatewayHost(ServerHost):
    """Of the gateway, which clients talk to; `options` is the JSON of what it is told."""

    name = "gateway"
    module = "molink.entrypoints.gateway"

    def __init__(self, options: str, run_folder: RunFolder, logs: Path, gone: Gone) -> None:
        super().__init__(run_folder, logs, gone)
        self._options = options

    def _arguments(self) -> list[str]:
        return [f"--socket={self._run_folder.socket}", f"--engine-socket={self._run_folder.http}"]

    def _environment(self) -> dict[str, str]:
        return {GATEWAY_VARIABLE: self._options}


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the head's user said about the engine and its HTTP server."""

    model: str
    vllm_flags: tuple[str, ...]  # as typed, engine's and server's
    wire: WireFormat
    pacing: Pacing
    max_outage_s: float  # that requests wait for a lost stage


class EngineHost(ServerHost):
    """Of the engine: vLLM's OpenAI server, whose executor is ours."""

    name = "engine"
    module = "molink.entrypoints.engine"

    def __init__(
        self, settings: EngineSettings, run_folder: RunFolder, logs: Path, gone: Gone
    ) -> None:
        super().__init__(run_folder, logs, gone)
        self._settings = settings

    async def start(self) -> None:
        """Start it; one that runs is stopped before, and the socket it has left is removed."""
        await self.stop()
        self._run_folder.http.unlink(missing_ok=True)
        await super().start()

    def _arguments(self) -> list[str]:
        settings = self._settings
        return [
            f"--socket={self._run_folder.socket}",
            f"--run-folder={self._run_folder.path}",
            f"--http={self._run_folder.http}",
            f"--model={settings.model}",
            f"--wire={settings.wire.to_json()}",
            f"--pacing={settings.pacing.to_json()}",
            f"--max-outage={settings.max_outage_s}",
        ]

    def _environment(self) -> dict[str, str]:
        return {SERVER_FLAGS_VARIABLE: json.dumps(self._settings.vllm_flags)}
