"""The session the store's DICOMweb client asks with: a server that hangs is given up, one that hung up is asked again.

The client itself does neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import requests
from urllib3.exceptions import ReadTimeoutError

LIMITS_S = (5.0, 120.0)
"""To connect, and between two pieces of an answer."""
BRIEF_S = (2.0, 5.0)
"""The same while somebody waits; together as long as the outbox lets a sender wait."""
_KEPT_TRIES = 2
_limits = ContextVar("_limits", default=LIMITS_S)


@contextmanager
def briefly() -> Iterator[None]:
    """What this thread asks meanwhile, :data:`BRIEF_S` ends: somebody waits, and it can be asked again later."""
    before = _limits.set(BRIEF_S)
    try:
        yield
    finally:
        _limits.reset(before)


def is_brief() -> bool:
    """Whether somebody waits for what this thread asks."""
    return _limits.get() == BRIEF_S


class TimedSession(requests.Session):
    """Raises :class:`requests.Timeout` when the server is silent for too long.

    A server may close a kept connection just as a question is on its way (Orthanc does when one was idle for a second).
    What may be asked twice, GET, is asked again then (RFC 9110 section 9.2.2).
    """

    def request(self, method: str | bytes, url: str | bytes, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs = {"timeout": _limits.get(), **kwargs}
        for _ in range(_KEPT_TRIES if method == "GET" else 0):
            try:
                return super().request(method, url, *args, **kwargs)
            except requests.Timeout:
                raise
            except requests.ConnectionError as error:
                if any(isinstance(cause, ReadTimeoutError) for cause in error.args):  # it fell silent amid its answer
                    raise
                # The next kept connection may be closed too; one that is new is not.
        return super().request(method, url, *args, **kwargs)

    def post(self, url: str | bytes, *args: Any, **kwargs: Any) -> requests.Response:
        """STOW-RS. The reply's content type loses its parameters.

        The client knows none of them, and takes a type it does not know for a reply that says nothing: all is stored.
        """
        reply = super().post(url, *args, **kwargs)
        if "Content-Type" in reply.headers:
            reply.headers["Content-Type"] = reply.headers["Content-Type"].partition(";")[0].strip().lower()
        return reply
