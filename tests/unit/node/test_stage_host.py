"""The stage's processes: lost together they are lost once, and never behind the agent's back."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from molink.core.errors import MolinkError, StageError, UsageError
from molink.core.ids import NodeId
from molink.node import stage_host
from molink.node.home import RunFolder
from molink.node.processes import EXIT_USAGE, ExitHandler
from molink.node.stage_host import StageHost, StageSettings

SETTINGS = StageSettings("model", 2, ("--enforce-eager",))


class StubChild:
    """A process that ends when it is told to, and takes a turn of the loop for everything."""

    started: list["StubChild"]
    dies_at_start = False

    def __init__(
        self, module: str, arguments: list[str], *, log: Path, exited: ExitHandler
    ) -> None:
        self.arguments = arguments
        self.log = log
        self.is_running = False
        self._exited: ExitHandler = exited

    async def start(self) -> None:
        self.is_running = True
        self.started.append(self)
        await asyncio.sleep(0)
        if self.dies_at_start:
            self.end(1)

    async def stop(self) -> None:
        await asyncio.sleep(0)
        self.is_running = False

    def end(self, status: int) -> None:
        self.is_running = False
        self._exited(self, status)  # type: ignore[arg-type]

    def tail(self, lines: int = 0) -> str:
        return f"the last {lines} lines"


class Stage:
    """A host, what it said, and whether something ran when it did."""

    def __init__(self, run_folder: RunFolder, logs: Path) -> None:
        self.host = StageHost(NodeId(3), run_folder, logs, self._gone)
        self.losses: list[MolinkError] = []

    @property
    def running(self) -> list[StubChild]:
        return [child for child in StubChild.started if child.is_running]

    def _gone(self, reason: MolinkError) -> None:
        assert self.running == []
        self.losses.append(reason)

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(stage_host, "Child", StubChild)
    monkeypatch.setattr(StubChild, "started", [], raising=False)
    folder = RunFolder()
    yield Stage(folder, tmp_path)
    folder.remove()


async def test_every_rank_gets_a_process_of_its_own(stage: Stage) -> None:
    await stage.host.restart(SETTINGS)
    assert [child.log.name for child in stage.running] == ["stage-0.log", "stage-1.log"]
    for rank, child in enumerate(stage.running):
        assert {"--node=3", f"--rank={rank}", "--model=model"} <= set(child.arguments)
        assert child.arguments[-2:] == ["--", "--enforce-eager"]
    await stage.host.restart(SETTINGS)
    assert stage.running == StubChild.started[2:]
    assert stage.losses == []


async def test_ranks_that_end_together_are_one_loss(stage: Stage) -> None:
    await stage.host.restart(SETTINGS)
    for child in StubChild.started:
        child.end(-signal.SIGKILL)
    await stage.settle()
    (reason,) = stage.losses
    assert isinstance(reason, StageError)
    assert str(reason) == "killed by signal 9"


async def test_one_rank_takes_the_others_along(stage: Stage) -> None:
    await stage.host.restart(SETTINGS)
    StubChild.started[1].end(1)
    await stage.settle()
    assert [str(reason) for reason in stage.losses] == ["ended with status 1"]


async def test_each_stage_that_is_lost_is_reported(stage: Stage) -> None:
    for count in (1, 2):
        await stage.host.restart(SETTINGS)
        stage.running[0].end(EXIT_USAGE)
        await stage.settle()
        assert [str(reason) for reason in stage.losses] == ["the last 1 lines"] * count
    assert all(isinstance(reason, UsageError) for reason in stage.losses)


async def test_a_rank_that_ends_while_others_start_ends_them_too(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StubChild, "dies_at_start", True)
    await stage.host.restart(SETTINGS)
    await stage.settle()
    assert len(StubChild.started) == 2
    assert len(stage.losses) == 1


async def test_a_restart_that_comes_first_is_the_only_one(stage: Stage) -> None:
    await stage.host.restart(SETTINGS)
    StubChild.started[0].end(1)
    await stage.host.restart(SETTINGS)
    await stage.settle()
    assert stage.running == StubChild.started[2:]
    assert stage.losses == []


async def test_a_stop_that_comes_first_leaves_nothing_running(stage: Stage) -> None:
    await stage.host.restart(SETTINGS)
    StubChild.started[0].end(1)
    await stage.host.stop()
    assert stage.running == []
    await stage.settle()
    assert stage.losses == []
