"""One predictor per process, loaded when first asked, and the sessions annotators hold with it.

Concurrency: the predictor, the sessions and everything in this class are used in turns (:mod:`lib.turns`): a model
answers one question at a time, and a session is one annotator's work on one image. A request holds its turn from the
look-up of its session to its answer, so that annotators take turns by whole requests and never see each other's
objects; masks are written and sent after it. A correction of an object that stands in memory takes a moment, so it goes
before others' long work, which lets only a few pass. Preparing an image takes turns by single steps while no request
waits. What sessions on one image share (its array, the global look, encoded slices) never changes once it is made.
Other requests of the server (``/info/``, images, labels) do not wait for a turn.

Weights are looked up anew before every use, so a published version is served without a restart; sessions of the old
weights go with them. What was asked in a session stands in its journal on disk, so it goes on after a restart, with
other weights and after it was dropped to save memory.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lib.changed_box import SentMasks
from lib.configs.medvl_sam2 import AppConfig
from lib.label_versions import Provenance
from lib.preparation import Preparation
from lib.request_parsing import Client
from lib.turns import Turns, Waiting
from medvl_sam2.errors import CheckpointError, MedVLError, PromptError
from medvl_sam2.publishing import read_published
from medvl_sam2.types import Geometry, Prompt, Volume
from medvl_sam2.volume_io import read_geometry, read_volume

if TYPE_CHECKING:
    from medvl_sam2.modeling.compute import Precision
    from medvl_sam2.predictor import Predictor, Session
    from medvl_sam2.predictor.journal import Journal
    from medvl_sam2.predictor.timeline import Change

logger = logging.getLogger(__name__)

ANONYMOUS = frozenset({Client.OHIF.value, Client.API.value})
"""Clients that send no id share a session while the server runs; nobody inherits it from the disk."""
PREPARED = 2
"""Images kept in memory because they were prepared, whether or not somebody opens them."""
Loader = Callable[[Path | None], "Predictor"]


class Loaded(NamedTuple):
    """Which weights are in memory."""

    version: str | None
    """None before the first request."""
    refused: str | None
    """A published version that could not be loaded, so that ``version`` is served in its place."""
    device: str | None
    """Where they compute; None before the first request."""
    precision: str | None
    """Number format of slices; None before the first request."""


class Held(NamedTuple):
    """What :meth:`Runtime.use` lends: valid until its block ends."""

    predictor: Predictor
    session: Session
    notes: dict[str, bool]
    """What the annotator should know of the session; empty when there is nothing."""
    sent: SentMasks
    """What a client that asks for changes was sent last."""


@dataclass
class _Open:
    session: Session
    journal: Journal | None = None
    notes: dict[str, bool] = field(default_factory=dict)
    sent: SentMasks = field(default_factory=SentMasks)


class _Key(NamedTuple):
    client: str
    image: Path
    stamp: int
    """Modification time in ns: an image sent again under its old name starts afresh."""


class Runtime:
    """Lends the predictor and a session to one caller at a time."""

    def __init__(self, config: AppConfig, load: Loader | None = None) -> None:
        self._config = config
        self._load = load or partial(load_predictor, device=config.device, precision=config.precision)
        self._turns = Turns()
        self._preparation = Preparation(self._turns, self._prepare) if config.prepare else None
        self._ahead: OrderedDict[tuple[Path, int], Session] = OrderedDict()
        self._predictor: Predictor | None = None
        self._served: Path | None = None
        self._refused: Path | None = None
        self._sessions: OrderedDict[_Key, _Open] = OrderedDict()
        self._volumes: weakref.WeakValueDictionary[tuple[Path, int], Volume] = weakref.WeakValueDictionary()
        self._geometries: dict[tuple[Path, int], Geometry] = {}

    @contextmanager
    def use(
        self,
        image: Path,
        client: str,
        reset: bool = False,
        ahead: bool = False,
        what: str = "",
        corrected: str | None = None,
    ) -> Iterator[Held]:
        """Hold a turn, the current predictor and this annotator's session of this image.

        ``reset`` forgets what the annotator placed so far, ``ahead`` prepares what the next requests on a new session
        may want. ``what`` names the work for :meth:`waiting`; ``corrected`` is the object it only corrects, if any.
        Raises :class:`MedVLError` of reading image or weights.
        """

        def short() -> bool:
            return not reset and corrected is not None and self._stands(image, client, corrected)

        with self._turns.foreground(client, image.name, what, short):
            predictor = self._current_predictor()
            key = _Key(client, image, image.stat().st_mtime_ns)
            held = self._sessions.get(key)
            if held is None:
                held = self._sessions[key] = self._open(predictor, key, reset)
                if ahead:
                    self.expect(image)
            if reset:
                held.session.reset()
                if held.journal is not None:
                    held.journal.remove()
                held.notes.clear()
                held.sent.clear()
            self._sessions.move_to_end(key)
            try:
                yield Held(predictor, held.session, held.notes, held.sent)
            except MedVLError:
                raise
            except BaseException:
                self._sessions.pop(key, None)  # whatever broke may have left the session half changed
                raise
            finally:
                self._evict()

    def waiting(self) -> tuple[Waiting, ...]:
        """Requests that wait for their turn or have it; cheap, from any thread, and never waits itself."""
        return self._turns.waiting()

    def expect(self, image: Path) -> None:
        """Prepare an image that an annotator is about to open."""
        if self._preparation is not None:
            self._preparation.ask(image)

    def close(self) -> None:
        """Prepare nothing any more."""
        if self._preparation is not None:
            self._preparation.stop()

    def _prepare(self, image: Path) -> Iterator[None]:
        """Steps that do ahead what the first request on an image would wait for."""
        key = (image, image.stat().st_mtime_ns)
        self._current_predictor()
        yield
        predictor = self._current_predictor()
        # Kept for a while, so that the sessions opened on the volume find it: they share what was made of it.
        session = self._ahead.pop(key, None) or predictor.open(self._volume(*key))
        self._ahead[key] = session
        while len(self._ahead) > PREPARED:
            self._ahead.popitem(last=False)
        yield
        for _ in predictor.prepare(session) if self._predictor is predictor else ():
            yield
            if self._predictor is not predictor:
                return  # other weights look for themselves

    def forget(self, image: Path, client: str) -> None:
        """Close this annotator's sessions of an image."""
        with self._turns.foreground(client, image.name, "close"):
            for key in [key for key in self._sessions if key.client == client and key.image == image]:
                del self._sessions[key]

    def geometry(self, image: Path) -> Geometry:
        """Grid of an image, remembered; reads the file's header when nobody has it open."""
        key = (image, image.stat().st_mtime_ns)
        known = self._geometries.get(key)
        if known is None:
            volume = self._volumes.get(key)
            known = self._geometries[key] = volume.geometry if volume else read_geometry(image)
        return known

    def served_version(self) -> str:
        """Version of the weights the next answer comes from: a number, or ``shipped``. Cheap; never raises."""
        try:
            path = read_published(self._config.store)
        except CheckpointError:
            return "unknown"
        return path.name if path else "shipped"

    def loaded(self) -> Loaded:
        """Which weights are in memory; cheap, from any thread, and never waits."""
        predictor, refused = self._predictor, self._refused
        gone = refused.name if refused else None
        if predictor is None:
            return Loaded(None, gone, None, None)
        return Loaded(predictor.meta.version, gone, predictor.device, predictor.precision)

    def provenance(self, image: Path, client: str) -> Provenance:
        """Weights served now, and what stands in this client's session of an image. Waits for no inference.

        Without the lock: a session that is at work may show the prompts of a moment ago.
        """
        version = self.served_version()
        held = self._sessions.get(_Key(client, image, image.stat().st_mtime_ns)) if client else None
        if held is None:
            return Provenance(version, [])
        return Provenance(version, [_shown(name, prompt) for name, prompt in held.session.prompts.items()])

    def session_count(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

    def _stands(self, image: Path, client: str, name: str) -> bool:
        """Whether an annotator's object is in memory, so that a next click on it is cheap."""
        return any(
            name in held.session.objects
            for key, held in self._sessions.items()
            if (key.client, key.image) == (client, image)
        )

    def _current_predictor(self) -> Predictor:
        """The predictor of the published weights; the one before when those cannot be loaded."""
        try:
            wanted = read_published(self._config.store)
        except CheckpointError:
            if self._predictor is None:
                raise
            logger.exception("The published weights cannot be read; the version before stays in use")
            return self._predictor
        refused = self._refused is not None and wanted == self._refused  # None is the shipped weights, never refused
        if self._predictor is not None and (wanted == self._served or refused):
            return self._predictor
        logger.info("Loading weights %s", wanted or "shipped")
        try:
            predictor = self._load(wanted)
        except CheckpointError:
            if self._predictor is None:
                raise
            logger.exception("Weights %s cannot be loaded; the version before stays in use", wanted)
            self._refused = wanted
            return self._predictor
        self._sessions.clear()
        self._ahead.clear()
        if self._predictor is not None:
            self._predictor.close()
        self._predictor, self._served, self._refused = predictor, wanted, None
        return predictor

    def _open(self, predictor: Predictor, key: _Key, reset: bool) -> _Open:
        """A session with the timelines its journal has; their states are computed when somebody asks for them."""
        from medvl_sam2.predictor.journal import Journal, JournalHeader, remove_old, session_name

        session = predictor.open(self._volume(key.image, key.stamp))
        if not self._config.journal_days or key.client in ANONYMOUS:
            return _Open(session)
        folder = self._config.store / "sessions"
        remove_old(folder, self._config.journal_days, [session_name(k.client, str(k.image)) for k in self._sessions])
        header = JournalHeader(predictor.meta.version, predictor.meta.sha256, str(key.image), key.stamp)
        journal = Journal(folder / session_name(key.client, str(key.image)), header, fresh=reset)
        try:
            session.restore(journal.changes)
            if journal.changes:
                journal.compact(session.timelines)
        except OSError:
            logger.exception("The journal in %s stays as it is", journal.folder)
        except (PromptError, ValueError) as error:
            session.reset()
            journal.set_aside(str(error))
        session.recorder = partial(_record, session, journal)
        notes = {"restored": True, "weights_changed": journal.weights_changed} if journal.changes else {}
        journal.changes = []  # the session has them
        return _Open(session, journal, notes)

    def _volume(self, image: Path, stamp: int) -> Volume:
        volume = self._volumes.get((image, stamp))
        if volume is None:
            volume = read_volume(image)
            self._volumes[(image, stamp)] = volume
        return volume

    def _bytes(self) -> int:
        """Memory of all sessions; what those on one image share counts once."""
        sessions = [held.session for held in self._sessions.values()]
        shared = {id(session.volume): session.shared_bytes for session in sessions}
        own = sum(held.session.own_bytes + held.sent.bytes for held in self._sessions.values())
        return sum(shared.values()) + own

    def _evict(self) -> None:
        """Drop the least recently used sessions beyond the limits, never the last one."""
        budget = self._config.session_megabytes * 1_000_000
        while len(self._sessions) > 1 and (len(self._sessions) > self._config.max_sessions or self._bytes() > budget):
            key, _ = self._sessions.popitem(last=False)
            logger.info("Dropped the session of %s on %s", key.client, key.image.name)


def _record(session: Session, journal: Journal, change: Change) -> None:
    """Write a change down; a full disk costs the annotator the journal until the next change, not the mask."""
    try:
        journal.write(change, session.timelines)
    except OSError:
        logger.exception("The session in %s lacks a change on disk; it is tried again with the next", journal.folder)


def _shown(name: str, prompt: Prompt) -> dict[str, Any]:
    """A prompt as it is kept with a label, in stored voxels; of a mask and of strokes only that there were some."""
    points = np.asarray(prompt.points)
    return {
        "object": name,
        "foreground": points[np.asarray(prompt.labels) == 1].tolist(),
        "background": points[np.asarray(prompt.labels) == 0].tolist(),
        "box": None if prompt.box is None else np.asarray(prompt.box).tolist(),
        "text": prompt.text,
        "mask": prompt.mask is not None,
        "strokes": len(prompt.strokes),
    }


def load_predictor(path: Path | None, device: str = "auto", precision: Precision = "auto") -> Predictor:
    """Load published weights, or the shipped ones for None."""
    from medvl_sam2.predictor import Predictor  # torch and all: not before somebody asks

    return Predictor.load(path, device, precision)
