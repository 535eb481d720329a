"""Where MoLink keeps things: `MOLINK_HOME`, one folder per cluster, 0700."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from molink.core.errors import UsageError

HOME_VARIABLE = "MOLINK_HOME"
MAX_FOLDER = 50  # characters; a unix socket's whole path may have 107, and vLLM's names are long

_GUARD = 'trap "" INT TERM HUP; read -r _; rm -rf -- "$1" || { sleep 1; rm -rf -- "$1"; }'
"""Waits for end of file. What the kernel is still killing may add a file while the first runs."""


def home() -> Path:
    """`MOLINK_HOME`, or `~/.molink`."""
    return _made(Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".molink"))


def _made(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the folder {path}: {error.strerror}; {HOME_VARIABLE} names another place"
        ) from None
    return path


class ClusterFolder:
    """Files of one cluster on one machine."""

    def __init__(self, name: str) -> None:
        self.path = _made(home() / name)

    @property
    def state(self) -> Path:
        return self.path / "state.sqlite"

    @property
    def authority(self) -> Path:
        return self.path / "authority.pem"

    @property
    def identity(self) -> Path:
        return self.path / "identity.pem"

    @property
    def head(self) -> Path:
        """Holds HOST:PORT of the head's agent."""
        return self.path / "head"

    def head_address(self) -> str | None:
        """HOST:PORT of the head's agent, as it was last; None: this machine has had none."""
        return self.head.read_text().strip() if self.head.exists() else None

    @property
    def token(self) -> Path:
        return self.path / "token"


def known_clusters() -> list[ClusterFolder]:
    """The clusters this machine has had a node in."""
    return [ClusterFolder(path.name) for path in sorted(home().iterdir()) if path.is_dir()]


class RunFolder:
    """Sockets and rendezvous files of one running node: short path, 0700, gone with the node.

    A shell holds the other end of a pipe and removes the folder when this process ends without
    having done so itself, `kill -9` included.
    """

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        parent = parent if len(parent) <= MAX_FOLDER else "/tmp"
        self.path = Path(tempfile.mkdtemp(prefix="molink-", dir=parent))
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "molink-guard", str(self.path)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def socket(self) -> Path:
        """Of the agent."""
        return self.path / "agent.sock"

    @property
    def http(self) -> Path:
        """Of the engine's HTTP server."""
        return self.path / "http.sock"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._guard.communicate()
