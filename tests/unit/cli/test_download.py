"""A download as it is shown where there is no terminal, and on one."""

import io

import pytest
from rich.console import Console

from molink.cli import console as words
from molink.cli import download as display
from molink.cli.download import DownloadDisplay
from molink.wire.to_agent import Downloading

GB = 10**9


def at(done: int, total: int = 8 * GB) -> Downloading:
    return Downloading("model-00001.safetensors", done, total)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> io.StringIO:
    """What stands in a log, or on a terminal if the test says so."""
    text = io.StringIO()
    is_terminal = getattr(request, "param", False)
    console = Console(file=text, force_terminal=is_terminal, width=120, highlight=False)
    for module in (words, display):
        monkeypatch.setattr(module, "console", console)
    return text


def test_a_log_gets_a_line_for_every_tenth(screen: io.StringIO) -> None:
    show = DownloadDisplay()
    for percent in range(0, 35, 5):
        show(at(percent * 8 * GB // 100))
    lines = screen.getvalue().splitlines()
    assert [line.split("(")[1].split(")")[0] for line in lines] == ["0 %", "10 %", "20 %", "30 %"]
    assert lines[-1].endswith("downloads 2.4/8.0 GB (30 %): model-00001.safetensors")


def test_every_download_begins_with_a_line(screen: io.StringIO) -> None:
    show = DownloadDisplay()
    for download in (at(GB // 10), None, at(GB // 10)):
        show(download)
    assert len(screen.getvalue().splitlines()) == 2


@pytest.mark.parametrize("screen", [True], indirect=True)
def test_a_terminal_gets_a_bar_that_goes_away(screen: io.StringIO) -> None:
    show = DownloadDisplay()
    show(at(2 * GB))
    words.say("something else")
    show(at(4 * GB))
    show(None)
    assert "model-00001.safetensors" in screen.getvalue()
    assert "something else" in screen.getvalue()
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1
    before = screen.getvalue()
    show(None)
    assert screen.getvalue() == before


def test_small_amounts_are_said_in_megabytes() -> None:
    assert str(at(1_500_000, 20_000_000)) == "1.5/20.0 MB"
