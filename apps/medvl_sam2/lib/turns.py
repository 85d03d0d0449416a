"""Who may use the predictor and the sessions: one at a time, in the order they came.

Concurrency: everything that uses the predictor or a session happens in a turn. A request waits in ``foreground`` and
gets its turn in the order of arrival; but one that is short goes before long ones of other clients, each of which lets
at most :data:`MOST_PASSED` pass, so that nobody starves. A client's own requests never change places. ``background``
work gets a turn for one step at a time, only while no request waits; a request that comes meanwhile waits for that one
step. One condition guards the queue and is held for moments only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

MOST_PASSED = 4
"""Short requests that may go before a long one."""


@dataclass(frozen=True)
class Waiting:
    """A request that waits for its turn or has it."""

    client: str
    image: str
    """Name of the image's file."""
    what: str
    """The model that was asked."""
    seconds: float
    """Since it came."""
    running: bool


@dataclass(eq=False)
class _Ticket:
    client: str
    image: str
    what: str
    short: Callable[[], bool]
    came: float = field(default_factory=time.monotonic)
    passed: int = 0


class Turns:
    """A lock that requests take in order and background steps only in between."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._queue: list[_Ticket] = []
        self._running: _Ticket | None = None
        self._owner: int | None = None
        """Thread that has the turn."""

    @contextmanager
    def foreground(
        self, client: str = "", image: str = "", what: str = "", short: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Hold the turn for a request; the same thread may take it again.

        ``short``: whether it may go before long ones; asked while nobody has the turn, so it may look at what turns
        guard, and must be quick.
        """
        if self._owner == threading.get_ident():
            yield
            return
        ticket = _Ticket(client, image, what, short)
        with self._change:
            self._queue.append(ticket)
            try:
                self._change.wait_for(lambda: self._owner is None and self._next() is ticket)
            except BaseException:
                self._queue.remove(ticket)
                self._change.notify_all()
                raise
            for other in self._queue[: self._queue.index(ticket)]:
                other.passed += 1
            self._queue.remove(ticket)
            self._running, self._owner = ticket, threading.get_ident()
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def background(self, stopped: threading.Event) -> Iterator[bool]:
        """Hold the turn for one step once no request is there; False, and no turn, when ``stopped`` came first."""
        with self._change:
            while not stopped.is_set() and (self._owner is not None or self._queue):
                self._change.wait(timeout=0.5)
            on = not stopped.is_set()
            if on:
                self._owner = threading.get_ident()
        try:
            yield on
        finally:
            if on:
                self._release()

    def waiting(self) -> tuple[Waiting, ...]:
        """The request that has the turn, then those that wait, in the order they came. Never waits for a turn."""
        with self._change:
            now = time.monotonic()
            tickets = [*([self._running] if self._running is not None else []), *self._queue]
            return tuple(
                Waiting(ticket.client, ticket.image, ticket.what, now - ticket.came, ticket is self._running)
                for ticket in tickets
            )

    def _release(self) -> None:
        with self._change:
            self._running = self._owner = None
            self._change.notify_all()

    def _next(self) -> _Ticket:
        """The ticket whose turn is next: the first short one that may go before all in front of it, else the first."""
        ahead: set[str] = set()
        for ticket in self._queue:
            if ticket.client not in ahead and ticket.short():
                return ticket
            if ticket.passed >= MOST_PASSED:
                break
            ahead.add(ticket.client)
        return self._queue[0]
