"""Files of a model on the hub, and in the hub's cache on this machine.

huggingface_hub does the transfer. One thing it does not do: it begins a file anew when its process
was ended in the middle, so `fetch` keeps the part in the cache itself.
It comes with vLLM and is slow to import; a model in a local folder does without.
"""

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from molink.core.errors import HubError, UsageError

CHUNK_BYTES = 1 << 20  # what is written, and counted, at once
_API_TIMEOUT_S = 30.0
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # sha1 of git, or sha256 of a large file
_SHA256_DIGITS = 64


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit."""

    name: str
    size: int  # bytes
    etag: str  # names its content in the cache; its hash, see `_digest`


class HubModel:
    """One commit of a model, and its folder in a cache that other programs use too.

    Args:
        name: hub id.
        commit: sha1 (hex).
        cache: the cache's folder; None: where huggingface_hub has it.
    """

    def __init__(self, name: str, commit: str, cache: Path | None = None) -> None:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        self.name = name
        self.commit = commit
        self.cache = cache or Path(constants.HF_HUB_CACHE)
        self._storage = self.cache / repo_folder_name(repo_id=name, repo_type="model")
        self.folder = self._storage / "snapshots" / commit

    def list_files(self) -> dict[str, HubFile]:
        """All files of the commit, by name.

        Raises:
            UsageError: the hub does not give them.
            HubError: it does not answer.
        """
        from huggingface_hub import HfApi

        with _clear_errors(f"cannot ask the hub for the files of {self.name}"):
            info = HfApi().model_info(
                self.name, revision=self.commit, files_metadata=True, timeout=_API_TIMEOUT_S
            )
            return {file.name: file for file in map(_hub_file, info.siblings or ())}

    def has(self, name: str) -> bool:
        """Whether a file is in the cache, whole."""
        return (self.folder / name).exists()

    def bytes_missing(self, file: HubFile) -> int:
        """What is left to download of a file."""
        if self.has(file.name) or self._blob(file).exists():  # another commit has it too
            return 0
        part = self._part(file)
        return max(0, file.size - (part.stat().st_size if part.exists() else 0))

    def fetch(self, file: HubFile, moved: Callable[[int], None]) -> None:
        """Download one file into the cache, from where an earlier start left it.

        Args:
            moved: called with the number of the file's bytes that are there.

        Raises:
            UsageError: the hub does not give the file, or the disk does not take it.
            HubError: the hub stops answering, or gave other bytes.
        """
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

        blob = self._blob(file)
        lock = self.cache / ".locks" / self._storage.name / f"{file.etag}.lock"
        with _clear_errors(
            f"cannot download {file.name} of {self.name}", "; a new start goes on where this ended"
        ):
            for folder in (blob.parent, lock.parent):
                folder.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):
                if not blob.exists() and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
                    self._transfer(file, moved)
                    self._part(file).replace(blob)
            hf_hub_download(self.name, file.name, revision=self.commit, cache_dir=self.cache)

    def _blob(self, file: HubFile) -> Path:
        return self._storage / "blobs" / file.etag

    def _part(self, file: HubFile) -> Path:
        return self._storage / "blobs" / f"{file.etag}.incomplete"

    def _transfer(self, file: HubFile, moved: Callable[[int], None]) -> None:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES  # 10 MiB: what an end in the middle loses
        part = self._part(file)
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        url = hf_hub_url(self.name, file.name, revision=self.commit)
        with _CountedFile(part, moved) as target, _network_errors():
            http_get(
                url,
                target,
                resume_size=target.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
            )
        if (found := _digest(part, file.etag)) != file.etag:
            part.unlink()
            raise HubError(
                f"{file.name} of {self.name} arrived damaged: its hash is {found}, the hub says "
                f"{file.etag}; start again to download it anew"
            )


class _CountedFile(io.BufferedWriter):
    """Appends to a file and says how long it is."""

    def __init__(self, path: Path, moved: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._moved = moved

    def write(self, data: Any, /) -> int:
        written = super().write(data)
        self._moved(self.tell())
        return written


def fetch_config(name: str, revision: str | None) -> Path:
    """The path of a model's config.json in the cache, under its commit.

    Raises:
        UsageError: there is no such model.
        HubError: the hub does not answer, or gave other bytes.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    with _clear_errors():
        path = Path(hf_hub_download(name, "config.json", revision=revision))
    _check_cached(path)
    return path


def _check_cached(path: Path) -> None:
    """Raises HubError for a file that is not what its name in the cache says, and removes it."""
    blob = path.resolve()
    if _ETAG.fullmatch(blob.name) and _digest(blob, blob.name) != blob.name:
        blob.unlink()
        raise HubError(f"{path.name} has arrived damaged; start again to download it anew")


def _digest(path: Path, etag: str) -> str:
    """The hash of a file of which `etag` is one: sha256, or git's sha1 of a small one."""
    with path.open("rb") as file:
        if len(etag) == _SHA256_DIGITS:
            return hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tensor_sizes(name: str, revision: str | None) -> dict[str, int]:
    """Bytes of every tensor of a model whose weights are on the hub; none if not in safetensors.

    Reads the files' headers alone.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import NotASafetensorsRepoError

    if constants.is_offline_mode():
        return {}
    with _clear_errors(f"cannot read the sizes of {name} on the hub"):
        try:
            metadata = HfApi().get_safetensors_metadata(name, revision=revision)
        except NotASafetensorsRepoError:
            return {}
    return {
        tensor: info.data_offsets[1] - info.data_offsets[0]
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
    }


def _hub_file(sibling: Any) -> HubFile:
    etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if not isinstance(sibling.size, int) or not _ETAG.fullmatch(str(etag)):
        raise ValueError(f"the hub says neither size nor hash of {sibling.rfilename}")
    return HubFile(sibling.rfilename, sibling.size, etag)


@contextmanager
def _network_errors() -> Iterator[None]:
    """A transfer that ends short is an OSError without a number. Raises HubError for it."""
    from httpx2 import HTTPError

    try:
        yield
    except HTTPError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise HubError(_first_line(error)) from error


@contextmanager
def _clear_errors(doing: str = "", then: str = "") -> Iterator[None]:
    """Say in one line what the hub or the disk refused. Raises HubError for what may pass."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        yield
    except (HTTPError, OSError, ValueError, SafetensorsParsingError) as error:
        reason = _reason(error) + then
        kind = HubError if _may_pass(error) else UsageError
        raise kind(f"{doing}: {reason}" if doing else reason) from error


def _may_pass(error: Exception) -> bool:
    import httpx2
    from huggingface_hub import errors

    match error:
        case errors.LocalEntryNotFoundError(__cause__=Exception() as cause):
            return _may_pass(cause)
        case errors.HfHubHTTPError():
            status = error.response.status_code
            return status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or (
                status >= HTTPStatus.INTERNAL_SERVER_ERROR
            )
        case _:
            return isinstance(error, httpx2.HTTPError)


def _reason(error: Exception) -> str:
    import httpx2
    from huggingface_hub import errors

    match error:
        case errors.LocalEntryNotFoundError(__cause__=Exception() as cause):
            return _reason(cause)
        case errors.GatedRepoError():
            return "it is gated: accept its terms on the hub, then set HF_TOKEN on this machine"
        case errors.RevisionNotFoundError():
            return "it has no such revision"
        case errors.RepositoryNotFoundError():
            return "there is none, or it is private: for a private one set HF_TOKEN on this machine"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return "the hub does not allow it: set HF_TOKEN on this machine"
        case errors.HfHubHTTPError() | errors.EntryNotFoundError():
            return _first_line(error)
        case httpx2.HTTPError():
            return f"the hub does not answer ({type(error).__name__})"
        case OSError() if error.strerror:
            return error.strerror
        case _:
            return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
