"""The gateway: what it answers itself, and how it gets everything else from the engine.

A request outlives the engine that began it. Until its client has something of the answer it is
asked again as a whole; a stream of completions goes on behind what the client has.
"""

import asyncio
import contextlib
import math
import re

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from molink.gateway.adapters import LOAD_PATH, UNLOAD_PATH, Adapters, refuse_in_place
from molink.gateway.admission import Admission
from molink.gateway.agent_client import AgentClient
from molink.gateway.connection import Answer
from molink.gateway.generation import Generation, priority_of
from molink.gateway.http import Headers, Refusal, Request, end_to_end
from molink.gateway.keys import Keys
from molink.gateway.metrics import ClusterCollector, GatewayMetrics
from molink.gateway.stream import DONE, DivergedError
from molink.gateway.upstream import Reply, UnreachableError, Upstream, UpstreamLostError

RETRY_AFTER_S = 5
NOTICE_S = 1.0  # in which the agent says that the engine is gone, or has lost its pipeline
RECONNECT_S = 0.2
MOST_SETBACKS = 3  # engines that ended in a row before a request got a token

UNAVAILABLE = "ServiceUnavailableError"
INTERNAL = "InternalServerError"
METRICS_HEADERS: Headers = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]
ALWAYS_ANSWERED = ("/version", "/ping")  # by an engine whose pipeline is down
FREE_PATHS = (LOAD_PATH, UNLOAD_PATH, "/tokenize", "/detokenize")  # nothing is computed for them
DEADLINE_HEADER = b"x-request-timeout"  # seconds
NEVER_WAIT = ("/health", LOAD_PATH, UNLOAD_PATH)
_INTERNAL_ERROR = re.compile(
    rb'^((?:data: )?\{"error": ?)\{"message": ?"Internal server error"[^}]*\}', re.MULTILINE
)
"""How vLLM ends the stream of a request that has failed, and so does `/generate`."""
_ABORTED = b'"finish_reason":"abort"'
_COMPLETION_TOKENS = re.compile(rb'"(?:completion|output)_tokens": ?([0-9]{1,9})')


class Gateway:
    """Answers the requests of all clients.

    Args:
        seconds: most that a request may take.
    """

    def __init__(
        self,
        agent: AgentClient,
        engine: Upstream,
        keys: Keys,
        admission: Admission,
        seconds: float | None = None,
    ) -> None:
        self._agent = agent
        self._engine = engine
        self._keys = keys
        self._admission = admission
        self._seconds = seconds
        self._adapters = Adapters()
        self._registry = CollectorRegistry()
        self._registry.register(ClusterCollector(lambda: agent.view))
        self._metrics = GatewayMetrics(
            self._registry, lambda: admission.waiting, lambda: agent.engines_lost
        )

    async def __call__(self, request: Request, answer: Answer) -> None:
        if request.path == "/cluster":
            answer.json(self._agent.view_json)
        elif request.path == "/metrics":
            await self._show_metrics(request, answer)
        else:
            with self._metrics.counted(answer):
                await self._serve(request, answer)

    async def _serve(self, request: Request, answer: Answer) -> None:
        tenant = self._keys.tenant_of(request)
        if self._agent.drains.is_set() and request.path not in ALWAYS_ANSWERED:
            raise Refusal(503, UNAVAILABLE, "the server is about to end", RETRY_AFTER_S)
        if request.path == LOAD_PATH:
            refuse_in_place(request.body)
        seconds = _deadline_of(request, self._seconds)
        exchange = _Exchange(request, answer, self._agent, self._engine, self._adapters)
        try:
            async with asyncio.timeout(seconds):
                if request.method != b"POST" or request.path in FREE_PATHS:
                    self._admission.check(tenant)
                    await exchange.run()
                    return
                urgency = priority_of(request.body)
                async with self._admission.enter(tenant, len(request.body), urgency):
                    await exchange.run()
        except TimeoutError:
            late = Refusal(504, "TimeoutError", f"the request was not done within {seconds:g} s")
            await exchange.refuse(late)
        finally:
            self._admission.charge(tenant, exchange.num_tokens)
            self._metrics.resumed.inc(exchange.times_resumed)

    async def _show_metrics(self, request: Request, answer: Answer) -> None:
        """The engine's, if there is one, and ours."""
        text, headers = b"", METRICS_HEADERS
        with contextlib.suppress(UpstreamLostError):
            reply = await self._engine.request(b"GET", b"/metrics", request.headers, b"")
            try:
                text, headers = await reply.read_all(), end_to_end(reply.headers)
            finally:
                reply.close()
        answer.whole(200, headers, text + generate_latest(self._registry))


class _Exchange:
    """One request, and what engines say to it."""

    def __init__(
        self,
        request: Request,
        answer: Answer,
        agent: AgentClient,
        engine: Upstream,
        adapters: Adapters,
    ) -> None:
        self._request = request
        self._path = request.path
        self._answer = answer
        self._agent = agent
        self._engine = engine
        self._adapters = adapters
        self._generation = Generation.read(request.path, request.body)
        self._body = self._generation.body if self._generation else request.body
        self._engines_lost = agent.engines_lost
        self._setbacks = 0
        self._num_seen = 0  # tokens, or events, of an answer that is no stream of ours
        self.times_resumed = 0

    async def run(self) -> None:
        """Answer the client, if need be from several engines. Raises Refusal."""
        try:
            while True:
                self._refuse_what_cannot_wait()
                self._engines_lost, tokens = self._agent.engines_lost, self.num_tokens
                try:
                    return await self._ask()
                except UpstreamLostError as error:
                    await self._lost(error, has_more=self.num_tokens > tokens)
        except Refusal as refusal:
            await self.refuse(refusal)

    async def refuse(self, refusal: Refusal) -> None:
        """End with an error. Raises it while the client has nothing of the answer."""
        if not self._answer.is_begun:
            raise refusal
        await self._break_off(msgspec.json.encode(refusal.error))

    @property
    def num_tokens(self) -> int:
        """Tokens that were generated for the client."""
        return self._generation.stream.num_tokens if self._generation else self._num_seen

    def _refuse_what_cannot_wait(self) -> None:
        if self._agent.down is None or self._path in ALWAYS_ANSWERED:
            return
        if self._path in NEVER_WAIT or not self._agent.waits_for_s:
            raise self._unavailable()

    def _unavailable(self) -> Refusal:
        return Refusal(503, UNAVAILABLE, self._agent.trouble, RETRY_AFTER_S)

    async def _break_off(self, error: bytes) -> None:
        """End a stream with an error, whose JSON this is; other bodies are cut off."""
        if not self._answer.is_of_events:
            return
        await self._answer.write(b'data: {"error": %b}\n\n%b\n\n' % (error, DONE))
        self._answer.end()

    # What the engine says

    async def _ask(self) -> None:
        """Raises UpstreamLostError if an engine may yet answer, Refusal if none will."""
        await self._adapters.load(self._engine, self._engines_lost)
        asked = self._request
        reply = await self._engine.request(asked.method, asked.target, asked.headers, self._body)
        try:
            if not _is_stream(reply.headers):
                await self._pass_whole(reply)
            elif self._generation is not None and reply.status == 200:
                await self._pass_stream(reply, self._generation)
            else:
                await self._pass_pieces(reply)
        finally:
            reply.close()

    async def _pass_whole(self, reply: Reply) -> None:
        body = await reply.read_all()
        if reply.status == 500 or _ABORTED in body:
            await self._refuse_if_down()
        if self._answer.is_begun:  # a stream, to which this engine says no
            await self._break_off(_error_in(body))
            return
        if found := _COMPLETION_TOKENS.search(body):
            self._num_seen = int(found[1])
        self._adapters.note(self._path, self._request.body, reply.status)
        self._answer.whole(reply.status, end_to_end(reply.headers), body)

    async def _refuse_if_down(self) -> None:
        """After a failure inside the engine: raises what it comes from, if it is known."""
        if await self._is_engine_gone():
            raise UpstreamLostError("the engine is gone")
        if self._agent.down is not None:
            raise self._unavailable()

    async def _is_engine_gone(self) -> bool:
        """Whether it is: the agent may say so only after the request has failed."""
        if self._agent.engines_lost == self._engines_lost and self._agent.down is None:
            await self._agent.change(NOTICE_S)
        return self._agent.engines_lost != self._engines_lost

    async def _pass_stream(self, reply: Reply, generation: Generation) -> None:
        stream = generation.stream
        if not self._answer.is_begun:
            self._answer.begin(200, end_to_end(reply.headers))
        while not stream.failure and not stream.is_done and (data := await reply.read()):
            await self._answer.write(stream.pass_on(data))
        if isinstance(stream.failure, DivergedError):
            raise Refusal(500, INTERNAL, "the engine was lost, and another one goes on differently")
        if stream.failure is not None:
            await self._refuse_if_down()
            await self._break_off(stream.failure.error)
        elif not stream.is_done:
            raise UpstreamLostError("the stream has no end")
        else:
            self._answer.end()
            with contextlib.suppress(UpstreamLostError):  # if it comes, the connection is kept
                await reply.read()

    async def _pass_pieces(self, reply: Reply) -> None:
        """A stream that only the engine understands."""
        while data := await reply.read():
            if _INTERNAL_ERROR.search(data):
                await self._is_engine_gone()
                if self._agent.down is not None:
                    data = self._explained(data)
            if not self._answer.is_begun:
                self._answer.begin(reply.status, end_to_end(reply.headers))
            self._num_seen += data.count(b"\n\n")
            await self._answer.write(data)
        self._answer.end()

    def _explained(self, data: bytes) -> bytes:
        """An event that says «internal server error», with what has happened."""
        error = msgspec.json.encode(self._unavailable().error)
        return _INTERNAL_ERROR.sub(lambda found: found[1] + error, data)

    # Engines that are gone

    async def _lost(self, error: UpstreamLostError, *, has_more: bool) -> None:
        """Wait for an engine to ask next. Raises Refusal if there is none, or none could go on.

        Args:
            has_more: the engine that is gone had brought something.
        """
        is_gone = await self._is_engine_gone()
        if self._path in NEVER_WAIT:
            self._refuse_what_cannot_wait()
            raise Refusal(503, UNAVAILABLE, str(error), RETRY_AFTER_S)
        if not isinstance(error, UnreachableError):
            self._setbacks = 1 if has_more else self._setbacks + 1
        if not is_gone:
            await asyncio.sleep(RECONNECT_S)
        if self._setbacks == MOST_SETBACKS:
            text = f"{MOST_SETBACKS} engines in a row have ended while they computed this request"
            raise Refusal(500, INTERNAL, text)
        await self._wait_for_engine()
        if not self._answer.is_begun:
            return
        if self._generation is None or not self._generation.stream.can_go_on:
            text = "the engine was lost, and the rest of this stream with it; ask again"
            raise Refusal(503, UNAVAILABLE, text)
        self._body = self._generation.rest()
        self.times_resumed += 1

    async def _wait_for_engine(self) -> None:
        while self._agent.down is not None:
            if not self._agent.waits_for_s:
                raise self._unavailable()
            await self._agent.change(self._agent.waits_for_s)


def _deadline_of(request: Request, most: float | None) -> float | None:
    """Seconds that a request may take: its client's wish, within what the head allows."""
    text = request.header(DEADLINE_HEADER)
    if text is None:
        return most
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 < seconds < math.inf:
            return min(seconds, most or seconds)
    raise Refusal(400, "BadRequestError", f"{DEADLINE_HEADER.decode()}: expected seconds")


def _is_stream(headers: Headers) -> bool:
    return any(name == b"transfer-encoding" for name, _ in headers)


def _error_in(body: bytes) -> bytes:
    """The error of an answer in OpenAI's form, as JSON."""
    try:
        return bytes(msgspec.json.decode(body, type=dict[str, msgspec.Raw])["error"])
    except (msgspec.DecodeError, KeyError):
        return msgspec.json.encode({"message": body[:1000].decode(errors="replace")})
