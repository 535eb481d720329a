"""Where MoLink keeps things: `MOLINK_HOME`, one folder per cluster, 0700."""

import os
import shutil
import tempfile
from pathlib import Path

HOME_VARIABLE = "MOLINK_HOME"


def home() -> Path:
    """`MOLINK_HOME`, or `~/.molink`."""
    path = Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".molink")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


class ClusterFolder:
    """Files of one cluster on one machine."""

    def __init__(self, name: str) -> None:
        self.path = home() / name
        self.path.mkdir(mode=0o700, exist_ok=True)

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

    @property
    def token(self) -> Path:
        return self.path / "token"


def known_clusters() -> list[ClusterFolder]:
    """The clusters this machine has had a node in."""
    return [ClusterFolder(path.name) for path in sorted(home().iterdir()) if path.is_dir()]


class RunFolder:
    """Sockets and rendezvous files of one running node: short path, 0700, gone with the node."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="molink-"))

    @property
    def socket(self) -> Path:
        return self.path / "agent.sock"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
