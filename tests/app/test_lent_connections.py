"""Connections to a DICOMweb server: whose they are, and what becomes of a request over one that the server ended."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import requests

from app.small_server import serving
from lib.api.lent_connections import Answer, Connections

_LIMITS_S = (5.0, 20.0)
_BODY = bytes(range(256)) * 400


class _Server(BaseHTTPRequestHandler):
    """Notes which connection (its port) brought which request; ``/over`` ends it without an answer ``over`` times."""

    protocol_version = "HTTP/1.1"
    heard: list[tuple[int, str]]
    over = 0

    def do_GET(self) -> None:
        self.heard.append((self.client_address[1], f"{self.command} {self.path}"))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/over" and self.over > 0:
            _Server.over -= 1
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(_BODY)))
        self.end_headers()
        with suppress(OSError):  # the client left
            self.wfile.write(_BODY)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_Server, "heard", [], raising=False)
    monkeypatch.setattr(_Server, "over", 0)
    with serving(_Server) as address:
        yield address


def ask(connections: Connections, url: str, method: str = "GET") -> Answer:
    return connections.request(method, url, timeout=_LIMITS_S)


def whole(answer: Answer) -> bytes:
    body = b"".join(answer.pieces(64 * 1024))
    answer.close()
    return body


def heard_over() -> list[int]:
    """Of each request, the first one that came over its connection."""
    ports = [port for port, _ in _Server.heard]
    return [ports.index(port) for port in ports]


def test_a_connection_serves_again_when_its_answer_was_read_to_its_end(url: str) -> None:
    connections = Connections()
    assert [whole(ask(connections, f"{url}/{n}")) for n in range(3)] == [_BODY] * 3
    assert heard_over() == [0, 0, 0]


def test_whoever_leaves_ends_no_answer_of_another(url: str) -> None:
    """Also one who leaves when all has arrived and nobody has noticed yet: urllib3 has the connection back by then."""
    connections = Connections()
    left = ask(connections, f"{url}/left")
    assert next(left.pieces(2 * len(_BODY))) == _BODY
    other = ask(connections, f"{url}/other")
    left.close()
    assert whole(other) == _BODY
    assert heard_over() == [0, 1]
    following = [ask(connections, f"{url}/{n}") for n in range(2)]
    assert [whole(one) for one in following] == [_BODY] * 2
    assert heard_over() == [0, 1, 1, 3]  # the one that was left serves nobody


def test_many_leave_while_others_read_to_the_end(url: str) -> None:
    connections = Connections()

    def leave(number: int) -> None:
        answer = ask(connections, f"{url}/left/{number}")
        with ThreadPoolExecutor(1) as reader:  # closed by another thread than reads, at any moment
            reading = reader.submit(lambda: list(answer.pieces(1 + number * 997)))
            answer.close()
            reading.exception()

    with ThreadPoolExecutor(8) as clients:
        leaving = [clients.submit(leave, number) for number in range(100)]
        reading = [clients.submit(lambda n: whole(ask(connections, f"{url}/{n}")), n) for n in range(100)]
    assert [one.result() for one in reading] == [_BODY] * 100
    assert [one.result() for one in leaving] == [None] * 100


@pytest.mark.parametrize("times", [1, 2])
def test_a_request_over_a_connection_that_the_server_has_just_ended_is_sent_again(url: str, times: int) -> None:
    """Once, over a new one: a server that ends that one too does not answer."""
    connections = Connections()
    whole(ask(connections, f"{url}/first"))
    _Server.over = times
    if times == 1:
        assert whole(ask(connections, f"{url}/over")) == _BODY
    else:
        with pytest.raises(requests.ConnectionError):
            ask(connections, f"{url}/over")
    assert heard_over() == [0, 0, 2]


def test_what_is_stored_is_sent_once_over_a_connection_of_its_own(url: str) -> None:
    connections = Connections()
    whole(ask(connections, f"{url}/first"))
    assert whole(ask(connections, f"{url}/stored", "POST")) == _BODY
    assert heard_over() == [0, 1]
    _Server.over = 1
    with pytest.raises(requests.ConnectionError):
        ask(connections, f"{url}/over", "POST")
    assert len(_Server.heard) == 3


def test_a_server_that_is_silent_is_not_asked_twice() -> None:
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                asked.append(connection.recv(9999))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                asked.append(connection.recv(9999))
                assert connection.recv(1) == b""  # it gave up

        serving = pool.submit(serve)
        connections, url = Connections(), f"http://127.0.0.1:{server.getsockname()[1]}/"
        whole(connections.request("GET", url, timeout=(5.0, 5.0)))
        with pytest.raises(requests.ReadTimeout):
            connections.request("GET", url, timeout=(5.0, 0.2))
        serving.result(10)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert len(asked) == 2
