"""HTTP as clients may write it, well and badly."""

import asyncio
import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molink.gateway import connection

from .conftest import Asked, Served


@pytest.fixture
def echoing(served: Served) -> Served:
    async def script(asked: Asked) -> None:
        await asked.whole(200, asked.first.encode() + b"|" + asked.body)

    served.engine.script = script
    return served


async def test_requests_at_once_are_answered_in_their_order(echoing: Served) -> None:
    requests = [b"POST /%d HTTP/1.1\r\ncontent-length: 1\r\n\r\n%d" % (i, i) for i in range(8)]
    requests.append(b"GET /last HTTP/1.1\r\nconnection: close\r\n\r\n")
    said = await echoing.raw(b"".join(requests))
    places = [said.index(b"POST /%d HTTP/1.1|%d" % (i, i)) for i in range(8)]
    assert places == sorted(places)
    assert said.endswith(b"GET /last HTTP/1.1|")


async def test_a_body_in_chunks_is_joined(echoing: Served) -> None:
    head = b"POST /x HTTP/1.1\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    said = await echoing.raw(head + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    assert said.endswith(b"POST /x HTTP/1.1|abcde")


async def test_an_old_client_gets_no_chunks(served: Served) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin("text/plain")
        await asked.say(b"one")
        await asked.say(b"two")
        await asked.end()

    served.engine.script = script
    said = await served.raw(b"GET /x HTTP/1.0\r\n\r\n")
    assert said.endswith(b"\r\n\r\nonetwo")
    assert b"chunked" not in said


async def test_the_head_alone(served: Served) -> None:
    served.engine.script = lambda asked: asked.whole(200, b"", "x-a: 1")
    said = await served.raw(b"HEAD /x HTTP/1.1\r\nconnection: close\r\n\r\n")
    assert b"x-a: 1\r\n" in said
    assert said.endswith(b"\r\n\r\n")


async def test_a_client_that_asks_whether_to_go_on(echoing: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", echoing.port)
    writer.write(b"POST /x HTTP/1.1\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"ab")
    assert b" 200 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 13_000 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", 501),
    ],
)
async def test_what_is_not_understood_is_refused(echoing: Served, sent: bytes, status: int) -> None:
    said = await echoing.raw(sent)
    assert said.startswith(b"HTTP/1.1 %d " % status)
    assert b'"error"' in said
    assert echoing.engine.asked == []


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nx: ",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: ",
    ],
)
async def test_a_header_without_an_end_is_not_kept(echoing: Served, head: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", echoing.port)
    writer.write(head)
    with contextlib.suppress(ConnectionError):
        for _ in range(40):
            writer.write(b"a" * 4096)
            await writer.drain()
            await asyncio.sleep(0.001)
        said = await asyncio.wait_for(reader.read(), 5)
        assert said == b"" or said.startswith(b"HTTP/1.1 431 ")
    writer.close()
    assert (await echoing.http.get("/alive")).status_code == 200
    assert echoing.budget.used == 0


async def test_a_client_that_reads_nothing_gets_no_more(
    echoing: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALLED_TIMEOUT_S", 0.5)
    monkeypatch.setattr(type(echoing.agent), "view_json", b"x" * 500_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", echoing.port, limit=1024)
    writer.write(b"GET /cluster HTTP/1.1\r\n\r\n" * 30)
    await asyncio.sleep(1.5)  # the kernel holds some answers, the gateway at most one
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(30 * 500_000)
    writer.close()


async def test_a_client_that_asks_for_too_much_at_once(echoing: Served) -> None:
    ends = asyncio.Event()

    async def script(asked: Asked) -> None:
        await ends.wait()
        await asked.whole(200, b"{}")

    echoing.engine.script = script
    reader, writer = await asyncio.open_connection("127.0.0.1", echoing.port)
    writer.write(b"GET /x HTTP/1.1\r\n\r\n" * (connection.MAX_AHEAD + 2))
    await asyncio.sleep(0.1)
    ends.set()
    said = await asyncio.wait_for(reader.read(), 5)
    assert said.count(b"HTTP/1.1 200") == 1  # the one that was under way
    writer.close()


async def test_a_client_that_asks_ahead_and_goes_is_noticed(served: Served) -> None:
    begun = asyncio.Event()

    async def script(asked: Asked) -> None:
        begun.set()
        await asked.reader.readexactly(1)

    served.engine.script = script
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}" * 3)
    await begun.wait()
    writer.close()
    await asyncio.wait_for(served.engine.gone.wait(), 5)


async def test_a_stranger_is_sent_away_before_his_body_is_read(
    echoing: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(echoing.keys, "_given", {"hash": None})
    said = await echoing.raw(b"POST /v1/x HTTP/1.1\r\ncontent-length: 60000000\r\n\r\nab")
    assert said.startswith(b"HTTP/1.1 401 ")
    assert echoing.budget.used == 0


async def test_bodies_together_are_bounded(
    echoing: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_BODIES", 1000)
    said = await echoing.raw(b"POST /x HTTP/1.1\r\ncontent-length: 2000\r\n\r\n" + bytes(1500))
    assert said.startswith(b"HTTP/1.1 503 ")
    for _ in range(3):
        assert (await echoing.http.post("/x", content=bytes(900))).status_code == 200
    assert echoing.budget.used == 0


async def test_a_body_that_grows_beyond_the_limit(
    echoing: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_BODY", 1000)
    head = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
    said = await echoing.raw(head + b"1f4\r\n" + bytes(500) + b"\r\n1f5\r\n" + bytes(501))
    assert said.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("HEAD_TIMEOUT_S", b"GET / HTTP/1.1\r\nx: "),
        ("QUIET_TIMEOUT_S", b"POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\nab"),
    ],
)
async def test_a_client_that_dawdles_is_sent_away(
    echoing: Served, monkeypatch: pytest.MonkeyPatch, name: str, sent: bytes
) -> None:
    monkeypatch.setattr(connection, name, 0.2)
    assert (await echoing.raw(sent)).startswith(b"HTTP/1.1 408 ")


async def test_idle_connections_are_closed_after_a_while(
    echoing: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_TIMEOUT_S", 0.2)
    assert (await echoing.raw(b"GET /x HTTP/1.1\r\n\r\n")).endswith(b"GET /x HTTP/1.1|")
    assert await echoing.raw(b"") == b""


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.sampled_from(
            [
                b"GET ",
                b"POST ",
                b"/x ",
                b"HTTP/1.1\r\n",
                b"\r\n",
                b"content-length: 3\r\n",
                b"abc",
                b"transfer-encoding: chunked\r\n",
                b"3\r\nabc\r\n",
                b"0\r\n\r\n",
                b"\x00",
                b"\xff\xfe",
                b": ",
            ]
        )
        | st.binary(max_size=8),
        max_size=12,
    )
)
async def test_no_bytes_break_it(echoing: Served, parts: list[bytes]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", echoing.port)
    writer.write(b"".join(parts))
    writer.write_eof()
    async with asyncio.timeout(5):
        await reader.read()
    writer.close()
    answer = await echoing.http.get("/alive")
    assert answer.text == "GET /alive HTTP/1.1|"
