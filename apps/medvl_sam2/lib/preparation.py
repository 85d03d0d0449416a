"""Work ahead of the annotator, in small steps that give way to requests.

Concurrency: everything that uses the predictor or a session happens under the one lock of :class:`Turns`. A request
takes it with ``foreground`` and is counted from its arrival to its end; background work takes it with ``background``
for one step at a time, and only while no request is counted. So a request waits for one step at most, and a step that
is due waits for as long as requests follow one another. The background thread is a daemon, started by the first image
it is given and ended by ``stop`` or with the process.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medvl_sam2.errors import MedVLError

logger = logging.getLogger(__name__)

MOST_WAITING = 4
"""Images that wait to be prepared; of more, the ones asked for first are forgotten."""


class Turns:
    """A lock that requests take at once and background steps only in between."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._quiet = threading.Condition()
        self._requests = 0

    @contextmanager
    def foreground(self) -> Iterator[None]:
        """Hold the lock for a request; the same thread may take it again."""
        with self._quiet:
            self._requests += 1
        try:
            with self._lock:
                yield
        finally:
            with self._quiet:
                self._requests -= 1
                self._quiet.notify_all()

    @contextmanager
    def background(self, stopped: threading.Event) -> Iterator[bool]:
        """Hold the lock for one step once no request is there; False when ``stopped`` came first."""
        with self._quiet:
            while self._requests and not stopped.is_set():
                self._quiet.wait(timeout=0.5)
        with self._lock:
            yield not stopped.is_set()


class Preparation:
    """A thread that runs ``steps(image)`` for the images it is given, newest first, one step at a turn."""

    def __init__(self, turns: Turns, steps: Callable[[Path], Iterator[None]]) -> None:
        self._turns, self._steps = turns, steps
        self._images: list[Path] = []
        self._change = threading.Condition()
        self._busy = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def ask(self, image: Path) -> None:
        """Prepare an image soon."""
        with self._change:
            if self._stopped.is_set():
                return
            self._images = [*(other for other in self._images if other != image), image][-MOST_WAITING:]
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="preparation", daemon=True)
                self._thread.start()
                atexit.register(self.stop)
            self._change.notify_all()

    def idle(self, timeout: float) -> bool:
        """Wait until nothing is left to prepare; False when ``timeout`` seconds were not enough."""
        with self._change:
            return self._change.wait_for(lambda: not self._images and not self._busy, timeout)

    def stop(self) -> None:
        """End the thread after its present step; nothing is prepared afterwards."""
        with self._change:
            self._stopped.set()
            self._change.notify_all()
        if self._thread is not None:
            atexit.unregister(self.stop)
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._change:
                self._busy = False
                self._change.notify_all()
                self._change.wait_for(lambda: self._images or self._stopped.is_set())
                if self._stopped.is_set():
                    return
                image = self._images.pop()
                self._busy = True
            try:
                self._prepare(image)
            except (MedVLError, OSError) as error:
                logger.info("%s is not prepared: %s", image.name, error)  # whoever opens it is told
            except Exception:
                logger.exception("%s cannot be prepared", image.name)

    def _prepare(self, image: Path) -> None:
        steps, more = self._steps(image), True
        while more:
            with self._turns.background(self._stopped) as on:
                more = on and next(steps, self) is not self
