"""Retraining starts when it should, once, and its schedule survives restarts."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest

from medvl_sam2.errors import ConfigError

LIB = Path(__file__).resolve().parents[2] / "apps" / "medvl_sam2" / "lib"


def load() -> ModuleType:
    """The app's lib folder is no package on sys.path here, so the file is loaded by its place."""
    spec = importlib.util.spec_from_file_location("app_retrain_schedule", LIB / "retrain_schedule.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


schedule = load()
MONDAY = datetime(2024, 1, 1, 12, 0, tzinfo=UTC)


class Clock:
    def __init__(self, now: datetime = MONDAY) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


class Server:
    """Stands for the training side: ``busy`` refuses, ``broken`` raises."""

    def __init__(self) -> None:
        self.starts = 0
        self.busy = False
        self.broken = False
        self.started = threading.Event()

    def __call__(self) -> bool:
        if self.broken:
            raise RuntimeError("no such trainer")
        if self.busy:
            return False
        self.starts += 1
        self.started.set()
        return True


def make(tmp_path: Path, server: Server, clock: Clock | None = None, **config: object) -> schedule.RetrainSchedule:
    return schedule.RetrainSchedule(
        schedule.RetrainConfig(**config), tmp_path / "retrain.json", server, clock or Clock()
    )


def next_local(expression: str, after: datetime, count: int = 3) -> list[datetime]:
    trigger = schedule.cron_trigger(expression, timezone=UTC)
    times: list[datetime] = []
    moment = after
    for _ in range(count):
        moment = trigger.get_next_fire_time(None, moment)
        times.append(moment)
        moment += timedelta(minutes=1)
    return times


def test_conf_values_are_read() -> None:
    config = schedule.RetrainConfig.from_conf({"retrain_every_labels": " 5 ", "retrain_cron": "0 2 * * *"})
    assert (config.every_labels, config.cron, config.enabled) == (5, "0 2 * * *", True)
    for off in ({}, {"retrain_every_labels": "0", "retrain_cron": ""}, {"retrain_every_labels": "off"}):
        assert not schedule.RetrainConfig.from_conf(off).enabled


@pytest.mark.parametrize("value", ["-1", "2.5", "many"])
def test_impossible_label_counts_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=f"{value!r} must be a whole number"):
        schedule.RetrainConfig.from_conf({"retrain_every_labels": value})


@pytest.mark.parametrize(
    "value",
    [
        "* * * *",
        "0 2 * * * *",
        "61 2 * * *",
        "0 2 * * 8",
        "0 2 * * x",
        "0 2 31 2 *",
        "0 2 * * */0",
        "2am",
        "0 2 * * 1-",
    ],
)
def test_impossible_cron_expressions_are_refused_with_an_example(value: str) -> None:
    with pytest.raises(ConfigError, match=r"for example \"0 2 \* \* \*\""):
        schedule.RetrainConfig.from_conf({"retrain_cron": value})


@pytest.mark.parametrize(
    ("expression", "days"),
    [
        ("0 2 * * *", [2, 3, 4]),
        ("0 2 * * 0", [7, 14, 21]),
        ("0 2 * * 7", [7, 14, 21]),
        ("0 2 * * sun", [7, 14, 21]),
        ("0 2 * * 1", [8, 15, 22]),
        ("0 2 * * 6-7", [6, 7, 13]),
        ("0 2 * * 5-1", [5, 6, 7]),
        ("0 2 * * */3", [3, 6, 7]),
        ("0 2 10 * *", [10]),
        ("0 2 10 * 3", [3, 10, 17]),
        ("0 2 4 * 0", [4, 7, 14]),
    ],
)
def test_cron_means_what_cron_means(expression: str, days: list[int]) -> None:
    # 1 January 2024 was a Monday.
    times = next_local(expression, MONDAY, len(days))
    assert [time.day for time in times] == days
    assert all(time.hour == 2 for time in times)


def test_trains_after_every_n_labels(tmp_path: Path) -> None:
    server = Server()
    plan = make(tmp_path, server, every_labels=3)
    for expected in (1, 2):
        assert plan.label_saved() == expected
        assert not plan.check()
    plan.label_saved()
    assert plan.check()
    assert not plan.check()
    assert server.starts == 1
    assert plan.state().labels == 0


def test_the_count_survives_a_restart(tmp_path: Path) -> None:
    server = Server()
    make(tmp_path, server, every_labels=2).label_saved()
    again = make(tmp_path, server, every_labels=2)
    assert again.label_saved() == 2
    assert again.check()
    assert server.starts == 1


def test_a_running_training_delays_the_next_one(tmp_path: Path) -> None:
    server = Server()
    server.busy = True
    plan = make(tmp_path, server, every_labels=1)
    plan.label_saved()
    assert not plan.check()
    server.busy = False
    assert make(tmp_path, server, every_labels=1).check(), "also after a restart"
    assert server.starts == 1


def test_a_failing_start_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.broken = True
    plan = make(tmp_path, server, every_labels=1)
    plan.label_saved()
    assert not plan.check()
    assert "no such trainer" in caplog.text
    server.broken = False
    assert plan.check()


def test_labels_saved_while_a_training_starts_count_for_the_next(tmp_path: Path) -> None:
    plans: list[schedule.RetrainSchedule] = []

    def start() -> bool:
        plans[0].label_saved()
        return True

    plans.append(schedule.RetrainSchedule(schedule.RetrainConfig(every_labels=2), tmp_path / "s.json", start, Clock()))
    plans[0].label_saved()
    plans[0].label_saved()
    assert plans[0].check()
    assert plans[0].state().labels == 1


def test_a_training_by_hand_resets_the_count(tmp_path: Path) -> None:
    server = Server()
    plan = make(tmp_path, server, every_labels=2)
    plan.label_saved()
    plan.training_started()
    plan.label_saved()
    assert not plan.check()
    assert plan.state().last_start == MONDAY.isoformat()


def test_cron_fires_once_each_time(tmp_path: Path) -> None:
    server, clock = Server(), Clock()
    plan = make(tmp_path, server, clock, cron="0 * * * *")
    assert not plan.check(), "nothing is owed for the time before"
    for hour in (1, 2, 3):
        clock.now = MONDAY + timedelta(hours=hour)
        assert plan.check()
        assert not plan.check()
        clock.now += timedelta(minutes=30)
        assert not plan.check()
    assert server.starts == 3


def test_cron_runs_missed_while_down_happen_once(tmp_path: Path) -> None:
    server, clock = Server(), Clock()
    make(tmp_path, server, clock, cron="0 * * * *").check()
    clock.now = MONDAY + timedelta(days=3, minutes=7)
    restarted = make(tmp_path, server, clock, cron="0 * * * *")
    assert restarted.check()
    assert not restarted.check()
    assert server.starts == 1


def test_a_changed_expression_owes_nothing(tmp_path: Path) -> None:
    server, clock = Server(), Clock()
    make(tmp_path, server, clock, cron="0 0 1 1 *").check()
    clock.now = MONDAY + timedelta(days=3)
    assert not make(tmp_path, server, clock, cron="0 * * * *").check()


def test_two_workers_start_one_training(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()
    starts: list[int] = []

    def slow_start() -> bool:
        starts.append(1)
        inside.set()
        leave.wait(10)
        return True

    config = schedule.RetrainConfig(every_labels=1)
    first = schedule.RetrainSchedule(config, tmp_path / "s.json", slow_start, Clock())
    second = schedule.RetrainSchedule(config, tmp_path / "s.json", slow_start, Clock())
    first.label_saved()
    thread = threading.Thread(target=first.check)
    thread.start()
    assert inside.wait(10)
    assert not second.check()
    leave.set()
    thread.join()
    assert not second.check()
    assert len(starts) == 1


def test_nothing_runs_before_start_and_nothing_after_shutdown(tmp_path: Path) -> None:
    server = Server()
    before = threading.active_count()
    plan = make(tmp_path, server, every_labels=1)
    plan.label_saved()
    assert threading.active_count() == before
    assert server.starts == 0
    plan.start()
    plan.start()
    assert server.started.wait(10), "the label submitted before the start is due at once"
    plan.shutdown()
    plan.shutdown()
    assert threading.active_count() == before
    plan.label_saved()
    assert server.starts == 1


def test_a_label_does_not_wait_for_the_retry_interval(tmp_path: Path) -> None:
    server = Server()
    config = schedule.RetrainConfig(every_labels=1, retry_seconds=3600)
    plan = schedule.RetrainSchedule(config, tmp_path / "s.json", server, Clock())
    checked = threading.Event()
    check = plan.check
    plan.check = lambda: (check(), checked.set())[0]
    plan.start()
    try:
        assert checked.wait(10), "the check at start found nothing to do"
        assert server.starts == 0
        plan.label_saved()
        assert server.started.wait(10)
    finally:
        plan.shutdown()


def test_a_pending_training_is_retried_in_the_background(tmp_path: Path) -> None:
    server = Server()
    server.busy = True
    refused = threading.Event()

    def start() -> bool:
        refused.set()
        return server()

    config = schedule.RetrainConfig(every_labels=1, retry_seconds=0.05)
    plan = schedule.RetrainSchedule(config, tmp_path / "s.json", start, Clock())
    plan.label_saved()
    plan.start()
    try:
        assert refused.wait(10)
        server.busy = False
        assert server.started.wait(10)
    finally:
        plan.shutdown()
    assert server.starts == 1


def test_disabled_schedule_starts_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    plan = make(tmp_path, Server())
    plan.start()
    assert threading.active_count() == before
    plan.shutdown()


def test_a_damaged_state_file_does_not_keep_the_server_down(tmp_path: Path) -> None:
    server = Server()
    path = tmp_path / "retrain.json"
    path.write_text('{"labels": -3}')
    plan = make(tmp_path, server, every_labels=1)
    with pytest.raises(ConfigError, match="delete it"):
        plan.label_saved()
    plan.start()
    try:
        assert plan.label_saved() == 1
    finally:
        plan.shutdown()
    assert (tmp_path / "retrain.json.damaged").exists()
    assert set(json.loads(path.read_text())) == {"labels", "pending", "cron", "honoured", "last_start"}
