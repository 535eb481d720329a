"""Child processes: whatever they do, nothing of them outlives `stop`."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import uvloop

from molink.node import processes
from molink.node.processes import TAIL_LINES, Child

PROGRAM = """
import os, signal, sys, time

from molink.engine.environment import die_with_parent

def say(text):
    os.write(1, f"{text}\\n".encode())

def wait():
    say(f"pid {os.getpid()}")
    time.sleep(60)

match sys.argv[1]:
    case "exit":
        say(os.environ["GREETING"])
        os.write(2, b"to stderr\\n")
        sys.exit(int(sys.argv[2]))
    case "talk":
        for line in range(100):
            say(f"line {line}")
    case "wait":
        wait()
    case "mortal":
        die_with_parent()
        wait()
    case "polite":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(say("bye")))
        wait()
    case "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.fork() or os.fork()
        wait()
    case "parent":  # leaves a child behind
        if os.fork():
            sys.exit(1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait()
"""


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """The agent runs on uvloop, which starts processes in a way of its own."""
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_TIMEOUT_S", 0.05)


class Nursery:
    """Makes children of the program and remembers how they ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: list[Child] = []
        self.exits: asyncio.Queue[tuple[Child, int]] = asyncio.Queue()
        (folder / "molink_test_program.py").write_text(PROGRAM)

    def child(self, *arguments: str) -> Child:
        child = Child(
            "molink_test_program",
            list(arguments),
            log=self.folder / "logs" / f"{len(self.children)}.log",
            exited=lambda child, status: self.exits.put_nowait((child, status)),
        )
        self.children.append(child)
        return child

    async def pids(self, child: Child, count: int) -> list[psutil.Process]:
        """The processes of a child, once all have said that they are there."""
        async with asyncio.timeout(10):
            while len(lines := child.log.read_text().splitlines()) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        return [psutil.Process(int(line.split()[1])) for line in lines]


@pytest.fixture
async def nursery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Nursery]:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("GREETING", "good morning")
    nursery = Nursery(tmp_path)
    yield nursery
    for child in nursery.children:
        await child.stop()


def is_over(process: psutil.Process) -> bool:
    """Gone, or a zombie that waits for an init which does not reap."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def all_over(processes: list[psutil.Process]) -> bool:
    """A killed group ends within the kernel's time, not at once."""
    for _ in range(100):
        if all(map(is_over, processes)):
            return True
        await asyncio.sleep(0.01)
    return False


async def test_output_environment_and_exit_status_are_known(nursery: Nursery) -> None:
    child = nursery.child("exit", "7")
    await child.start()
    assert await nursery.exits.get() == (child, 7)
    assert not child.is_running
    assert child.tail() == "good morning\nto stderr"
    assert child.log.parent.stat().st_mode & 0o077 == 0


async def test_what_a_library_says_at_its_end_is_not_in_the_tail(
    nursery: Nursery, tmp_path: Path
) -> None:
    child = nursery.child("talk")
    child.log.parent.mkdir(parents=True, exist_ok=True)
    child.log.write_text(
        "RuntimeError: why\nnanobind: leaked 5 functions!\n"
        ' - leaked function "f"\n - ... skipped remainder\n'
    )
    assert child.tail() == "RuntimeError: why"


async def test_the_tail_is_the_last_lines(nursery: Nursery) -> None:
    child = nursery.child("talk")
    await child.start()
    await nursery.exits.get()
    lines = child.tail().splitlines()
    assert lines == [f"line {n}" for n in range(100 - TAIL_LINES, 100)]


async def test_a_killed_child_is_reported_with_its_signal(nursery: Nursery) -> None:
    child = nursery.child("wait")
    await child.start()
    (process,) = await nursery.pids(child, 1)
    process.kill()
    assert await nursery.exits.get() == (child, -signal.SIGKILL)


async def test_a_child_knows_who_started_it(nursery: Nursery) -> None:
    child = nursery.child("mortal")
    await child.start()
    await nursery.pids(child, 1)


async def test_a_child_that_was_stopped_is_not_reported(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_TIMEOUT_S", 10)
    child = nursery.child("polite")
    await child.start()
    assert child.is_running
    await nursery.pids(child, 1)
    await child.stop()
    assert not child.is_running
    assert child.tail().endswith("bye")
    assert nursery.exits.empty()
    await child.stop()


async def test_a_tree_that_ignores_the_request_is_ended_all_the_same(nursery: Nursery) -> None:
    child = nursery.child("stubborn")
    await child.start()
    tree = await nursery.pids(child, 3)
    await child.stop()
    assert await all_over(tree)
    assert nursery.exits.empty()


async def test_what_a_dead_child_left_behind_is_ended_too(nursery: Nursery) -> None:
    child = nursery.child("parent")
    await child.start()
    orphan = await nursery.pids(child, 1)
    assert await nursery.exits.get() == (child, 1)
    assert not is_over(orphan[0])
    await child.stop()
    assert await all_over(orphan)


async def test_a_stop_that_is_cancelled_kills_at_once(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_TIMEOUT_S", 60)
    child = nursery.child("stubborn")
    await child.start()
    tree = await nursery.pids(child, 3)
    stopping = asyncio.create_task(child.stop())
    await asyncio.sleep(0.01)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await all_over(tree)


def children() -> list[psutil.Process]:
    return psutil.Process().children()


async def test_a_child_that_was_stopped_before_its_start_never_starts(nursery: Nursery) -> None:
    before = children()
    child = nursery.child("wait")
    await child.stop()
    await child.start()
    assert not child.is_running
    assert children() == before


@pytest.mark.parametrize("how", ["stop", "cancel"])
@pytest.mark.parametrize("turns", range(6))
async def test_a_child_stopped_while_it_starts_is_no_orphan(
    nursery: Nursery, turns: int, how: str
) -> None:
    before = children()
    child = nursery.child("wait")
    starting = asyncio.create_task(child.start())
    for _ in range(turns):
        await asyncio.sleep(0)
    if how == "cancel":
        starting.cancel()
    await child.stop()
    await asyncio.gather(starting, return_exceptions=True)
    assert not child.is_running
    assert await all_over([process for process in children() if process not in before])
    assert nursery.exits.empty()
