"""What a restarted head finds on disk."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molink.cluster.state import ClusterState, NodeRecord, NodeStatus, TokenRecord
from molink.cluster.store import SCHEMA, Store
from molink.core.cluster import Resources, Versions
from molink.core.errors import UsageError
from molink.core.ids import NodeId
from molink.core.model import ModelFacts
from molink.core.plan import LayerRange, Pipeline, Stage

finite = st.floats(0, 1e15)
layer_ranges = st.tuples(st.integers(0, 99), st.integers(1, 99)).map(
    lambda p: LayerRange(p[0], p[0] + p[1])
)
texts = st.text(max_size=12)
records = st.builds(
    NodeRecord,
    id=st.integers(0, 0xFFFE).map(NodeId),
    name=texts,
    status=st.sampled_from(NodeStatus),
    since=finite,
    versions=st.none() | st.builds(Versions, st.integers(0, 99), texts, texts),
    address=st.none() | texts,
    layers=st.none() | layer_ranges,
    computes=st.booleans(),
    tensor_parallel_size=st.integers(1, 8),
    resources=st.none()
    | st.builds(Resources, texts, st.integers(0, 8), st.integers(0), finite, finite),
    trouble=texts,
)
counts = st.integers(0, 1 << 60)
model_facts = st.builds(ModelFacts, texts, counts, counts, texts, st.none() | texts, counts, counts)
pipelines = st.builds(
    Pipeline,
    st.lists(
        st.builds(Stage, counts.map(NodeId), layer_ranges, counts), min_size=1, max_size=3
    ).map(tuple),
    counts,
)
states = st.builds(
    ClusterState,
    cluster_id=texts,
    model=st.none() | model_facts,
    nodes=st.lists(records, max_size=3).map(tuple),
    tokens=st.lists(st.builds(TokenRecord, st.binary(max_size=40), finite), max_size=2).map(tuple),
    pipeline=st.none() | pipelines,
    is_down=st.booleans(),
    last_epoch=counts,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "cluster.db") as opened:
        yield opened


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(states)
def test_a_state_comes_back_as_it_was(store: Store, state: ClusterState) -> None:
    store.save(state)
    assert store.load() == state


def test_a_new_file_holds_no_state_and_a_reopened_one_the_last(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    with Store(path) as store:
        assert store.load() is None
        store.save(ClusterState("first"))
        store.save(ClusterState("second"))
    with Store(path) as store:
        assert store.load() == ClusterState("second")


def test_only_the_owner_may_read_it_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    path.touch(mode=0o644)
    with Store(path) as store:
        store.save(ClusterState("c"))
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes["cluster.db"] == 0o600
    assert set(modes.values()) == {0o600}


def test_a_second_head_is_locked_out_until_the_first_ends(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    with Store(path), pytest.raises(UsageError, match=r"cluster\.db is in use: another head"):
        Store(path)
    Store(path).close()


WRITER = """
import sys
from itertools import count
from pathlib import Path
from molink.cluster.state import ClusterState, TokenRecord
from molink.cluster.store import Store

store = Store(Path(sys.argv[1]))
for epoch in count(1):
    store.save(ClusterState("c", tokens=(TokenRecord(b"x" * 50_000, epoch),), last_epoch=epoch))
    print(epoch, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_state_no_older_than_it_said(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with writer:
        assert writer.stdout is not None
        for _ in range(20):
            said = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        said = max([said, *map(int, writer.stdout.read().split())])
    with Store(path) as store:
        state = store.load()
    assert state is not None
    assert state.last_epoch in (said, said + 1)
    assert state.tokens[0].expires_at == state.last_epoch


@pytest.mark.parametrize(
    "content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"x" * 999]
)
def test_a_file_that_is_no_database_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cluster.db"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cluster\.db is damaged"):
        Store(path)


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"\xff",
        b'{"cluster_id": 7}',
        b'{"cluster_id": "c", "pipeline": {"stages": '
        b'[{"node": 0, "layers": {"start": 4, "end": 1}}]}}',
    ],
)
def test_a_state_that_cannot_be_read_is_named(tmp_path: Path, state: bytes) -> None:
    path = tmp_path / "cluster.db"
    Store(path).close()
    edit(path, "INSERT INTO cluster VALUES (0, ?)", state)
    with Store(path) as store, pytest.raises(UsageError, match=r"cluster\.db is damaged"):
        store.load()


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    with Store(path) as store:
        store.save(ClusterState("c" * 20_000))
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xaa" * (len(content) - 4096)
    path.write_bytes(content)
    with Store(path) as store, pytest.raises(UsageError, match=r"cluster\.db is damaged"):
        store.load()


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    Store(path).close()
    edit(path, f"PRAGMA user_version = {SCHEMA + 1}")
    before = path.read_bytes()
    with pytest.raises(UsageError, match=rf"newer MoLink \(schema {SCHEMA + 1}, this one knows"):
        Store(path)
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cluster\.db cannot be used: No such file"):
        Store(tmp_path / "missing" / "cluster.db")


def edit(path: Path, statement: str, *values: bytes) -> None:
    with sqlite3.connect(path) as db:
        db.execute(statement, values)
    db.close()
