"""When to retrain without being asked: after every N submitted labels, or by a cron expression.

All memory is one small JSON file, so a schedule survives a restart: labels counted so far, and up to which moment the
cron expression has been honoured. Runs missed while the server was down happen once, at the next start. Nothing runs
before :meth:`RetrainSchedule.start`.

Concurrency. :meth:`RetrainSchedule.check` is the only place that starts a training. It may be called at any moment
from any thread or server worker: a file lock lets one caller through, the others go away. The state file has its own
lock, held only to read and replace the file, so :meth:`label_saved` never waits for a training to start. Lock order:
attempt, then state.

apscheduler only wakes :meth:`check`; a check that comes once too often does nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.combining import OrTrigger
from apscheduler.triggers.cron import CronTrigger
from filelock import FileLock, Timeout

from medvl_sam2.errors import ConfigError
from medvl_sam2.files import write_json_atomically

logger = logging.getLogger(__name__)

_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_RETRY_JOB = "retrain-retry"
_CRON_JOB = "retrain-cron"
_SOON_JOB = "retrain-soon"


@dataclass(frozen=True)
class RetrainConfig:
    """What the operator asked for. Both off means trainings start by hand only."""

    every_labels: int | None = None
    """Train when this many labels were submitted since the last training."""
    cron: str | None = None
    """Five cron fields in the server's local time: minute hour day month weekday (0 and 7 are Sunday)."""
    retry_seconds: float = 60.0
    """How long to wait when a training is already running."""

    @classmethod
    def from_conf(cls, conf: Mapping[str, str]) -> RetrainConfig:
        """Read ``--conf retrain_every_labels N`` and ``--conf retrain_cron "m h d m w"``; empty, 0 and off are off.

        Raises:
            ConfigError: a value cannot be understood; the message says what can.
        """
        off = ("", "0", "off", "none", "false")
        count = str(conf.get("retrain_every_labels", "")).strip().lower()
        cron = str(conf.get("retrain_cron", "")).strip()
        every = None
        if count not in off:
            if not count.isdigit():
                raise ConfigError(f"retrain_every_labels {count!r} must be a whole number of labels, for example 5")
            every = int(count)
        config = cls(every_labels=every, cron=None if cron.lower() in off else cron)
        if config.cron is not None:
            cron_trigger(config.cron)
        return config

    @property
    def enabled(self) -> bool:
        """True when anything but a training by hand was asked for."""
        return self.every_labels is not None or self.cron is not None


def cron_trigger(expression: str, timezone: object = None) -> BaseTrigger:
    """Trigger of a five-field cron expression with cron's own meaning of weekdays.

    apscheduler counts weekdays from Monday and wants day **and** weekday to match; cron counts from Sunday and, when
    both are restricted, runs when **either** matches.

    Raises:
        ConfigError: the expression is not five valid fields, or never comes true.
    """
    fields = expression.split()
    hint = 'for example "0 2 * * *" for two o\'clock every night (minute hour day month weekday)'
    if len(fields) != 5:
        raise ConfigError(f"retrain_cron {expression!r} has {len(fields)} fields, not 5; {hint}")
    minute, hour, day, month, weekday = fields
    common = {"minute": minute, "hour": hour, "month": month, "timezone": timezone}
    try:
        weekday = _weekday_names(weekday)
        if day != "*" and weekday != "*":
            either: list[BaseTrigger] = [CronTrigger(day=day, **common), CronTrigger(day_of_week=weekday, **common)]
            trigger: BaseTrigger = OrTrigger(either)
        else:
            trigger = CronTrigger(day=day, day_of_week=weekday, **common)
        if trigger.get_next_fire_time(None, datetime.now(UTC)) is None:
            raise ValueError("no such date ever comes")
    except (ValueError, KeyError) as error:
        raise ConfigError(f"retrain_cron {expression!r} is no cron expression ({error}); {hint}") from error
    return trigger


def _weekday_names(field: str) -> str:
    """Cron weekday field (numbers from Sunday = 0 or 7, or names, ranges, steps) as a list of names, or ``*``."""
    if field == "*":
        return field
    chosen: set[int] = set()
    for part in field.lower().split(","):
        span, _, step = part.partition("/")
        first, dash, last = span.partition("-")
        if span == "*":
            low, high = 0, 6
        else:
            low = _weekday_number(first)
            # Cron reads a step after a single day as "from that day on".
            high = _weekday_number(last) if dash else (6 if step else low)
            if high < low:
                high += 7
        if step and (not step.isdigit() or int(step) < 1):
            raise ValueError(f"step {step!r} of the weekday is not a positive number")
        chosen.update(number % 7 for number in range(low, high + 1, int(step or 1)))
    return ",".join(_WEEKDAYS[number] for number in sorted(chosen))


def _weekday_number(text: str) -> int:
    if text in _WEEKDAYS:
        return _WEEKDAYS.index(text)
    if not text.isdigit() or int(text) > 7:
        raise ValueError(f"weekday {text!r} is neither 0..7 nor one of {', '.join(_WEEKDAYS)}")
    return int(text)


@dataclass(frozen=True)
class RetrainState:
    """What the state file holds."""

    labels: int = 0
    """Labels submitted since the last training started."""
    pending: bool = False
    """A training is due but could not start yet."""
    cron: str | None = None
    """The expression that ``honoured`` belongs to."""
    honoured: str | None = None
    """UTC, ISO 8601: every run due up to here has been honoured."""
    last_start: str | None = None
    """UTC, ISO 8601: the last start of a training."""


class RetrainSchedule:
    """Decides when ``start_training`` is called.

    ``start_training`` returns True when a training began and False when one is already running; it must return
    quickly. ``clock`` returns aware datetimes.
    """

    def __init__(
        self,
        config: RetrainConfig,
        state_path: Path,
        start_training: Callable[[], bool],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._config = config
        self._path = Path(state_path)
        self._start_training = start_training
        self._clock = clock
        self._trigger = None if config.cron is None else cron_trigger(config.cron)
        self._scheduler: BackgroundScheduler | None = None

    @property
    def config(self) -> RetrainConfig:
        """What the operator asked for."""
        return self._config

    def next_cron(self) -> datetime | None:
        """When the cron expression comes true next; None without one."""
        return None if self._trigger is None else self._trigger.get_next_fire_time(None, self._clock())

    def start(self) -> None:
        """Begin to watch; does nothing when neither trigger is configured or it runs already."""
        if self._scheduler is not None or not self._config.enabled:
            return
        self._read_or_repair()
        scheduler = BackgroundScheduler(timezone=UTC)
        options = {"coalesce": True, "misfire_grace_time": None, "max_instances": 1, "replace_existing": True}
        scheduler.add_job(self.check, "interval", seconds=self._config.retry_seconds, id=_RETRY_JOB, **options)
        if self._trigger is not None:
            scheduler.add_job(self.check, self._trigger, id=_CRON_JOB, **options)
        scheduler.add_job(self.check, id=_SOON_JOB, **options)
        scheduler.start()
        self._scheduler = scheduler
        logger.info(
            "retraining after %s labels, cron %s", self._config.every_labels or "no", self._config.cron or "off"
        )

    def shutdown(self) -> None:
        """Stop watching; a check in progress ends first. May be called at any time, also twice."""
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.shutdown(wait=True)

    def label_saved(self) -> int:
        """Count one submitted label; returns the count since the last training. Quick: safe on the event loop.

        A training that is due starts at once, or at the next retry when a check happens to be in progress.
        """
        with self._locked() as state:
            state = dataclasses.replace(state, labels=state.labels + 1)
            self._write(state)
        if self._scheduler is not None and self._labels_due(state):
            self._scheduler.add_job(
                self.check, id=_SOON_JOB, coalesce=True, misfire_grace_time=None, max_instances=1, replace_existing=True
            )
        return state.labels

    def training_started(self) -> None:
        """Tell that a training was started by hand: it uses every label submitted so far."""
        with self._locked() as state:
            self._write(
                dataclasses.replace(
                    state, labels=0, pending=False, last_start=self._clock().astimezone(UTC).isoformat()
                )
            )

    def state(self) -> RetrainState:
        """A snapshot of the state file."""
        with self._locked() as state:
            return state

    def check(self) -> bool:
        """Start a training if one is due; True when one began. Failures are logged and retried."""
        attempt = FileLock(self._path.with_name(self._path.name + ".attempt.lock"))
        try:
            attempt.acquire(timeout=0)
        except Timeout:
            return False
        try:
            state = self._due()
            if not state.pending:
                return False
            if not self._try_start():
                return False
            with self._locked() as latest:
                # Labels that arrived while the training was starting count for the next one.
                remaining = max(0, latest.labels - state.labels)
                started = self._clock().astimezone(UTC).isoformat()
                self._write(dataclasses.replace(latest, labels=remaining, pending=False, last_start=started))
            return True
        finally:
            attempt.release()

    def _try_start(self) -> bool:
        try:
            started = self._start_training()
        except Exception:
            # Whatever failed, the schedule must live on and try again.
            logger.exception("retraining could not be started; next try in %.0f s", self._config.retry_seconds)
            return False
        if not started:
            logger.info("a training is running already; next try in %.0f s", self._config.retry_seconds)
        return started

    def _labels_due(self, state: RetrainState) -> bool:
        return self._config.every_labels is not None and state.labels >= self._config.every_labels

    def _due(self) -> RetrainState:
        """Move the cron reference up to now and note in ``pending`` whether a training is due."""
        now = self._clock().astimezone(UTC)
        with self._locked() as state:
            pending = state.pending or self._labels_due(state)
            honoured = state.honoured
            if self._trigger is not None:
                if state.cron != self._config.cron or honoured is None:
                    # A new expression owes nothing for the time before it was set.
                    honoured = now.isoformat()
                else:
                    # Strictly later: a run at the honoured moment itself has happened.
                    after = datetime.fromisoformat(honoured) + timedelta(microseconds=1)
                    due = self._trigger.get_next_fire_time(None, after)
                    if due is not None and due <= now:
                        pending, honoured = True, now.isoformat()
            updated = dataclasses.replace(state, pending=pending, cron=self._config.cron, honoured=honoured)
            if updated != state:
                self._write(updated)
        return updated

    @contextmanager
    def _locked(self) -> Iterator[RetrainState]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path.with_name(self._path.name + ".lock")):
            yield self._read()

    def _read(self) -> RetrainState:
        if not self._path.exists():
            return RetrainState()
        try:
            return _parsed(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{self._path} is damaged ({error}); delete it to count labels from zero again"
            ) from error

    def _read_or_repair(self) -> None:
        """At start a damaged state file is set aside: losing a count must not keep a server from starting."""
        try:
            with self._locked():
                pass
        except ConfigError as error:
            aside = self._path.with_name(self._path.name + ".damaged")
            self._path.replace(aside)
            logger.warning("%s; it was moved to %s", error, aside.name)

    def _write(self, state: RetrainState) -> None:
        # Annotators wait for it at every save; a count of a moment ago, after a power cut, does no harm.
        write_json_atomically(self._path, dataclasses.asdict(state), sync_folder=False)


def _parsed(text: str) -> RetrainState:
    data = json.loads(text)
    if not isinstance(data, dict):
        raise TypeError("not a JSON object")
    state = RetrainState(**data)
    if not isinstance(state.labels, int) or isinstance(state.labels, bool) or state.labels < 0:
        raise ValueError(f"labels is {state.labels!r}")
    if state.honoured is not None and datetime.fromisoformat(state.honoured).tzinfo is None:
        raise ValueError(f"honoured {state.honoured!r} lacks a time zone")
    return state
