"""The gateway's port: takes connections, and ends those whose clients are too slow."""

import asyncio
import ssl
from collections.abc import Callable

import msgspec

from molink.core.errors import UsageError
from molink.gateway.connection import Budget, Connection, Handler
from molink.gateway.http import Request

BACKLOG = 2048
CHECK_S = 5.0


class Tls(msgspec.Struct, frozen=True):
    """Files for HTTPS, as vLLM's flags name them. Without a certificate it is HTTP."""

    certfile: str | None = None
    keyfile: str | None = None
    ca_certs: str | None = None
    cert_reqs: int = 0  # ssl.VerifyMode

    def context(self) -> ssl.SSLContext | None:
        """Raises UsageError for files that cannot be used."""
        if self.certfile is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certfile, self.keyfile)
            context.verify_mode = ssl.VerifyMode(self.cert_reqs)
            if self.ca_certs is not None:
                context.load_verify_locations(self.ca_certs)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot serve HTTPS with {self.certfile}: {error}") from error
        return context


class GatewayServer:
    """Owns the listening socket and all connections.

    Args:
        handle: answers requests.
        check: raises Refusal for a request whose body shall not even be read.
    """

    def __init__(
        self, handle: Handler, check: Callable[[Request], object] = lambda request: None
    ) -> None:
        self._handle = handle
        self._check_request = check
        self._budget = Budget()
        self._connections: set[Connection] = set()
        self._server: asyncio.Server
        self._checking: asyncio.Task[None]

    async def start(self, host: str, port: int, tls: Tls) -> int:
        """Listen; returns the port. Raises UsageError if that is not possible."""
        loop = asyncio.get_running_loop()
        shared = self._handle, self._check_request, self._budget, self._connections
        connect = lambda: Connection(*shared)  # noqa: E731
        try:
            self._server = await loop.create_server(
                connect, host, port, ssl=tls.context(), backlog=BACKLOG
            )
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(
                f"cannot serve HTTP on {host}:{port}: {reason}; choose another --port or --host"
            ) from error
        self._checking = loop.create_task(self._check())
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def _check(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(CHECK_S)
            now = loop.time()
            for connection in list(self._connections):
                connection.check_time(now)

    async def stop(self) -> None:
        """Take nothing more, and end the connections once what is under way is answered."""
        self._checking.cancel()
        self._server.close()
        while self._connections:
            for connection in list(self._connections):
                connection.end()
            await asyncio.sleep(0.05)
