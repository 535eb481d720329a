"""Keeps the cluster's state on disk, so that a head that starts again knows its nodes."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self

import msgspec

from molink.cluster.state import ClusterState
from molink.core.errors import PlanError, UsageError

SCHEMA = 1
"""Grows whenever an older state could no longer be decoded."""


class StateStore(Protocol):
    """Where a coordinator keeps its state: `Store`, or its twin in memory."""

    def load(self) -> ClusterState | None: ...

    def save(self, state: ClusterState) -> None: ...


class MemoryStore:
    """For tests: nothing outlives it."""

    def __init__(self) -> None:
        self._state: ClusterState | None = None

    def load(self) -> ClusterState | None:
        return self._state

    def save(self, state: ClusterState) -> None:
        self._state = state


class Store:
    """One SQLite file with one row: the newest state. It locks out a second head until `close`.

    The file may be read by its owner only. All methods raise UsageError, which names the file, for
    one that is damaged, locked, of a newer MoLink, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            # SQLite gives its journal the mode of the file, so this covers that too.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            path.chmod(0o600)
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    def _open(self) -> None:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("BEGIN EXCLUSIVE")  # from here on the lock is ours until close
        (schema,) = self._db.execute("PRAGMA user_version").fetchone()
        if schema > SCHEMA:
            raise UsageError(
                f"{self._path} was written by a newer MoLink (schema {schema}, this one knows "
                f"{SCHEMA}): update MoLink, or choose another MOLINK_HOME"
            )
        self._db.execute(f"PRAGMA user_version = {SCHEMA}")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS cluster (id INTEGER PRIMARY KEY CHECK (id = 0), state BLOB)"
        )
        self._db.execute("COMMIT")

    def load(self) -> ClusterState | None:
        """The state saved last; None in a new file."""
        with self._errors():
            row = self._db.execute("SELECT state FROM cluster").fetchone()
            return None if row is None else msgspec.json.decode(row[0], type=ClusterState)

    def save(self, state: ClusterState) -> None:
        """Replace the state in one transaction; when this returns it is on the disk."""
        with self._errors():
            self._db.execute(
                "INSERT OR REPLACE INTO cluster VALUES (0, ?)", (msgspec.json.encode(state),)
            )

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise UsageError(
                    f"{self._path} is in use: another head of this cluster runs on this machine"
                ) from error
            raise UsageError(f"{self._path} cannot be used: {error}") from error
        except OSError as error:
            raise UsageError(f"{self._path} cannot be used: {error.strerror}") from error
        except (sqlite3.DatabaseError, msgspec.DecodeError, PlanError) as error:
            raise UsageError(
                f"{self._path} is damaged ({error}): move it away to start a new cluster; its "
                "nodes must then join again"
            ) from error
