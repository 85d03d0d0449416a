"""Work ahead of the annotator, in small steps that give way to requests.

Concurrency: each step is a background turn of :class:`lib.turns.Turns`. So a request waits for one step at most, and a
step that is due waits for as long as requests follow one another. The background thread is a daemon, started by the
first image it is given and ended by ``stop`` or with the process.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from lib.priority import BACKGROUND, give_way
from lib.turns import Turns
from medvl_sam2.errors import MedVLError

logger = logging.getLogger(__name__)

MOST_WAITING = 4
"""Images that wait to be prepared; of more, the ones asked for first are forgotten."""


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
        give_way(BACKGROUND)
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
