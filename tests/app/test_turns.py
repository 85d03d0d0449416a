"""Turns come in the order of arrival, short work passes long work within bounds, and nobody starves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.conftest import Running, write_phantom
from app.fakes import FakePredictor
from lib.configs.medvl_sam2 import AppConfig
from lib.runtime import Runtime
from lib.turns import MOST_PASSED, Turns, Waiting


class Crowd:
    """Threads that come one after the other while somebody has the turn; ``order`` is that of their turns."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.order = turns, []
        self._threads: list[threading.Thread] = []

    def come(self, client: str, what: str = "", short: Callable[[], bool] = lambda: False) -> None:
        """Queue a request; returns once it waits."""
        before = len(self.turns.waiting())

        def work() -> None:
            with self.turns.foreground(client, "ct.nii.gz", what, short):
                self.order.append((client, what))

        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()
        while len(self.turns.waiting()) == before:
            time.sleep(0.001)

    def done(self) -> list[tuple[str, str]]:
        """Wait for all of them."""
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        return self.order


def test_turns_come_in_order() -> None:
    turns = Turns()
    crowd = Crowd(turns)
    with turns.foreground("first"):
        for n in range(40):
            crowd.come(str(n))
    assert crowd.done() == [(str(n), "") for n in range(40)]


def test_short_work_passes_long_work_of_others_but_not_for_ever() -> None:
    turns = Turns()
    crowd = Crowd(turns)
    with turns.foreground("first"):
        crowd.come("a", "long")
        crowd.come("b", "long")
        for n in range(MOST_PASSED + 3):
            crowd.come(str(n), "short", lambda: True)
    order = crowd.done()
    assert order[:MOST_PASSED] == [(str(n), "short") for n in range(MOST_PASSED)]
    assert order[MOST_PASSED : MOST_PASSED + 2] == [("a", "long"), ("b", "long")]
    assert len(order) == MOST_PASSED + 5


def test_a_clients_own_requests_keep_their_order() -> None:
    turns = Turns()
    crowd = Crowd(turns)
    with turns.foreground("first"):
        crowd.come("a", "box")
        crowd.come("a", "click", lambda: True)
        crowd.come("b", "click", lambda: True)
    assert crowd.done() == [("b", "click"), ("a", "box"), ("a", "click")]


def test_nobody_starves_in_a_stream_of_short_work() -> None:
    turns, served, over = Turns(), threading.Event(), threading.Event()

    def click(client: str) -> None:
        while not over.is_set():
            with turns.foreground(client, short=lambda: True):
                time.sleep(0.002)

    def box() -> None:
        with turns.foreground("box"):
            served.set()

    threads = [threading.Thread(target=click, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    last = threading.Thread(target=box)
    last.start()
    assert served.wait(5)
    over.set()
    for thread in (*threads, last):
        thread.join(5)


def test_a_step_of_preparation_never_goes_before_a_request() -> None:
    turns, stopped = Turns(), threading.Event()
    crowd = Crowd(turns)

    def prepare() -> None:
        with turns.background(stopped):
            crowd.order.append(("preparation", ""))

    thread = threading.Thread(target=prepare)
    with turns.foreground("first"):
        thread.start()
        time.sleep(0.05)
        for n in range(5):
            crowd.come(str(n))
    assert crowd.done()[:5] == [(str(n), "") for n in range(5)]
    thread.join(5)
    assert crowd.order[5:] == [("preparation", "")]


def test_a_request_that_fails_or_gives_up_leaves_no_trace() -> None:
    turns = Turns()

    def broken() -> bool:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), turns.foreground(short=broken):
        pass
    with pytest.raises(KeyError), turns.foreground("a"):
        raise KeyError("work")
    assert turns.waiting() == ()
    with turns.foreground("b"):
        pass


def test_who_waits_and_who_runs_is_told_without_a_turn(tmp_path: Path) -> None:
    runtime = Runtime(AppConfig(store=tmp_path, prepare=False), lambda _: FakePredictor())  # type: ignore[arg-type, return-value]
    image = write_phantom(tmp_path / "case.nii.gz")
    assert runtime.waiting() == ()
    with runtime.use(image, "a", what="medvl_report"):
        thread = threading.Thread(target=lambda: runtime.forget(image, "b"))
        thread.start()
        while len(runtime.waiting()) < 2:
            time.sleep(0.001)
        running, queued = runtime.waiting()
    thread.join(5)
    assert running == Waiting("a", "case.nii.gz", "medvl_report", running.seconds, True)
    assert (queued.client, queued.what, queued.running) == ("b", "close", False)
    assert 0 <= queued.seconds <= running.seconds < 60
    assert runtime.waiting() == ()


def test_a_next_click_goes_before_others_first_ones(running: Running) -> None:
    def click(client: str, **more: object) -> None:
        assert running.slicer("medvl_interactive", client_id=client, foreground=[[1, 2, 3]], **more).status_code == 200

    click("a")
    click("b")
    runtime, threads = running.app.runtime, []
    running.predictors[0].prompts.clear()
    queue = (("new", {}), ("a", {"propagate": True}), ("b", {"background": [[4, 5, 6]]}), ("b", {"label": "liver"}))
    with runtime.use(running.studies / "case_b.nii.gz", "holder"):
        for client, more in queue:
            threads.append(threading.Thread(target=click, args=(client,), kwargs=more))
            threads[-1].start()
            while len(runtime.waiting()) < 1 + len(threads):
                time.sleep(0.001)
        waiting = [(item.client, item.what) for item in runtime.waiting()]
    for thread in threads:
        thread.join(10)
    assert waiting == [("holder", ""), *((client, "medvl_interactive") for client, _ in queue)]
    asked = [(name, prompt.propagate, len(prompt.points)) for name, prompt in running.predictors[0].prompts]
    assert asked == [("object", False, 2), ("object", False, 1), ("object", True, 1), ("liver", False, 1)]
