"""An imitation of the hub: an HTTP server on loopback over folders of models.

    with Hub({"maker/tiny": folder}) as hub:
        subprocess.run(..., env=hub.environment(cache))
        hub.requests

It speaks as much of the hub's file interface as huggingface_hub and vLLM use, notes what it is
asked, and misbehaves when it is told to.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c0ffee" + "0" * 34
CHUNK_BYTES = 64 << 10
WEIGHTS = (".safetensors", ".bin")
_API = re.compile(
    r"/api/models/(?P<model>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?"
)
_FILE = re.compile(r"/(?P<model>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_ORIGIN = re.compile(r"origin/(\S+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(slots=True)
class Request:
    """One request for a file or for a list."""

    machine: str  # whose environment named it
    method: str
    path: str
    start: int = 0  # of the answer within the file, in bytes
    is_bounded: bool = False  # asks for a header or the like
    sent: int = 0  # bytes

    @property
    def file(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(slots=True)
class Faults:
    """How the hub misbehaves; the keys of the dictionaries are file names."""

    refuses: tuple[int, str] | None = None  # status and error code of every answer
    hangs_after: dict[str, int] = field(default_factory=dict)  # bytes of the file
    cuts_after: dict[str, int] = field(default_factory=dict)  # bytes of the file, once
    corrupts: set[str] = field(default_factory=set)  # one byte
    shortens: set[str] = field(default_factory=set)  # by one byte, as if the file were so long
    bytes_per_s: float = 0.0  # of every file; 0: no limit


class Hub:
    """Serves models by their hub ids; a context manager."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.faults = Faults()
        self.requests: list[Request] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, machine: str, cache: Path) -> dict[str, str]:
        """Variables of a machine that takes this hub for the hub."""
        return {
            "HF_HUB_USER_AGENT_ORIGIN": machine,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def replace_real(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Have this process take it for the hub."""
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DOWNLOAD_TIMEOUT": 0.2,
            "HF_HUB_USER_AGENT_ORIGIN": "test",
        }.items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)

    def downloads(self, machine: str) -> list[Request]:
        """The machine's requests for weights, but those for their headers."""
        return [
            request
            for request in list(self.requests)
            if (request.machine, request.method) == (machine, "GET")
            and request.file.endswith(WEIGHTS)
            and not request.is_bounded
        ]

    @contextmanager
    def misbehaving(self, **faults: Any) -> Iterator[None]:
        """Have the fields of `Faults` for a while."""
        self.faults = Faults(**faults)
        try:
            yield
        finally:
            self.faults = Faults()

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing; the requests are noted."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.faults.refuses is not None:
            self._refuse(path, *self.hub.faults.refuses)
        elif match := _API.fullmatch(path):
            self._answer_api(path, match)
        elif match := _FILE.fullmatch(path):
            self._answer_file(path, match)
        else:
            self._refuse(path, 404, "EntryNotFound")

    def _answer_api(self, path: str, match: re.Match[str]) -> None:
        folder = self.hub.models.get(match["model"])
        if folder is None:
            return self._refuse(path, 404, "RepoNotFound")
        if match["revision"] not in (None, "main", COMMIT):
            return self._refuse(path, 404, "RevisionNotFound")
        files = [_entry(file, folder) for file in sorted(folder.rglob("*")) if file.is_file()]
        if match["what"] == "tree":
            self._send_json(path, files)
        else:
            siblings = [
                {**file, "rfilename": file["path"], "blobId": file["oid"]} for file in files
            ]
            self._send_json(path, {"id": match["model"], "sha": COMMIT, "siblings": siblings})

    def _answer_file(self, path: str, match: re.Match[str]) -> None:
        folder = self.hub.models.get(match["model"])
        if folder is None:
            return self._refuse(path, 404, "RepoNotFound")
        if match["revision"] not in ("main", COMMIT):
            return self._refuse(path, 404, "RevisionNotFound")
        file = folder / match["file"]
        if not file.is_file():
            return self._refuse(path, 404, "EntryNotFound")
        entry = _entry(file, folder)
        content = file.read_bytes()
        if file.name in self.hub.faults.shortens:
            content = content[:-1]
        start, end = 0, len(content)
        if asked := _RANGE.fullmatch(self.headers.get("Range", "")):
            start = int(asked[1])
            end = min(end, int(asked[2]) + 1) if asked[2] else end
        request = self._note(path, start, is_bounded=bool(asked and asked[2]))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        lfs = entry.get("lfs")
        if lfs is not None:
            self.send_header("X-Linked-Etag", f'"{lfs["oid"]}"')
            self.send_header("X-Linked-Size", str(lfs["size"]))
        self.send_header("ETag", f'"{entry["oid"]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if file.name in self.hub.faults.corrupts:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.command == "GET" and not self._send_content(request, content[start:end]):
            self.close_connection = True

    def _send_content(self, request: Request, content: bytes) -> bool:
        """Whether all of it was sent."""
        faults, name = self.hub.faults, request.file
        for first in range(0, len(content), CHUNK_BYTES):
            position = request.start + first
            if position >= faults.hangs_after.get(name, position + 1):
                time.sleep(3600)
            if position >= faults.cuts_after.get(name, position + 1):
                del faults.cuts_after[name]
                return False
            chunk = content[first : first + CHUNK_BYTES]
            try:
                self.wfile.write(chunk)
            except OSError:  # whoever asked is gone
                return False
            request.sent += len(chunk)
            if faults.bytes_per_s:
                time.sleep(len(chunk) / faults.bytes_per_s)
        return True

    def _send_json(self, path: str, value: object) -> None:
        self._note(path)
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, path: str, status: int, code: str) -> None:
        self._note(path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _note(self, path: str, start: int = 0, *, is_bounded: bool = False) -> Request:
        origin = _ORIGIN.search(self.headers.get("User-Agent", ""))
        machine = origin[1] if origin else ""
        self.hub.requests.append(Request(machine, self.command, path, start, is_bounded))
        return self.hub.requests[-1]


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    """A file as the hub lists it; weights are large files, which have a sha256."""
    status = file.stat()
    sha1, sha256 = _hashes(file, status.st_mtime_ns)
    entry: dict[str, Any] = {
        "type": "file",
        "path": str(file.relative_to(folder)),
        "size": status.st_size,
        "oid": sha1,
    }
    if file.suffix in WEIGHTS:
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": status.st_size, "pointerSize": 1}
    return entry


@cache
def _hashes(file: Path, changed_at: int) -> tuple[str, str]:
    content = file.read_bytes()
    blob = b"blob %d\0" % len(content) + content  # as git names it
    return hashlib.sha1(blob).hexdigest(), hashlib.sha256(content).hexdigest()
