"""The web server against connections that are silent, endless, too many or no HTTP at all."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from starlette.types import Receive, Scope, Send

from app.api.http.server import make_server
from app.core.settings import EdgeSettings, Settings
from tests.support.waiting import wait_until

Answer = tuple[int, dict[str, str], dict[str, dict[str, object]]]
GOOD = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


async def answers_ok(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that reads its request and says so."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


@contextmanager
def serving(edge: EdgeSettings) -> Iterator[int]:
    """The port of a server with these limits."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = make_server(answers_ok, Settings(edge=edge))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started, seconds=20)
    yield int(listener.getsockname()[1])
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(EdgeSettings(header_seconds=1.0, connections_per_address=20, connections=30)) as port:
        yield port


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(source, 0))


def read_answer(connection: socket.socket) -> Answer:
    reply = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    lines = head.decode("ascii").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, json.loads(body)


def ask(port: int, request: bytes, source: str = "127.0.0.1") -> Answer:
    with connect(port, source) as connection:
        connection.sendall(request)
        return read_answer(connection)


def check_refusal(answer: Answer, status: int, code: str) -> None:
    """The one shape that every error has, also where no request was ever made of the bytes."""
    assert answer[0] == status
    assert answer[1]["content-type"] == "application/json"
    assert answer[1]["x-request-id"].startswith("req_")
    assert set(answer[2]["error"]) == {"message", "type", "param", "code"}
    assert answer[2]["error"]["code"] == code


@pytest.mark.parametrize(
    "headers",
    [
        b"X: " + b"y" * 40_000,
        b"".join(b"X%d: y\r\n" % number for number in range(5000)),
        b"Y: 1\r\n" * 101,
        b"Z" * 40_000 + b": 1",
    ],
    ids=["long value", "many bytes", "many lines", "long name"],
)
def test_a_large_header_block_is_refused(port: int, headers: bytes) -> None:
    """S4: bytes and lines of a header block are counted while they come."""
    check_refusal(ask(port, b"GET / HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n\r\n"), 431, "headers_too_large")
    assert ask(port, GOOD)[0] == 200


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET / HTTP/1.1\r\nX: ",
        b"GET /",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nTrailer: ",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;",
    ],
    ids=["value", "url", "trailer", "chunk extension"],
)
def test_what_never_ends_is_cut_off(port: int, beginning: bytes) -> None:
    """S4: a name, value or line without an end is not gathered for as long as somebody sends it."""
    sent = 0
    with connect(port) as connection:
        connection.sendall(beginning)
        with pytest.raises(OSError):
            for _ in range(100_000):
                sent += connection.send(b"y" * 65536)
    assert sent < 2**26


@pytest.mark.parametrize("beginning", [b"", b"GET / HTT", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\r\n", GOOD[:-25]])
def test_headers_that_do_not_come_end_the_connection(port: int, beginning: bytes) -> None:
    """S4: ten seconds (one here) for the headers, also for a connection that never says a word."""
    with connect(port) as connection:
        started = time.monotonic()
        connection.sendall(beginning)
        assert connection.recv(1000) == b""
        assert 0.5 < time.monotonic() - started < 10


def test_dripping_headers_are_no_excuse(port: int) -> None:
    """S4: the time runs from the first byte, whatever follows it; on a connection's second request, too."""
    with connect(port) as connection:
        connection.sendall(GOOD.replace(b"Connection: close\r\n", b""))
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        connection.settimeout(0.1)
        ended = False
        while not ended and time.monotonic() - started < 15:
            try:
                connection.send(b"G" if time.monotonic() - started < 0.05 else b"\r")
                ended = connection.recv(10) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
    ids=["TLS hello", "smuggling", "bad chunk", "bad length", "bad header", "no url", "nonsense"],
)
def test_bad_http_is_answered_in_the_envelope(port: int, request_bytes: bytes) -> None:
    """S4: every error body on every path has one shape, the parser's own among them."""
    check_refusal(ask(port, request_bytes), 400, "invalid_request_body")


def test_nonsense_behind_a_request_does_not_spoil_its_answer(port: int) -> None:
    """S4: more bytes than Content-Length says are a second request, and a bad one; the first is answered."""
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}\x00\x00\x00\r\n\r\n")
        first = b"".join(iter(lambda: connection.recv(65536), b""))
    assert first.startswith(b"HTTP/1.1 200")


def test_silent_connections_of_one_address_do_not_lock_out_another(port: int) -> None:
    """S4: connections are counted for each address and in all; who has too many is told so."""
    with ExitStack() as held:
        for _ in range(20):
            held.enter_context(connect(port)).sendall(b"GET / HTTP/1.1\r\n")
        wait_until(lambda: ask(port, GOOD)[0] == 503, seconds=5)
        check_refusal(ask(port, GOOD), 503, "overloaded")
        assert ask(port, GOOD, source="127.0.0.2")[0] == 200
    wait_until(lambda: ask(port, GOOD)[0] == 200, seconds=10)


def test_connections_have_a_limit_in_all() -> None:
    """S4: many addresses together do not get more than the process has files for."""
    with serving(EdgeSettings(connections=8)) as port, ExitStack() as held:
        for number in range(8):
            held.enter_context(connect(port, f"127.0.0.{2 + number}"))
        wait_until(lambda: ask(port, GOOD)[0] == 503, seconds=5)
        check_refusal(ask(port, GOOD), 503, "overloaded")
