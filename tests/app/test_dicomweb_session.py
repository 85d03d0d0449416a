"""A server that closes a kept connection when the next question is already on its way, as Orthanc can."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import requests

from lib.dicomweb_session import TimedSession


@dataclass
class _Closing:
    """Answers the first question of each connection and closes it at the second; ``rude``: at the first already.

    ``slow``: half of the first answer, and then silence.
    """

    rude: bool = False
    slow: bool = False
    questions: list[str] = field(default_factory=list)
    connections: int = 0

    def serve(self, listening: socket.socket) -> None:
        with suppress(OSError):  # it was closed: the test is over
            while True:
                connection, _ = listening.accept()
                self.connections += 1
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            if self._heard(connection) and not self.rude:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + (b"[" if self.slow else b"[]"))
                self._heard(connection)

    def _heard(self, connection: socket.socket) -> bytes:
        text = connection.recv(65536)
        if text:
            self.questions.append(text.partition(b" ")[0].decode())
        return text


@pytest.fixture
def closing() -> Iterator[tuple[str, _Closing]]:
    server = _Closing()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=server.serve, args=(listening,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
        listening.shutdown(socket.SHUT_RDWR)


def test_what_a_closed_connection_swallowed_is_asked_again(closing: tuple[str, _Closing]) -> None:
    url, server = closing
    with TimedSession() as session:
        for _ in range(3):
            assert session.get(url, timeout=30).json() == []
    assert server.questions == ["GET"] * 5, "the second and third were asked twice"
    assert server.connections == 3


def test_a_server_that_closes_every_connection_is_an_error(closing: tuple[str, _Closing]) -> None:
    url, server = closing
    server.rude = True
    with TimedSession() as session, pytest.raises(requests.ConnectionError):
        session.get(url, timeout=30)
    assert server.questions == ["GET"] * 3


def test_a_server_that_falls_silent_amid_its_answer_is_not_asked_again(closing: tuple[str, _Closing]) -> None:
    url, server = closing
    server.slow = True
    with TimedSession() as session, pytest.raises(requests.ConnectionError, match="Read timed out"):
        session.get(url, timeout=0.2)
    assert server.questions == ["GET"]


def test_what_is_stored_is_sent_once(closing: tuple[str, _Closing]) -> None:
    url, server = closing
    with TimedSession() as session:
        assert session.get(url, timeout=30).json() == []
        with pytest.raises(requests.ConnectionError):
            session.post(url, timeout=30)
    assert server.questions == ["GET", "POST"]
