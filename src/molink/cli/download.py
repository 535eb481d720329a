"""How far the download of this machine's stage is, for the person in front of it."""

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from molink.cli.console import console, say
from molink.wire.to_agent import Downloading

STEP_PERCENT = 10


class DownloadDisplay:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_percent = -STEP_PERCENT

    def __call__(self, download: Downloading | None) -> None:
        """Show how far it is; None: there is no download any more."""
        if download is None:
            self._stop()
        elif console.is_terminal:
            self._move_bar(download)
        else:
            self._say_line(download)

    def _stop(self) -> None:
        self._last_percent = -STEP_PERCENT
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _move_bar(self, download: Downloading) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(download.file, total=download.bytes_total)
        self._bar.update(
            self._task,
            description=download.file,
            completed=download.bytes_done,
            total=download.bytes_total,
        )

    def _say_line(self, download: Downloading) -> None:
        percent = 100 * download.bytes_done // download.bytes_total
        if percent >= self._last_percent + STEP_PERCENT:
            self._last_percent = percent
            say(f"downloads {download} ({percent} %): {download.file}")
