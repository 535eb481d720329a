"""A stage's files: on this machine, whole, before vLLM loads them.

Runs in the stage's process when it is told its layers, which may take hours.
"""

import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from molink.checkpoint.hub import HubFile, HubModel
from molink.checkpoint.model import find_model
from molink.checkpoint.weights import Share, check_files, choose_files, link_files
from molink.core.errors import MolinkError, UsageError
from molink.core.plan import LayerRange
from molink.wire.to_agent import Downloading, Notice

REPORT_INTERVAL_S = 1.0
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "dummy")
"""Those of vLLM's that load a folder with some of a checkpoint's files."""

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.yaml")
_CODE = "*.py"

Tell = Callable[[Downloading | Notice], None]


@dataclass(frozen=True, slots=True)
class StageFiles:
    """Which files a stage needs: the values of vLLM's flags on this node, and its layers."""

    model: str  # a folder or a hub id
    revision: str | None  # the commit that the head has found
    layers: LayerRange
    num_layers: int
    load_format: str
    with_code: bool  # Python files of the model too
    cache: Path | None  # None: the hub's usual one
    run_folder: Path  # for a folder of links

    def bring(self, tell: Tell) -> str:
        """What vLLM loads from: a folder that holds the stage's files, whole, or links to them.

        Args:
            tell: hears once a second how far a download is.

        Raises:
            UsageError: a file is missing, damaged or cannot be downloaded; it is named.
            HubError: so is one that cannot be downloaded now.
        """
        if self.load_format not in LOAD_FORMATS:
            return self.model
        found = find_model(self.model, self.revision)
        share = Share(self.layers, self.num_layers, found.is_tied)
        if Path(self.model).expanduser().is_dir() or found.revision is None:
            return self._checked(found.folder, share)
        model = HubModel(self.model, found.revision, self.cache)
        try:
            files = model.list_files()
        except MolinkError as error:
            return self._cached(model, share, error)
        self._download(model, files, share, tell)
        return self._checked(model.folder, share)

    def _cached(self, model: HubModel, share: Share, unreachable: MolinkError) -> str:
        """What an earlier time has left; raises `unreachable` if that is not enough."""
        try:
            return self._checked(model.folder, share)
        except UsageError:
            raise unreachable from None

    def _checked(self, folder: Path, share: Share) -> str:
        names = [path.name for path in folder.glob("*")]
        chosen = choose_files(folder, names, share, self.load_format)
        check_files(folder / file for file in chosen.files)
        if chosen.index is None:
            return str(folder)
        linked = self.run_folder / folder.resolve().name
        if not linked.exists():
            link_files(folder, chosen, linked)
        return str(linked)

    def _download(
        self, model: HubModel, files: dict[str, HubFile], share: Share, tell: Tell
    ) -> None:
        small = [file for name, file in files.items() if self._is_small(name)]
        _fetch(model, small, lambda _: None)
        chosen = choose_files(model.folder, files, share, self.load_format)
        if chosen.index is None and chosen.files:
            tell(Notice(f"{model.name} has no index of its weights: every stage downloads all"))
        _fetch(model, [files[name] for name in chosen.files], tell)

    def _is_small(self, name: str) -> bool:
        """Whether a file is none of weights, and may be asked for when they are loaded."""
        if name.endswith(_CODE[1:]):
            return self.with_code
        return "/" not in name and any(fnmatch(name, pattern) for pattern in _SMALL_FILES)


def _fetch(model: HubModel, files: Collection[HubFile], tell: Tell) -> None:
    """Download what is missing. Raises UsageError, before anything, if the disk is too small."""
    missing = [file for file in files if model.bytes_missing(file) or not model.has(file.name)]
    _check_space(model, sum(map(model.bytes_missing, missing)))
    progress = _Progress(sum(file.size for file in missing), tell)
    for file in missing:
        progress.begin(file.name)
        model.fetch(file, progress.moved)
        progress.end(file.size)


def _check_space(model: HubModel, needed: int) -> None:
    folder = next(path for path in (model.cache, *model.cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"the disk of {model.cache} has {free / 1e9:.2f} GB free, and the files of this stage "
            f"need {needed / 1e9:.2f} GB: make room, or set HF_HUB_CACHE to a folder elsewhere"
        )


class _Progress:
    """Adds up the bytes of several files, and tells them once a second and at the end."""

    def __init__(self, total: int, tell: Tell) -> None:
        self._total = total
        self._tell = tell
        self._of_earlier = 0
        self._file = ""
        self._told_at = 0.0

    def begin(self, file: str) -> None:
        self._file = file
        self.moved(0)

    def moved(self, position: int) -> None:
        """So many bytes of the present file are there."""
        done = min(self._of_earlier + position, self._total)
        if done == self._total or time.monotonic() >= self._told_at + REPORT_INTERVAL_S:
            self._told_at = time.monotonic()
            self._tell(Downloading(self._file[-300:], done, self._total))

    def end(self, size: int) -> None:
        self._of_earlier += size
        self.moved(0)
