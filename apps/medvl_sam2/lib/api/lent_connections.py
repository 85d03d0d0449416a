"""Connections to the DICOMweb server, each lent to one request until its answer was read to its end.

Only then another request gets it. So the end of an answer that nobody wants any more, in whichever thread and at
whichever moment it comes, is the end of that one alone.

Concurrency: any thread may ask. One thread at a time reads an answer; another may close it meanwhile.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.cookiejar import DefaultCookiePolicy
from queue import Empty, Full, LifoQueue
from typing import IO, Any

import requests
from requests.adapters import HTTPAdapter

_MOST_KEPT = 32
"""Open connections that wait for a request."""


class Answer:
    """Status and headers of an answer whose body is not read yet; to be closed once, however much of it was read."""

    def __init__(self, response: requests.Response, lent: requests.Session, connections: Connections) -> None:
        self.status_code = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self._response, self._lent, self._connections = response, lent, connections
        self._socket = getattr(response.raw.connection, "sock", None)
        self._whole = False

    def pieces(self, most_bytes: int) -> Iterator[bytes]:
        """The body as it comes, packed if it is."""
        yield from self._response.raw.stream(most_bytes, decode_content=False)
        self._whole = True

    def close(self) -> None:
        """Let others have the connection, or end it amid the answer."""
        if self._whole:
            self._response.close()
            self._connections.give_back(self._lent)
            return
        try:
            # Closing waits for a read in another thread, so that is ended first. RuntimeError and ValueError: it has
            # just come to its end. OSError: the server was quicker.
            with suppress(RuntimeError, ValueError, OSError):
                if self._socket is not None:  # both ways: urllib3 may leave it open until it is garbage
                    self._socket.shutdown(socket.SHUT_RDWR)
                else:  # a connection for this answer alone
                    self._response.raw.shutdown()
        finally:
            self._response.close()
            self._lent.close()


class Connections:
    """One ``requests`` session a connection. They keep nothing else: cookies are refused."""

    def __init__(self) -> None:
        self._kept: LifoQueue[requests.Session] = LifoQueue(_MOST_KEPT)

    def request(self, method: str, url: str, data: IO[bytes] | None = None, **how: Any) -> Answer:
        """Ask; ``how`` as ``requests`` takes it.

        A server may end a kept connection just when a request is sent over it, which shows as a failure only. So what
        can be asked twice is asked again over a new connection, and what cannot always gets one.

        Raises:
            requests.RequestException: the server cannot be reached or does not answer.
        """
        kept = self._take() if method == "GET" else None
        if kept is not None:
            try:
                return self._asked(kept, method, url, **how)
            except requests.Timeout:
                raise
            except requests.ConnectionError:
                pass
        return self._asked(_session(), method, url, data=data, **how)

    def give_back(self, lent: requests.Session) -> None:
        """Keep a session whose connection nobody reads from any more."""
        try:
            self._kept.put_nowait(lent)
        except Full:
            lent.close()

    def _take(self) -> requests.Session | None:
        try:
            return self._kept.get_nowait()
        except Empty:
            return None

    def _asked(self, session: requests.Session, method: str, url: str, **how: Any) -> Answer:
        try:
            return Answer(session.request(method, url, stream=True, **how), session, self)
        except BaseException:
            session.close()
            raise


def _session() -> requests.Session:
    session = requests.Session()
    session.headers.clear()
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=1))
    return session
