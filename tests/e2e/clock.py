"""A wall clock that jumps when it is told to (libfaketime); the monotonic clock does not."""

import os
from pathlib import Path

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
# Beside a monotonic clock that is true, libfaketime refuses the call with which Python sleeps.
SLEEP = "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds)\n"


def why_no_clock() -> str:
    """Why clocks cannot be changed here; empty if they can."""
    return "" if LIBRARIES else "needs libfaketime"


class Clock:
    """The wall clock of whatever is started with `environment`.

    Args:
        folder: made, and holds what those processes read: how far it is off, whenever they look.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SLEEP)
        self._folder = folder
        self._seconds = folder / "seconds"
        self.jump(0)

    @property
    def environment(self) -> dict[str, str]:
        """Empty where clocks cannot be changed."""
        if why_no_clock():
            return {}
        path = [str(self._folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            "LD_PRELOAD": str(LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._seconds),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "PYTHONPATH": os.pathsep.join(path),
        }

    def jump(self, seconds: int) -> None:
        """Set how far it is off."""
        self._seconds.write_text(f"{seconds:+d}")
