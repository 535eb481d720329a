"""HTTP/1.1 as the gateway speaks it: requests, heads of answers, limits."""

from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from urllib.parse import unquote

import httptools
import msgspec

Headers = list[tuple[bytes, bytes]]

MAX_HEAD = 64 * 1024  # bytes of a request's or an answer's headers
MAX_BODY = 64 * 1024 * 1024  # bytes; chats may hold pictures
JSON_HEADERS: Headers = [(b"content-type", b"application/json")]

_OF_ONE_HOP = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade content-length "
    b"expect".split()
)
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


@dataclass
class Request:
    """What a client asks for, whole."""

    method: bytes
    target: bytes  # path and query
    headers: Headers = field(default_factory=list)  # names in lower case; of this hop too
    body: bytes = b""
    keeps_alive: bool = True
    is_old: bool = False  # HTTP/1.0, which knows no chunks

    @cached_property
    def path(self) -> str:
        """As the engine's server reads it: without a host, and decoded. Raises Refusal."""
        try:
            found = httptools.parse_url(self.target).path or b"/"
        except httptools.HttpParserInvalidURLError:
            raise Refusal(400, "BadRequestError", "the path makes no sense") from None
        return unquote(found.decode("latin-1"))

    def header(self, name: bytes) -> bytes | None:
        """The first header of this name."""
        return next((value for found, value in self.headers if found == name), None)


@dataclass(eq=False)
class Refusal(Exception):
    """An answer of the gateway's own: it does not pass the request on."""

    status: int
    kind: str
    message: str
    retry_after_s: int | None = None

    @property
    def headers(self) -> Headers:
        if self.retry_after_s is None:
            return JSON_HEADERS
        return [*JSON_HEADERS, (b"retry-after", str(self.retry_after_s).encode())]

    @property
    def error(self) -> dict[str, object]:
        """OpenAI's form of an error."""
        return {"message": self.message, "type": self.kind, "param": None, "code": self.status}

    @property
    def body(self) -> bytes:
        return msgspec.json.encode({"error": self.error})


def end_to_end(headers: Headers) -> Headers:
    """Headers without those that are about one connection, or the length of the body."""
    return [header for header in headers if header[0] not in _OF_ONE_HOP]


def head(first_line: bytes, headers: Headers) -> bytes:
    """A head as it is sent."""
    lines = [first_line]
    for name, value in headers:
        lines += (name, b": ", value, b"\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n".encode()


def chunk(data: bytes) -> bytes:
    """Data in the chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
